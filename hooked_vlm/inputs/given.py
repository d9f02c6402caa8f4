"""Grids of inputs that `prepare` did not make: by the rule, where the rule is verified.

`prepare` compares the rule with a measurement before it uses the rule.  Inputs that come from
elsewhere (the model's own processor, the user's tensors, videos) get the same comparison: the
route of each pixel is measured on these inputs (`pixel_routing`), once for each layout.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from einops import rearrange
from torch import Tensor

from hooked_vlm.errors import (
    GridError,
    HookedVLMError,
    HookedVLMWarning,
    NoGradientError,
    NoGridError,
    callers_level,
)
from hooked_vlm.hooks.names import VISION
from hooked_vlm.inputs.grid_finder import GridFinder, Grids, noise, patch_grids
from hooked_vlm.inputs.pixel_routing import (
    NOWHERE,
    SEVERAL,
    Wrapped,
    attention_sites,
    measure_routes,
)
from hooked_vlm.inputs.prepare import processed
from hooked_vlm.inputs.processor import is_read, refusals
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region


_KNOWN: WeakKeyDictionary[Any, dict[Hashable, bool]] = WeakKeyDictionary()
"""By model, what was measured once."""

FIRST = f"{VISION}.blocks.0.hook_resid_pre"


def given_grids(finder: GridFinder, inputs: Mapping[str, Any]) -> Grids:
    """Returns the grids of images, a tuple for each prompt; pixels are the processed images'.

    Raises `NoGridError` where the rule does not hold for the model, and where several pictures
    of a prompt may be tiles of one image; `GridError` when the inputs determine no grid.
    """
    grids = finder.by_rule(inputs)
    found = [grid for row in grids for grid in row]
    if not found or inputs["input_ids"].is_meta or finder.model.device.type == "meta":
        return grids
    name = type(finder.model.hf_model).__name__
    if any(len(row) > 1 for row in grids) and _cuts_images(finder):
        raise NoGridError(
            f"A prompt has several pictures, and the processor of {name} cuts large images into "
            "tiles, so these inputs do not tell which pictures are one image. Use prepare(images, "
            "texts), which measures the grids."
        )
    trusted = finder.trusts_rule
    if trusted is None:
        trusted = follows(finder.model, inputs, found)
    if not trusted:
        raise NoGridError(
            f"The visual tokens of {name} do not follow the usual layout (each token shows one "
            "part of its image, in raster order), so these inputs determine no grid. Use "
            "prepare(images, texts), which measures the grids, or token positions instead of "
            "regions."
        )
    return grids


def follows(
    model: Wrapped, inputs: Mapping[str, Any], grids: Sequence[TokenGrid], n_videos: int = 0
) -> bool:
    """Whether the tokens of these grids are made of their own pixels, measured once per layout.

    The grids are those of images, or of the frames of `n_videos` videos.  True where nothing can
    be measured; a layer without a gradient gives a warning.
    """
    layout = {(grid.shape, grid.patch_rows, grid.patch_cols, grid.n_prefix) for grid in grids}
    known = _KNOWN.setdefault(model, {})
    key = frozenset(layout), bool(n_videos)
    if key not in known:
        known[key] = _measured(model, inputs, grids, n_videos)
    return known[key]


def _measured(
    model: Wrapped, inputs: Mapping[str, Any], grids: Sequence[TokenGrid], n_videos: int
) -> bool:
    if not attention_sites(model):
        return True  # nothing to compare with
    own = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if is_read(model.hf_model, name)
    }
    try:
        routes = measure_routes(model, own)
    except NoGradientError as error:
        warnings.warn(
            f"{error} Grids follow the rule of the usual layout, which was not compared with a "
            "measurement. Check one grid with draw_regions.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
        return True
    except GridError:
        return False  # no position, or no single position, shows a part of the image
    length, rows = inputs["input_ids"].shape[1], routes.rows.get(FIRST)
    if rows and n_videos:  # the encoder takes images before videos
        rows = rows[-n_videos:]
    return all(_is_shown(grid, routes.pixels, rows, length) for grid in grids)


def _is_shown(grid: TokenGrid, pixels: Tensor, rows: Sequence[Tensor] | None, length: int) -> bool:
    """Whether each cell's pixels, and its rows of the encoder, reach the cell's position."""
    wanted = (grid.prompt * length + grid.positions.flatten()).to(pixels.device)[:, None]
    if bool((pixels == SEVERAL).any()):
        return False
    if pixels.ndim == 4 and grid.patches is None:
        _, height, width = pixels[grid.image].shape
        tall, wide = height // grid.rows, width // grid.cols
        shown = pixels[grid.image][:, : tall * grid.rows, : wide * grid.cols]
        by_cell = rearrange(shown, "c (row h) (col w) -> (row col) (c h w)", h=tall, w=wide)
        if not bool(((by_cell == wanted) | (by_cell == NOWHERE)).all()):
            return False
    if rows is None:
        return True
    measured = rows[grid.image]
    patches = Region.everything(grid.shape).patches_by_cell(grid).to(measured.device)
    return int(patches.max()) < len(measured) and bool((measured[patches] == wanted).all())


def _cuts_images(finder: GridFinder) -> bool:
    """Whether the model's processor makes several pictures of one wide image."""
    known = _KNOWN.setdefault(finder.model, {})
    if "cuts" not in known:
        known["cuts"] = _try_cutting(finder)
    return known["cuts"]


def _try_cutting(finder: GridFinder) -> bool:
    vision, processor = finder.model.anatomy.vision, finder.model.processor
    if vision is None or getattr(processor, "image_processor", None) is None:
        return False
    side = vision.image_size or 4 * (vision.patch_size or 14) * max(vision.merge, 2)
    image, chat = noise((4 * side, side)), bool(getattr(processor, "chat_template", None))
    try:
        with refusals([[image]]):
            made, _ = processed(finder, [[image]], ["."], None, chat, {})
        return len(patch_grids(made, vision)) > 1
    except HookedVLMError:
        return False  # it takes no such image
