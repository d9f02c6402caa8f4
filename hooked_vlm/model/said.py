"""Warnings of runs, shown at the user's line."""

import warnings
from collections.abc import Iterable
from typing import Any

from hooked_vlm.errors import HookedVLMWarning, callers_level, counted
from hooked_vlm.hooks.attention import implementation


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


def say_eager(model: Any, pairs: Iterable[tuple[str, Any]]) -> None:
    """Warns once per model that layers with hooked scores or patterns run eager attention."""
    wanted = {
        model.sites[name].module
        for name, _ in pairs
        if model.sites[name].part in ("attn_scores", "pattern")
    }
    bases = {implementation(model.hf_model.get_submodule(path)) for path in wanted} - {"eager"}
    if not bases or model.said_eager:
        return
    model.said_eager = True
    warnings.warn(
        f"Attention scores or patterns are hooked in {counted(len(wanted), 'layer')}. Eager "
        f"attention computes them there, in place of {' and '.join(sorted(bases))}; it needs "
        "memory and can change outputs in the last bits. Exclude these sites with "
        "names_filter, or load with attn_implementation='eager' so that all runs use it. "
        "(Shown once per model.)",
        HookedVLMWarning,
        stacklevel=callers_level(),
    )
