"""Warnings of runs, shown at the user's line."""

import warnings

from hooked_vlm.errors import HookedVLMWarning, callers_level


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
