"""Verifies that the fastest engine of a sweep gives the logits of plain hooked passes.

The cells use every shortcut of the engines: slots of the language model at positions in the
middle of the prompt, at its end and at all positions; merged embeddings; blocks of the vision
encoder; and the sites after it.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hooked_vlm.checks.laws import NO, NONE, YES, Finding
from hooked_vlm.engine.noise import bound_for
from hooked_vlm.errors import GridError, HookedVLMWarning, InterventionError
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken, Positions
from hooked_vlm.sweeps.sweep import Sweep


BEHIND = ("vision_encoder.hook_out", "vision_projector.hook_out")

Site = str | int


def check_sweep(
    model: HookedVLM,
    inputs: Mapping[str, Any],
    source: Mapping[str, Any],
    every: bool = True,
    **forward_kwargs: Any,
) -> Finding:
    """Verifies that patches from another run give the same logits with every engine.

    The allowed difference, relative to the largest logit, is that of the engine's own controls
    (`engine.noise`).  `source` are inputs of the same shapes.  Without `every`, only the first,
    middle and last layers are checked.
    """
    grown: list[str] = []
    told, common, problems = "", "", []
    for name, cells in _groups(model, inputs, every).items():
        try:
            off, engine = _compared(model, inputs, source, cells, forward_kwargs)
        except (InterventionError, GridError):
            continue  # every engine raises before it runs
        if engine.startswith("growing"):
            grown.append(name)
            common = next((x for x in engine.split("; ") if " prompts in " in x), common)
        else:
            told = told or engine
        if not off <= bound_for(model, inputs, {}, model.cfg.dtype, off):
            problems.append(f"{name}: off by {off:.1e} of the largest logit ({engine})")
    if problems:
        return Finding("sweep", NO, "; ".join(problems))
    if not grown and not told:
        return Finding("sweep", NONE)
    said = [f"grown: {', '.join(grown) or 'none'}", common, told]
    return Finding("sweep", YES, "; ".join(filter(None, said)))


def _groups(
    model: HookedVLM, inputs: Mapping[str, Any], every: bool
) -> dict[str, list[tuple[Site, Any]]]:
    """Returns groups of (site, place) that one sweep can hold."""
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    middle = 0 if ids is None else ids.shape[1] // 2
    places = [Positions((middle, middle + 1)), None, LastToken()]
    slots = _some(model.cfg.n_layers + 1, every)
    blocks = _some(model.cfg.vision.n_layers if model.cfg.vision else 0, every)
    found: dict[str, list[tuple[Site, Any]]] = {
        "slots": [(slot, at) for slot in slots for at in places],
        "merged": [("hook_merged_embed", at) for at in places],
        "encoder": [(f"vision_encoder.blocks.{i}.hook_resid_post", None) for i in blocks],
        "behind": [*((site, None) for site in BEHIND), ("hook_embed", LastToken())],
    }
    writable = {
        name: [(site, at) for site, at in cells if _is_writable(model, site)]
        for name, cells in found.items()
    }
    return {name: cells for name, cells in writable.items() if len(cells) > 1}


def _some(n: int, every: bool) -> Sequence[int]:
    return range(n) if every else sorted({i for i in (0, 1, n // 2, n - 2, n - 1) if 0 <= i < n})


def _is_writable(model: HookedVLM, site: Site) -> bool:
    return isinstance(site, int) or (site in model.sites and not model.sites[site].read_only)


def _compared(
    model: HookedVLM,
    inputs: Mapping[str, Any],
    source: Mapping[str, Any],
    cells: Sequence[tuple[Site, Any]],
    forward_kwargs: Mapping[str, Any],
) -> tuple[float, str]:
    """Returns the engines' difference relative to the largest logit, and the fastest engine."""
    sweep = Sweep(
        inputs,
        {"cell": range(len(cells))},
        lambda cell: Patch(cells[cell][0], at=cells[cell][1], source=source),
    )
    kwargs: Any = {"metric": lambda logits: logits[:, -1], "dims": ("batch", "token")}
    kwargs |= forward_kwargs
    plain = sweep.run(model, engine="plain", **kwargs)
    with warnings.catch_warnings():
        # The finding names the engine.
        warnings.filterwarnings("ignore", ".*A slower engine runs", HookedVLMWarning)
        fast = sweep.run(model, **kwargs)
    return float(abs(fast - plain).max() / abs(plain).max()), fast.attrs["engine"]
