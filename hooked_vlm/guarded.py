"""An edit as a hook function that refuses to act on anything but what it was made for.

An intervention is placed for certain inputs.  Run on others, or on one image of several,
its indices would still fit somewhere; a wrong number is worse than an error.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks import HookPoint
from hooked_vlm.sites import Site


def guarded(edit: Callable[[Any], Any], inputs: Mapping[str, Any], site: Site) -> Callable:
    """Returns an edit as a hook function that acts on the batch it was made for, and no other."""
    if not site.axes.startswith("batch pos"):

        def on_images(activation: Any, hook: HookPoint) -> Any:
            if hook.call > 0:
                raise InterventionError(
                    f"{hook.name} runs once for each image of these inputs, so an intervention "
                    "there cannot tell them apart. Use hook_merged_embed (slot 0) at the same "
                    "region, or one image at a time."
                )
            return edit(activation)

        return on_images
    batch, length = inputs["input_ids"].shape

    def hook_fn(activation: Any, hook: HookPoint) -> Any:
        if (ran := tuple(activation.shape[:2])) != (batch, length):
            raise InterventionError(
                f"An intervention at {hook.name} was made for {batch} prompts of {length} "
                f"positions and ran on {ran[0]} of {ran[1]}. Give hooks(…, inputs=…) the inputs "
                "that you run; in a generation, interventions act on the prompt: prefill_only=True."
            )
        return edit(activation)

    return hook_fn
