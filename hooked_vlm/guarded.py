"""An edit as a hook function that refuses to act on anything but what it was made for.

An intervention is placed for certain inputs.  Run on others, or on one image of several,
its indices would still fit somewhere; a wrong number is worse than an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.sites import Site
from hooked_vlm.places import rows_needed
from hooked_vlm.regions.positions import PromptRow


def guarded(
    edit: Callable[[Any], Any], inputs: Mapping[str, Any], site: Site, rows: Sequence[PromptRow]
) -> Callable:
    """Returns an edit as a hook function that acts on the batch it was made for, and no other."""

    def hook_fn(activation: Any, hook: HookPoint) -> Any:
        if hook.call > 0 and not site.axes.startswith("batch pos"):
            raise InterventionError(
                f"{hook.name} runs once for each image of these inputs, so an intervention there "
                "cannot tell them apart. Use hook_merged_embed (slot 0) at the same region, or one "
                "image at a time."
            )
        require_made_for(site, activation, inputs, rows)
        return edit(activation)

    return hook_fn


def require_made_for(
    site: Site, activation: Any, inputs: Mapping[str, Any], rows: Sequence[PromptRow]
) -> None:
    """Raises `InterventionError` unless an activation is of these prompts, or of their images.

    Images may have more rows than their grids tell (of registers, say), but not fewer.
    """
    if site.axes.startswith("batch pos"):
        _require_prompts(site.name, activation, inputs)
        return
    for image, n_rows in rows_needed(site, rows).items():
        if image < len(activation) and len(activation[image]) < n_rows:
            raise InterventionError(
                f"{site.name} has {len(activation[image])} rows for an image that its grid gives "
                f"{n_rows}: the model merges them in front of this site. Use the same region at a "
                "block of the vision encoder, at vision_projector.hook_out or at slot 0, or a hook "
                "function here."
            )


def _require_prompts(name: str, activation: Any, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    if ids is None:
        raise InterventionError(
            f"There are no positions to intervene at {name}: these inputs have no input_ids. Use "
            "a hook function: fwd_hooks=[(name, fn)]."
        )
    batch, length = ids.shape
    if (ran := tuple(activation.shape[:2])) != (batch, length):
        raise InterventionError(
            f"An intervention at {name} was made for {batch} prompts of {length} positions and "
            f"ran on {ran[0]} of {ran[1]}. Give hooks(…, inputs=…) the inputs that you run; in a "
            "generation, interventions act on the prompt: prefill_only=True. Where a model's "
            "blocks run on other positions than the prompt's, use a hook function there."
        )
