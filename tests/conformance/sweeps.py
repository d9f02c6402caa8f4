"""The law of sweeps: the fast engine gives what plain hooked passes give, or does not run.

Cells are chosen so that every shortcut is tried: slots of the language model at the front, the
middle and the end of the prompt, merged embeddings, blocks of the vision encoder, and what lies
behind it.
"""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.errors import GridError, InterventionError
from hooked_vlm.interventions import Patch
from hooked_vlm.laws import NO, NONE, YES, Finding
from hooked_vlm.model import HookedVLM
from hooked_vlm.spans import LastToken, Positions
from hooked_vlm.sweep import Sweep


BOUND = 1e-4
"""Of the largest logit."""
BEHIND = ("vision_encoder.hook_out", "vision_projector.hook_out")


def check_sweep(model: HookedVLM, inputs: Any, source: Any) -> Finding:
    """Every engine gives the same logits, for patches from another image at all kinds of sites."""
    grown, told, problems = [], "", []
    for name, cells in groups(model, inputs).items():
        try:
            off, engine = compared(model, inputs, source, cells)
        except (InterventionError, GridError):
            continue  # refused before anything ran, and by every engine
        if engine.startswith("growing"):
            grown.append(name)
        else:
            told = told or engine
        if not off <= BOUND:
            problems.append(f"{name}: off by {off:.1e} of the largest logit")
    if problems:
        return Finding("sweep", NO, "; ".join(problems))
    if not grown and not told:
        return Finding("sweep", NONE)
    return Finding("sweep", YES, f"grown: {', '.join(grown) or 'none'}" + (told and f"; {told}"))


def groups(model: HookedVLM, inputs: Mapping[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Returns sites and places by what they have in common."""
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    middle = 0 if ids is None else ids.shape[1] // 2
    places = [Positions((middle, middle + 1)), None, LastToken()]
    blocks = range(model.cfg.vision.n_layers if model.cfg.vision else 0)
    found = {
        "slots": [(slot, at) for slot in range(model.cfg.n_layers + 1) for at in places],
        "merged": [("hook_merged_embed", at) for at in places],
        "encoder": [(f"vision_encoder.blocks.{i}.hook_resid_post", None) for i in blocks],
        "behind": [*((site, None) for site in BEHIND), ("hook_embed", LastToken())],
    }
    return {
        name: kept
        for name, cells in found.items()
        if len(kept := [cell for cell in cells if is_writable(model, cell[0])]) > 1
    }


def is_writable(model: HookedVLM, site: str | int) -> bool:
    """Whether a model has a site that may be written."""
    return isinstance(site, int) or (site in model.sites and not model.sites[site].read_only)


def compared(
    model: HookedVLM, inputs: Any, source: Any, cells: list[tuple[Any, Any]]
) -> tuple[float, str]:
    """Returns how far the engines are apart, and which one ran."""
    sweep = Sweep(
        inputs,
        {"cell": range(len(cells))},
        lambda cell: Patch(cells[cell][0], at=cells[cell][1], source=source),
    )
    kwargs: Any = {"metric": lambda logits: logits[:, -1], "dims": ("batch", "token")}
    plain = sweep.run(model, engine="plain", **kwargs)
    fast = sweep.run(model, **kwargs)
    off = float(abs(fast - plain).max() / abs(plain).max())
    return off, fast.attrs["engine"]
