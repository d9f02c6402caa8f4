"""Converts images to the inputs of a vision encoder, with a grid for every image.

A cell of such a grid is a patch, and its position is the patch's row in the encoder's
sequence, counting class and register tokens.  The positions follow a rule (leading tokens,
then patches in raster order).  The rule is verified by a measurement, once for each size of
image: the gradient of the first block's input rows with respect to the pixels.  It gives the
number of leading tokens, and detects encoders that drop or shuffle patches.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn

from hooked_vlm.anatomy.devices import execution_device
from hooked_vlm.anatomy.sizes import EncoderConfig
from hooked_vlm.anatomy.source import forward_parameters
from hooked_vlm.anatomy.vision import Vision, grid_argument
from hooked_vlm.errors import (
    DataError,
    GridError,
    HookedVLMWarning,
    UnsupportedModelError,
    callers_level,
    counted,
)
from hooked_vlm.hooks.checkpointing import evaluating
from hooked_vlm.hooks.stand_ins import run_until
from hooked_vlm.inputs.by_measurement import shows_what_it_says
from hooked_vlm.inputs.pixel_map import pixel_transform
from hooked_vlm.inputs.pixel_routing import NOWHERE, SEVERAL, measuring, positions_reached
from hooked_vlm.inputs.prepare import Images, to_pil
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.processor import refusals
from hooked_vlm.regions.grid import TokenGrid, warn_if_resized


Size = tuple[int, int]


@dataclass(eq=False)
class EncoderGrids:
    """One encoder, and what was measured for the grids of its images."""

    hf_model: nn.Module
    vision: Vision
    cfg: EncoderConfig
    without_hooks: Callable[[], AbstractContextManager[None]]
    """Detaches the user's hooks during a measurement."""
    prefixes: dict[Any, int] = field(default_factory=dict)
    """Measured numbers of leading tokens, by shapes and masks of the inputs."""
    shown: set[Any] = field(default_factory=set)
    """Image sizes, with options, whose grids were compared with the processor's pixels."""


def prepare_images(
    encoder: EncoderGrids, given_processor: Any, images: Images, options: Mapping[str, Any]
) -> Inputs:
    """Returns the inputs for some images; see `HookedVisionEncoder.prepare`."""
    processor = getattr(given_processor, "image_processor", given_processor)
    if processor is None:
        raise UnsupportedModelError(
            "This HookedVisionEncoder was made without an image processor, so it cannot prepare "
            "images. Pass one, HookedVisionEncoder(hf_model, processor), or give forward() the "
            "tensors that the wrapped model takes."
        )
    given = list(images) if isinstance(images, list | tuple) else [images]
    if not given or any(image is None for image in given):
        raise DataError("No image was given. Give one image, or a list of one or more images.")
    pictures = [to_pil(image) for image in given]
    with refusals([pictures]):
        made = _named(encoder, dict(processor(images=pictures, return_tensors="pt", **options)))
    grids = find_grids(encoder, made, [picture.size for picture in pictures], processor)
    warn_if_resized(grid for (grid,) in grids)

    def pixels_of(image: Image.Image) -> Tensor:
        return processor(images=[image], return_tensors="pt", **options)["pixel_values"]

    for (grid,) in grids:
        key = grid.image_size, repr(sorted(options.items()))
        if key not in encoder.shown:
            encoder.shown.add(key)
            _warn_unless_shown(grid, pixels_of, type(given_processor).__name__)
    return Inputs(made, grids)


def _warn_unless_shown(grid: TokenGrid, pixels_of: Any, processor: str) -> None:
    """Warns when the processor's pixels, of images whose grey level rises, contradict the grid."""
    if pixels_of(Image.new("RGB", grid.image_size)).ndim != 4:
        return  # packed patches: the whole image is scaled
    if not shows_what_it_says(grid, pixels_of):
        width, height = grid.image_size
        warnings.warn(
            f"Cells of an image of {width}x{height} px show other parts of the image than the "
            f"settings of {processor} imply, so regions given in pixels may "
            "be misplaced. Give regions in rows and columns, or prepare images of the size that "
            "the encoder takes.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )


def find_grids(
    encoder: EncoderGrids,
    inputs: Mapping[str, Any],
    image_sizes: Sequence[Size] | None = None,
    processor: Any = None,
) -> tuple[tuple[TokenGrid, ...], ...]:
    """Returns the grid of each image of the inputs, each in a tuple of its own.

    `image_sizes` are (width, height) of the images given to an image processor; without them,
    pixels are those of the processed images.  Raises `GridError` when the inputs do not determine
    the grid, and when the patches are not in raster order after the leading tokens.
    """
    pixels, patch = _pixels(encoder, inputs), encoder.vision.patch_size
    if not patch:
        raise GridError(
            "This encoder has no fixed patch size, so its patches form no grid of pixels. Use rows "
            "of the encoder's sequence instead of regions."
        )
    shapes = _patch_grids(encoder, inputs)
    if image_sizes is not None and len(image_sizes) != len(shapes):
        raise GridError(
            f"{counted(len(image_sizes), 'image')} became {counted(len(shapes), 'picture')} for "
            "the encoder: this processor cuts images into tiles, and HookedVisionEncoder makes no "
            "grid over tiles. Turn off tiling in the processor's options, or wrap the whole model "
            "with HookedVLM."
        )
    grids = []
    for i, (rows, cols) in enumerate(shapes):
        n_prefix = _prefix(encoder, inputs, i, (rows, cols))
        seen = cols * patch, rows * patch
        one_size = pixels.ndim == 4 and not encoder.vision.packed
        whole = (pixels.shape[3], pixels.shape[2]) if one_size else seen
        size = image_sizes[i] if image_sizes is not None else whole
        scale, offset = pixel_transform(processor, size, whole)
        positions = n_prefix + torch.arange(rows * cols).view(rows, cols)
        grids.append(
            TokenGrid(positions, rows, cols, n_prefix, size, scale, offset, seen, prompt=i, image=i)
        )
    return tuple((grid,) for grid in grids)


def pixel_name(encoder: EncoderGrids) -> str:
    """Returns the name of an encoder's pixels: `pixel_values`, else its first parameter."""
    parameters = [name for name in forward_parameters(encoder.hf_model) if name != "self"]
    return "pixel_values" if "pixel_values" in parameters else parameters[0]


def _pixels(encoder: EncoderGrids, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the pixels of some inputs; raises `GridError` where there are none."""
    name = pixel_name(encoder)
    if not isinstance(inputs.get(name), Tensor):
        raise GridError(
            f"These inputs hold {', '.join(list(inputs)[:5]) or 'nothing'} and no {name!r}, which "
            "has this encoder's pixels. Give what prepare(images) returns, or use that name."
        )
    return inputs[name]


def _named(encoder: EncoderGrids, made: dict[str, Any]) -> dict[str, Any]:
    """Returns a processor's output under the encoder's parameter names, on its device."""
    parameters = forward_parameters(encoder.hf_model)
    pixels = made.pop("pixel_values")
    if not isinstance(pixels, Tensor):
        raise GridError(
            "The processor returned pictures of several sizes. Prepare the images one by one."
        )
    pixels = pixels.to(encoder.cfg.dtype)
    packed = grid_argument(encoder.hf_model)
    if packed is not None and "image_grid_thw" in made:
        made[packed] = made.pop("image_grid_thw")
    inputs = {pixel_name(encoder): pixels} | {n: v for n, v in made.items() if n in parameters}
    vision = encoder.vision
    other_size = pixels.ndim == 4 and set(pixels.shape[2:]) != {vision.image_size}
    if other_size and "interpolate_pos_encoding" in parameters:
        inputs["interpolate_pos_encoding"] = True
    # The encoder shuffles patches by sorting this noise; ascending values keep their order.
    if "noise" in parameters and pixels.ndim == 4:
        n_patches = pixels[0, 0].numel() // vision.patch_size**2
        inputs["noise"] = torch.arange(n_patches).expand(len(pixels), -1).float()
    device = execution_device(encoder.hf_model) or encoder.cfg.device
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}


def _patch_grids(encoder: EncoderGrids, inputs: Mapping[str, Any]) -> list[Size]:
    """Returns (rows, cols) of the patches of each image."""
    name, patch = grid_argument(encoder.hf_model), encoder.vision.patch_size
    told = inputs.get(name or "spatial_shapes")
    if told is not None:
        sizes = torch.as_tensor(told).tolist()
        if name == "image_sizes":
            return [(height // patch, width // patch) for height, width in sizes]
        return [(_product(frames) * rows, cols) for *frames, rows, cols in sizes]
    pixels = _pixels(encoder, inputs)
    if pixels.ndim != 4:
        raise GridError(
            f"Pixels of shape {tuple(pixels.shape)} are no [image, channel, height, width], and no "
            "other input has the number of patches of an image. Use prepare(images)."
        )
    return [(pixels.shape[2] // patch, pixels.shape[3] // patch)] * len(pixels)


def _product(numbers: Sequence[int]) -> int:
    return numbers[0] if numbers else 1


def _prefix(encoder: EncoderGrids, inputs: Mapping[str, Any], image: int, shape: Size) -> int:
    """Returns the number of tokens before an image's patches, measured once per input shape."""
    if encoder.vision.packed:  # sites of packed encoders are read in raster order
        return encoder.vision.n_prefix
    name = pixel_name(encoder)
    pixels = inputs[name]
    one = {
        n: v[image : image + 1] if isinstance(v, Tensor) and len(v) == len(pixels) else v
        for n, v in inputs.items()
    }
    beside = [(n, v.flatten().tolist()) for n, v in one.items() if n != name and torch.is_tensor(v)]
    key = tuple(pixels.shape[1:]), shape, repr(beside)
    if key not in encoder.prefixes:
        encoder.prefixes[key] = _leading(
            _measured(encoder, one, name), shape, encoder.vision.patch_size
        )
    return encoder.prefixes[key]


def _measured(encoder: EncoderGrids, inputs: dict[str, Any], name: str) -> Int[Tensor, "..."]:
    """Returns for each element of one image's pixels the row of block 0's input it reaches."""
    with measuring(encoder.without_hooks()), evaluating(encoder.hf_model):
        copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        pixels = copies[name].requires_grad_(True)
        rows = run_until(encoder.hf_model, encoder.vision, 0, lambda: encoder.hf_model(**copies))
        return positions_reached(rows, [pixels])[0][0]


def _leading(reached: Int[Tensor, "..."], shape: Size, patch: int) -> int:
    """Returns the number of rows before the patches, and verifies their raster order."""
    # Group the pixels by patch, in raster order.
    rows, cols = shape
    if reached.ndim == 3:
        cut = reached[:, : rows * patch, : cols * patch]
        pattern = "channel (row r) (col c) -> (row col) (channel r c)"
        by_patch = rearrange(cut, pattern, r=patch, c=patch)
    else:
        by_patch = reached[: rows * cols].flatten(1)
    if bool((by_patch == SEVERAL).any()):
        raise GridError(
            "The encoder's patches overlap, so its rows are not cells of a grid. Use rows of the "
            "encoder's sequence instead of regions."
        )
    found = by_patch.max(1).values
    lost = found == NOWHERE
    if bool(lost.any()):
        raise GridError(
            f"{int(lost.sum())} of {rows}x{cols} patches reach no row of the encoder, which drops "
            "them, so the other patches form no grid. If the encoder was pre-trained with masks, "
            "load it with mask_ratio=0.0."
        )
    # All pixels of a patch must reach one row, and the rows must ascend in raster order.
    agree = (by_patch == found[:, None]) | (by_patch == NOWHERE)
    leading = int(found[0])
    raster = leading + torch.arange(rows * cols, device=found.device)
    if not bool(agree.all()) or not torch.equal(found, raster):
        raise GridError(
            "The encoder does not keep its patches in raster order, row by row. Use rows of the "
            "encoder's sequence instead of regions."
        )
    return leading
