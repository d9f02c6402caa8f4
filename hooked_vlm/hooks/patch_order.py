"""Converts between a vision encoder's own order of patches and raster order by image.

Encoders differ in their order of patches.  The Qwen-VL layout packs the patches of all
images into one sequence, in 2x2 blocks within each image, so that four neighbours merge into
one visual token.  Users always see `[image, patch, ...]` in raster (row-major) order:
`to_images` makes that view, and `from_images` is its exact inverse.  Images of different
sizes are a list by image; they are never padded into one tensor.

Encoders for images of any size take all patches in one sequence, and the grid of each image
in another argument, which has one of a few names (`anatomy.vision.grid_argument`).  Encoders
like Qwen2.5-VL's also sort their patches by attention window before the first block, and
restore the order only after the merger.  We call the function with which transformers
computes that order, so both always agree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Int, Shaped
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.anatomy.vision import Vision, grid_argument
from hooked_vlm.errors import GridError, UnsupportedModelError, counted


Stage = Literal["patches", "blocks", "tokens", "features", "outside"]
"""A stage of the encoder at which rows are packed (see `PackedLayout.order`)."""

VisionActivation = Tensor | list[Tensor]
"""`[image, patch, ...]`, or a list of `[patch, ...]` by image where sizes differ."""


@dataclass(frozen=True, eq=False)
class PackedOrder:
    """For each image, the packed row of every patch (or token) in raster order."""

    rows: tuple[Int[Tensor, " _"], ...]  # images differ in size

    @cached_property
    def total(self) -> int:
        """Number of packed rows."""
        return sum(len(rows) for rows in self.rows)

    @cached_property
    def even(self) -> bool:
        """Whether all images have the same number of rows."""
        return len({len(rows) for rows in self.rows}) == 1

    @cached_property
    def flat(self) -> Int[Tensor, " row"]:
        """The packed rows of all images, one image after the other."""
        return torch.cat(self.rows)

    @cached_property
    def places(self) -> Int[Tensor, " row"]:
        """The index of each packed row in `flat`."""
        return torch.argsort(self.flat)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The orders of rows in one call of a packed encoder, at each of its stages."""

    shapes: tuple[tuple[int, int, int], ...]
    """Frames, patch rows and patch columns of each image."""
    patches: PackedOrder
    """Patches in the order of the encoder's input."""
    blocks: PackedOrder
    """Patches inside the blocks, which an encoder with window attention reorders."""
    tokens: PackedOrder
    """Merged tokens, in the order of the blocks."""
    merge: int = 1
    """Side of the square of patches that are merged into one token."""

    def order(self, stage: Stage, n_rows: int) -> PackedOrder:
        """Returns the order of the rows at a stage of the encoder.

        `"patches"`, `"blocks"` and `"tokens"` are the attributes above, with class tokens before
        each image if there are any.  At `"features"` the number of rows decides between patches
        and merged tokens.  Rows that an encoder or a projector merges in raster order are in
        raster order.  `"outside"` is a projector outside the encoder.
        """
        if stage == "outside":  # the encoder has restored the order
            return self.patches if n_rows == self.patches.total else self._raster(n_rows)
        if stage == "features":
            stage = "blocks" if n_rows == self.blocks.total else "tokens"
        found: PackedOrder = getattr(self, stage)
        # The grids may count merged blocks instead of patches; then there are more rows.
        finer = self.finer
        if finer is not None and finer.blocks.total <= n_rows:
            return finer.order(stage, n_rows)
        # A few more rows for each image are class tokens; a fraction of the rows is a merge.
        extra, rest = divmod(n_rows - found.total, len(self.shapes))
        if extra > 0 and not rest and extra <= _MOST_PREFIX:
            return _behind_prefix(found, extra)
        if n_rows != found.total and n_rows and not self.blocks.total % n_rows:
            return self._merged(self.blocks.total // n_rows)
        if stage == "tokens" and n_rows != found.total:
            return self._raster(n_rows)
        return found

    def _raster(self, n_rows: int) -> PackedOrder:
        """Returns the order of rows that are in raster order already, split by image."""
        if n_rows and not self.patches.total % n_rows:
            return self._merged(self.patches.total // n_rows)
        if len(self.shapes) > 1:
            return self.tokens  # wrong length on purpose: `to_images` then raises GridError
        return PackedOrder((torch.arange(n_rows),))  # one image's tokens, with separators

    @cached_property
    def finer(self) -> "PackedLayout | None":
        """The layout if the grids count merged blocks instead of patches; None without merging."""
        if self.merge < 2:
            return None
        side = self.merge
        grid = torch.tensor([(t, h * side, w * side) for t, h, w in self.shapes])
        layout = packed_layout(grid, side)
        return replace(layout, merge=1)

    def _merged(self, factor: int) -> PackedOrder:
        counts = [len(rows) // factor for rows in self.blocks.rows]
        return PackedOrder(tuple(torch.arange(sum(counts)).split(counts)))


_MOST_PREFIX = 16


def _behind_prefix(order: PackedOrder, prefix: int) -> PackedOrder:
    """Returns the order of rows with class tokens before the rows of each image."""
    images = []
    for i, rows in enumerate(order.rows):
        start = int(rows.min()) + i * prefix
        images.append(torch.cat([start + torch.arange(prefix), rows + (i + 1) * prefix]))
    return PackedOrder(tuple(images))


def packed_layout(
    grid_thw: Int[Tensor, "image 3"],
    merge: int | Sequence[int],
    window_index: Int[Tensor, " token"] | None = None,
) -> PackedLayout:
    """Returns the layout of an encoder that packs images in blocks of `merge` x `merge` patches.

    `grid_thw` has the frames, patch rows and patch columns of each image; the frames of an
    image follow each other in its raster order.  `merge` may differ by image.
    `window_index`, for an encoder with window attention, is the merged block of patches at
    each place inside the blocks.
    """
    # 1. The order by image without windows: squares of `merge` x `merge` patches in a row.
    patches, tokens, start, first = [], [], 0, 0
    shapes = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
    merges = [merge] * len(shapes) if isinstance(merge, int) else list(merge)
    for (frames, height, width), side in zip(shapes, merges, strict=True):
        if height % side or width % side:
            raise GridError(
                f"An image of {height}x{width} patches cannot be merged in squares of "
                f"{side}x{side}. Resize it so that both numbers are multiples of {side}."
            )
        n_patches = frames * height * width
        sizes = {"row": height // side, "col": width // side, "r": side, "c": side}
        packed = start + torch.arange(n_patches)
        patches.append(rearrange(packed, "(t row col r c) -> (t row r col c)", **sizes))
        n_tokens = n_patches // side**2
        tokens.append(first + torch.arange(n_tokens))
        start, first = start + n_patches, first + n_tokens
    order = PackedOrder(tuple(patches))
    if window_index is None:
        return PackedLayout(tuple(shapes), order, order, PackedOrder(tuple(tokens)), max(merges))
    # 2. Windows move whole squares of patches.
    place, side = torch.argsort(window_index.cpu()), merges[0]
    inside = tuple(place[rows // side**2] * side**2 + rows % side**2 for rows in patches)
    moved = tuple(place[rows] for rows in tokens)
    return PackedLayout(tuple(shapes), order, PackedOrder(inside), PackedOrder(moved))


def to_images(packed: Shaped[Tensor, "row ..."], order: PackedOrder) -> VisionActivation:
    """Returns packed rows as `[image, patch, ...]` in raster order (a list if sizes differ)."""
    if packed.shape[0] != order.total:
        raise GridError(
            f"The encoder packed {counted(packed.shape[0], 'row')} where its grid_thw makes "
            f"{order.total}: this model's layout differs from the one detected from its module "
            "tree. Report this with the model's name."
        )
    if order.even:
        raster = packed.index_select(0, sent(order.flat, packed.device))
        return raster.unflatten(0, (len(order.rows), -1))
    return [packed.index_select(0, sent(rows, packed.device)) for rows in order.rows]


def from_images(images: VisionActivation, order: PackedOrder) -> Shaped[Tensor, "row ..."]:
    """Returns images in raster order as packed rows: the inverse of `to_images`."""
    rows = images.flatten(0, 1) if isinstance(images, Tensor) else torch.cat(images)
    return rows.index_select(0, sent(order.places, rows.device))


def listed(value: VisionActivation) -> list[Tensor]:
    """Returns an activation as a list of tensors, which is by image where it was one."""
    return value if isinstance(value, list) else [value]


def each(function: Callable[[Tensor], Tensor], value: VisionActivation) -> VisionActivation:
    """Returns a function of a tensor, or of every tensor of a list by image."""
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def joint(
    function: Callable[[Tensor, Tensor], Tensor], one: VisionActivation, other: VisionActivation
) -> VisionActivation:
    """Returns a function of two tensors, or of every two of lists by image."""
    if isinstance(one, list):
        return [function(*both) for both in zip(one, other, strict=True)]
    assert isinstance(other, Tensor)
    return function(one, other)


def joined(first: VisionActivation, second: VisionActivation) -> VisionActivation:
    """Returns the images of two calls of one module together: a tensor if their shapes agree."""
    images = [*first, *second]
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def cropped(
    grids: Shaped[Tensor, "image channel row col"], layout: PackedLayout
) -> VisionActivation:
    """Returns convolved images, padded to one size, as `[image, patch, channel]` unpadded."""
    images = [
        grid[:, :height, :width].flatten(1).T
        for grid, (_, height, width) in zip(grids, layout.shapes, strict=True)
    ]
    return torch.stack(images) if layout.patches.even else images


def uncropped(
    images: VisionActivation, grids: Shaped[Tensor, "image channel row col"], layout: PackedLayout
) -> Shaped[Tensor, "image channel row col"]:
    """Returns `grids` with images written into them: the inverse of `cropped`."""
    whole = grids.clone()
    for i, (image, (_, height, width)) in enumerate(zip(images, layout.shapes, strict=True)):
        # By index: what iterating gives are views, which autograd lets nobody write.
        whole[i, :, :height, :width] = image.T.unflatten(1, (height, width))
    return whole


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
    """Returns frames, patch rows and patch columns of each image, from the argument `name`."""
    if name is None or arguments.get(name) is None:
        # Pixtral's encoder without a language model: all images have the size of the batch.
        *_, height, width = arguments["pixel_values"].shape
        grid = torch.tensor([[height // patch_size, width // patch_size]])
        grid = grid.expand(len(arguments["pixel_values"]), 2)
    else:
        grid = torch.as_tensor(arguments[name]).cpu().long().reshape(len(arguments[name]), -1)
        grid = grid // patch_size if name == "image_sizes" else grid
    return grid if grid.shape[1] == 3 else torch.cat([torch.ones_like(grid[:, :1]), grid], dim=1)


def _in_patches(grid_thw: Int[Tensor, "image 3"], pixels: Any) -> Int[Tensor, "image 3"]:
    """Returns the grid in patches, also where the argument counts merged blocks of patches."""
    if not isinstance(pixels, Tensor):
        return grid_thw
    factor, rest = divmod(len(pixels), int(grid_thw.prod(-1).sum()))
    side = isqrt(factor)
    if rest or side < 2 or side**2 != factor:
        return grid_thw
    return grid_thw * torch.tensor([1, side, side])


def window_index(encoder: Any, grid_thw: Int[Tensor, "image 3"]) -> Tensor | None:
    """Returns the merged block of patches at each place inside the blocks (None: not reordered).

    Raises `UnsupportedModelError` when the encoder reorders patches in an unknown way.
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
            f"{type(encoder).__name__} reorders its patches, and transformers' "
            f"get_vision_window_index does not give the order ({error}), so sites of its blocks "
            "cannot be shown in raster order. Install a version of transformers from "
            "docs/measured/compatibility.md, and report this."
        ) from error
    return found
