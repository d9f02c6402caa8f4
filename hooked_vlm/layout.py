"""From a vision encoder's own order of patches to raster order by image, and back.

Encoders keep patches in whatever order suits them.  The Qwen-VL layout packs the
patches of all images into one sequence and walks each image in 2x2 blocks, so that
four neighbours merge into one visual token.  Users see `[image, patch, ...]` in raster
(row-major) order everywhere; `to_images` makes that view and `from_images` puts a
changed one back exactly.  Images of different sizes come as a list by image, never
padded into one tensor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hooked_vlm.errors import GridError


Images = Tensor | list[Tensor]
"""`[image, patch, ...]`, or a list of `[patch, ...]` by image where sizes differ."""


@dataclass(frozen=True, eq=False)
class PackedOrder:
    """For each image, the packed row of every patch (or token) in raster order."""

    rows: tuple[Int[Tensor, " _"], ...]  # images differ in size

    @property
    def total(self) -> int:
        """Number of packed rows."""
        return sum(len(rows) for rows in self.rows)

    @property
    def even(self) -> bool:
        """Whether all images have the same number of rows."""
        return len({len(rows) for rows in self.rows}) == 1


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Orders of the rows of one call of a packed encoder, at each of its stages."""

    patches: PackedOrder
    """Patches as they come in."""
    blocks: PackedOrder
    """Patches inside the blocks, where an encoder with window attention has reordered them."""
    tokens: PackedOrder
    """Merged tokens, in the order of the blocks."""


def packed_layout(
    grid_thw: Int[Tensor, "image 3"],
    merge: int,
    window_index: Int[Tensor, " token"] | None = None,
) -> PackedLayout:
    """Returns the layout of an encoder that packs images in blocks of `merge` x `merge` patches.

    `grid_thw` counts frames, patch rows and patch columns of each image; frames of one
    image follow each other in its raster order.  `window_index` says, for an encoder with
    window attention, which merged block of patches each place inside the blocks holds.
    """
    patches, tokens, start, first = [], [], 0, 0
    for frames, height, width in grid_thw.tolist():
        if height % merge or width % merge:
            raise GridError(
                f"An image of {height}x{width} patches cannot be merged in squares of "
                f"{merge}x{merge}."
            )
        n_patches = frames * height * width
        blocks = torch.arange(n_patches).view(frames, height // merge, width // merge, merge, merge)
        patches.append(start + blocks.permute(0, 1, 3, 2, 4).reshape(-1))
        n_tokens = n_patches // merge**2
        tokens.append(first + torch.arange(n_tokens))
        start, first = start + n_patches, first + n_tokens
    if window_index is None:
        order = PackedOrder(tuple(patches))
        return PackedLayout(order, order, PackedOrder(tuple(tokens)))
    place = torch.argsort(window_index.cpu())
    inside = tuple(place[rows // merge**2] * merge**2 + rows % merge**2 for rows in patches)
    moved = tuple(place[rows] for rows in tokens)
    return PackedLayout(PackedOrder(tuple(patches)), PackedOrder(inside), PackedOrder(moved))


def to_images(packed: Shaped[Tensor, "row ..."], order: PackedOrder) -> Images:
    """Returns packed rows as `[image, patch, ...]` in raster order (a list if sizes differ)."""
    if packed.shape[0] != order.total:
        raise GridError(
            f"The encoder packed {packed.shape[0]} rows where its grid_thw makes {order.total}; "
            "this model's layout is not the one read from its module tree."
        )
    images = [packed.index_select(0, rows.to(packed.device)) for rows in order.rows]
    return torch.stack(images) if order.even else images


def from_images(images: Images, order: PackedOrder) -> Shaped[Tensor, "row ..."]:
    """Returns images in raster order as packed rows: the inverse of `to_images`."""
    rows = torch.cat(list(images))
    inverse = torch.argsort(torch.cat(order.rows)).to(rows.device)
    return rows.index_select(0, inverse)
