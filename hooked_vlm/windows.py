"""How a packed encoder is told its images, and the order in which it keeps their patches.

Encoders that take images of any size get all patches in one sequence, and beside it the
grid of each image, under one of a few names (`anatomy.vision.grid_argument`).  Those of the
Qwen2.5-VL kind also sort their patches by attention window before the first block, and
put back only what leaves the merger; transformers computes that order with a function
of its own, and we ask the same function, so that both always agree.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.anatomy.vision import Vision, grid_argument
from hooked_vlm.errors import UnsupportedModelError
from hooked_vlm.layout import PackedLayout, packed_layout


def layout_of_call(encoder: Any, arguments: Mapping[str, Any], vision: Vision) -> PackedLayout:
    """Returns the layout of one call of a packed encoder, from that call's arguments."""
    grid_thw = _grid_thw(grid_argument(encoder), arguments, vision.patch_size)
    grid_thw = _in_patches(grid_thw, arguments.get("pixel_values"))
    sizes = arguments.get("merge_sizes")
    merge = vision.merge if sizes is None else [int(size) for size in sizes]
    return packed_layout(grid_thw, merge, window_index(encoder, grid_thw))


def _grid_thw(
    name: str | None, arguments: Mapping[str, Any], patch_size: int
) -> Int[Tensor, "image 3"]:
    """Returns frames, patch rows and patch columns of each image, under whatever name."""
    if name is None or arguments.get(name) is None:
        # Pixtral's encoder called alone: all images fill the batch.
        *_, height, width = arguments["pixel_values"].shape
        grid = torch.tensor([[height // patch_size, width // patch_size]])
        grid = grid.expand(len(arguments["pixel_values"]), 2)
    else:
        grid = torch.as_tensor(arguments[name]).cpu().long().reshape(len(arguments[name]), -1)
        grid = grid // patch_size if name == "image_sizes" else grid
    return grid if grid.shape[1] == 3 else torch.cat([torch.ones_like(grid[:, :1]), grid], dim=1)


def _in_patches(grid_thw: Int[Tensor, "image 3"], pixels: Any) -> Int[Tensor, "image 3"]:
    """Returns a grid in patches, where an encoder is told it in merged blocks of them."""
    if not isinstance(pixels, Tensor):
        return grid_thw
    factor, rest = divmod(len(pixels), int(grid_thw.prod(-1).sum()))
    side = isqrt(factor)
    if rest or side < 2 or side**2 != factor:
        return grid_thw
    return grid_thw * torch.tensor([1, side, side])


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
