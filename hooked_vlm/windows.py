"""The order in which an encoder with window attention keeps its patches.

Encoders of the Qwen2.5-VL kind sort their patches by attention window before the first
block, and put back only what leaves the merger.  transformers computes the order with a
function of its own; we ask the same function, so that both always agree.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from hooked_vlm.calls import forward_source
from hooked_vlm.errors import UnsupportedModelError


def window_index(encoder: Any, grid_thw: Int[Tensor, "image 3"]) -> Tensor | None:
    """Returns which merged block of patches each place inside the blocks holds (None: as it came).

    Raises `UnsupportedModelError` when the encoder reorders patches in a way not known here.
    """
    if "window_index" not in forward_source(type(encoder).forward):
        return None
    try:
        from transformers.vision_utils import get_vision_window_index

        found, _ = get_vision_window_index(
            grid_thw,
            spatial_merge_size=encoder.spatial_merge_size,
            window_size=encoder.window_size,
            patch_size=encoder.patch_size,
            kwargs={},
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} keeps its patches in an order of its own, and this version "
            f"of transformers does not say which ({error}). Sites of its blocks cannot be shown in "
            "raster order."
        ) from error
    return found
