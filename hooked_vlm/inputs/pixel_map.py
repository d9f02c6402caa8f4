"""Maps the pixels of the given image to the pixels that the vision encoder sees.

An image processor may pad an image to a square, resize it and crop its centre.  Together
these are one affine map per axis: `processed = original * scale - offset`.  The map is
computed from the attributes that transformers' image processors share, in their order: pad,
resize, crop.  Processors with their own rule for the new size (Qwen2-VL's multiples of 28,
Pixtral's longest edge) crop nothing, so the two sizes determine the map.

All sizes are `(width, height)` and all pairs `(x, y)`, as in PIL.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_transforms import get_size_with_aspect_ratio

from hooked_vlm.errors import GridError, HookedVLMWarning, callers_level


Size = tuple[int, int]
Pair = tuple[float, float]


def pixel_transform(
    image_processor: Any, image_size: Size, processed_size: Size
) -> tuple[Pair, Pair]:
    """Returns `(scale, offset)`, each `(x, y)`, with `processed = original * scale - offset`.

    `image_size` is the size of the given image, `processed_size` the size of the image that the
    encoder sees (without padding that fills a batch), both `(width, height)` in pixels.  A
    positive offset was cropped, a negative one was padded.  Without an image processor, the map
    scales the whole image to the processed size.

    Raises `GridError` for a size that is not positive.  Warns with `HookedVLMWarning` when
    the processor's settings do not give `processed_size`, and then scales the whole image.
    """
    for word, size in (("image", image_size), ("processed image", processed_size)):
        if min(size) < 1:
            raise GridError(f"The {word}'s size is {size}. Give (width, height), both positive.")
    whole = _divided(processed_size, image_size), (0.0, 0.0)
    if image_processor is None:
        return whole
    # Pad, resize and crop, in the processor's order.
    before_resize, start = image_size, (0, 0)
    if _pads_to_square(image_processor, processed_size):
        side = max(image_size)
        before_resize = (side, side)
        start = ((side - image_size[0]) // 2, (side - image_size[1]) // 2)
    resized = _resized(image_processor, before_resize) or processed_size
    cut, after_crop = _crop(image_processor, resized)
    if after_crop != processed_size:
        _warn_unexplained(image_processor, image_size, processed_size, after_crop)
        return whole
    scale = _divided(resized, before_resize)
    # A pixel is moved by the padding, scaled, and moved back by the crop.
    offset = (cut[0] - start[0] * scale[0], cut[1] - start[1] * scale[1])
    return scale, offset


def _pads_to_square(processor: Any, processed_size: Size) -> bool:
    # Any-resolution processors (image_grid_pinpoints) pad their tiles, never the whole image.
    return bool(
        getattr(processor, "do_pad", False)
        and hasattr(processor, "pad_to_square")
        and not getattr(processor, "image_grid_pinpoints", None)
        and processed_size[0] == processed_size[1]
    )


def _resized(processor: Any, size: Size) -> Size | None:
    """Returns the size after resizing, or None when the processor has its own rule."""
    if not getattr(processor, "do_resize", False):
        return size
    # The rule below is that of every processor that does not override `resize`.
    if getattr(type(processor), "resize", None) not in (
        PilBackend.resize,
        TorchvisionBackend.resize,
    ):
        return None
    if processor.size is None:
        return None
    width, height = size
    rule = _as_dict(processor.size)
    short, long = rule.get("shortest_edge"), rule.get("longest_edge")
    if short and long:
        new_height, new_width = get_size_with_aspect_ratio((height, width), short, long)
        return new_width, new_height
    if short:
        scaled = int(short * max(size) / min(size))
        return (short, scaled) if width <= height else (scaled, short)
    if rule.get("width") and rule.get("height"):
        return rule["width"], rule["height"]
    return None


def _crop(processor: Any, size: Size) -> tuple[tuple[int, int], Size]:
    """Returns the pixels cropped at the left and the top, and the size after the crop.

    The numbers are negative for a crop larger than the image, which pads it.
    """
    if not getattr(processor, "do_center_crop", False):
        return (0, 0), size
    rule = _as_dict(processor.crop_size)
    crop = rule["width"], rule["height"]
    left, top = ((given - wanted) // 2 for given, wanted in zip(size, crop, strict=True))
    if getattr(processor, "backend", "pil") == "torchvision":
        # torchvision rounds towards zero, numpy rounds down: they differ by a pixel of padding.
        left, top = (int((given - wanted) / 2) for given, wanted in zip(size, crop, strict=True))
    return (left, top), crop


def _warn_unexplained(processor: Any, given: Size, processed: Size, expected: Size) -> None:
    warnings.warn(
        f"{type(processor).__name__} made {processed[0]}x{processed[1]} px of an image of "
        f"{given[0]}x{given[1]} px, and its settings lead to {expected[0]}x{expected[1]}. "
        "Cells are placed as if the whole image was scaled to the actual size. Check a region "
        "with draw_regions before you use regions given in pixels.",
        HookedVLMWarning,
        stacklevel=callers_level(),
    )


def _as_dict(size: Any) -> dict[str, int]:
    if isinstance(size, Mapping):
        return dict(size)
    if isinstance(size, int):
        return {"width": size, "height": size}
    return dict(iter(size))  # transformers' SizeDict yields its items


def _divided(a: Size, b: Size) -> Pair:
    return a[0] / b[0], a[1] / b[1]
