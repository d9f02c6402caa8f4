"""Attention weights as maps of an image, and attention followed through layers (rollout)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Share, Whole
from hooked_vlm.errors import DataError, GridError
from hooked_vlm.regions.grid import TokenGrid


@checked(DataError)
def image_map(
    weights: Float[Tensor, "*any key"], grid: TokenGrid, first_key: Whole = 0
) -> Float[Tensor, "*any row col"]:
    """Returns weights over prompt positions as a map of an image's cells, in raster order.

    `weights` are rows of an attention pattern, of a rollout, or any numbers by position: of the
    prompt that `grid` belongs to.  Images in tiles are put together, and several images have a grid
    each.  `first_key` is the position of the first key, where a layer's sliding window has dropped
    those before (`hook.key_positions.start`): dropped cells are 0, as nothing attends to them.

    Raises `GridError` for fewer positions than the image needs.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64), "red"), "What is this?")
    >>> _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_pattern")
    >>> last = cache["pattern", 3][0, :, -1]  # [head, key]
    >>> image_map(last, inputs.grid).shape
    torch.Size([4, 4, 6])
    """
    index = grid.positions.to(weights.device) - first_key
    if int(index.max()) >= weights.shape[-1]:
        raise GridError(
            f"Weights of {weights.shape[-1]} positions from {first_key} on were given, and the "
            f"image's last visual token is at {int(grid.positions.max())}. Give weights over the "
            "keys of the whole prompt."
        )
    found = weights[..., index.clamp(min=0)]
    return torch.where(index >= 0, found, 0)


@checked(DataError)
def patch_map(
    weights: Float[Tensor, "*any patch"], grid: TokenGrid
) -> Float[Tensor, "*any patch_row patch_col"]:
    """Returns weights over the vision encoder's rows as a map of patches, in raster order.

    `weights` are of one image, class tokens included: `cache["pattern", 0, "vision_encoder"][image]
    [:, query]`.  For images in tiles, whose patches are of several encoder images, use
    `grid.patches`.

    Raises `GridError` for another number of rows, and for an image in tiles.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-gemma-3", attn_implementation="eager")
    >>> inputs = model.prepare(Image.new("RGB", (192, 192)), "What is this?")
    >>> _, cache = model.run_with_cache(inputs, "vision_encoder.*.hook_pattern", stop_at_layer=0)
    >>> patch_map(cache["pattern", 0, "vision_encoder"][0].mean(-2), inputs.grid).shape
    torch.Size([4, 24, 24])
    """
    if grid.patches is not None and len(grid.patches[..., 0].unique()) > 1:
        raise GridError(
            "The encoder sees this image in tiles, so its patches are rows of several matrices. "
            "grid.patches lists each cell's (tile, row) pairs."
        )
    n_patches = grid.patch_rows * grid.patch_cols
    if weights.shape[-1] != grid.n_prefix + n_patches:
        raise GridError(
            f"Weights of {weights.shape[-1]} rows were given, and the image has {grid.n_prefix} + "
            f"{grid.patch_rows}x{grid.patch_cols}. Give weights over the rows of one image; in "
            "layers with windows there are none."
        )
    patches = weights[..., grid.n_prefix :]
    return patches.unflatten(-1, (grid.patch_rows, grid.patch_cols))


@checked(DataError)
def attention_rollout(
    patterns: Sequence[Float[Tensor, "*batch head pos pos"]], residual: Share = 0.5
) -> Float[Tensor, "layer *batch pos pos"]:
    """Returns how much of each position's input is in each position, after each layer.

    `patterns` are those of consecutive layers, the first one first.  Each is averaged over heads;
    `residual` of the identity is added for the stream that passes by, the rest is attention; rows
    are normalised to sum to one; and layers are multiplied.  A row of the result sums to one over
    the input positions.  `image_map(rollout[-1][0, -1], grid)` is that of the last token over the
    image.  Values and norms are left out, so it is a rough account of what flows.

    Source: Abnar & Zuidema (2020).  Raises `DataError` for patterns of different sizes, and for
    ones that are not square, such as those of a step with a key-value cache or of cross-attention.

    >>> uniform = torch.full((1, 2, 3, 3), 1 / 3)
    >>> attention_rollout([uniform])[0, 0, 0]
    tensor([0.6667, 0.1667, 0.1667])
    """
    sizes = {tuple(x.shape[:-3]) + tuple(x.shape[-2:]) for x in patterns}
    if len(sizes) != 1 or not all(x.shape[-1] == x.shape[-2] for x in patterns):
        raise DataError(
            f"Patterns of {', '.join(str(tuple(x.shape)) for x in patterns[:4]) or 'no layer'} "
            "were given; expected those of one run, [batch, head, query, key], with as many keys "
            "as queries in every layer."
        )
    rolled: list[Tensor] = []
    for pattern in patterns:
        mixed = pattern.float().mean(-3) * (1 - residual)
        eye = torch.eye(mixed.shape[-1], device=mixed.device, dtype=mixed.dtype)
        mixed = mixed + residual * eye
        # Rows of attention sinks sum to less than one, and so does anything with a pattern cut.
        mixed = mixed / mixed.sum(-1, keepdim=True)
        rolled.append(mixed @ rolled[-1].to(mixed.device) if rolled else mixed)
    return torch.stack([x.to(rolled[0].device) for x in rolled])
