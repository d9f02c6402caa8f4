"""Warnings of runs, shown at the user's line."""

import sys
import warnings

from hooked_vlm.errors import HookedVLMWarning


def warn_unran(names: set[str]) -> None:
    """Warns about named sites that never ran."""
    if names:
        shown = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
        warnings.warn(
            f"{len(names)} of the sites requested never ran, so nothing was read or written "
            f"there: {shown}. Vision sites run only when the inputs have an image.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )


def callers_level() -> int:
    """Returns the `stacklevel` with which a warning shows the line that called these classes."""
    ours = ("base", "vlm", "encoder", "said")
    own = ("contextlib", *(f"hooked_vlm.model.{name}" for name in ours))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__") in own:
        frame, level = frame.f_back, level + 1
    return level
