"""The part of torchvision that transformers' image processors use, in plain torch.

Some image processors exist for torchvision alone.  With these few functions in its place
their own code runs here, so tiling, padding and placeholder counts are the real ones.
Pixel values can differ from torchvision's in the last digits.  Where torchvision is
installed, nothing here is used.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")


class InterpolationMode(Enum):
    """The ways to resize, by torchvision's names."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def resize(
    image: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    antialias: bool = True,
    **_unused: Any,
) -> Tensor:
    """Returns images `[..., c, height, width]` at another size, integers rounded."""
    if not isinstance(interpolation, InterpolationMode):
        interpolation = _mapping()[Image.Resampling(interpolation)]
    mode = {"lanczos": "bicubic", "box": "area", "hamming": "bilinear"}.get(
        interpolation.value, interpolation.value
    )
    smooth = mode in ("bilinear", "bicubic")
    flat = image.reshape(-1, *image.shape[-3:]).float()
    made = functional.interpolate(
        flat, size=tuple(size), mode=mode, **({"antialias": antialias} if smooth else {})
    )
    if not image.is_floating_point():
        made = made.round().clamp(0, 255)
    return made.to(image.dtype).reshape(*image.shape[:-2], *made.shape[-2:])


def pad(
    image: Tensor,
    padding: Sequence[int],
    fill: float | Sequence[float] | None = 0,
    padding_mode: str = "constant",
) -> Tensor:
    """Returns images with a border; `padding` is (left, top, right, bottom) in pixels."""
    left, top, right, bottom = padding
    if padding_mode != "constant":
        return functional.pad(image, (left, right, top, bottom), mode=padding_mode)
    if isinstance(fill, Sequence):
        channels = [
            functional.pad(c, (left, right, top, bottom), value=float(f))
            for c, f in zip(image.unbind(-3), fill, strict=True)
        ]
        return torch.stack(channels, -3)
    return functional.pad(image, (left, right, top, bottom), value=fill or 0)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Returns a window of images."""
    return image[..., top : top + height, left : left + width]


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    """Returns `(image - mean) / std`, channel by channel."""
    shift, scale = (torch.as_tensor(v).float().reshape(-1, 1, 1) for v in (mean, std))
    return (image - shift) / scale


def grayscale_to_rgb(image: Tensor) -> Tensor:
    """Returns images of one channel with three."""
    return image.expand(*image.shape[:-3], 3, -1, -1) if image.shape[-3] == 1 else image


def rgb_to_grayscale(image: Tensor, num_output_channels: int = 1) -> Tensor:
    """Returns luminance."""
    weights = torch.tensor([0.2989, 0.587, 0.114]).reshape(3, 1, 1)
    gray = (image * weights).sum(-3, keepdim=True).to(image.dtype)
    return gray.expand(*gray.shape[:-3], num_output_channels, -1, -1)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Returns a picture as `[c, height, width]`, values as they are."""
    array = np.array(image)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


def to_pil_image(image: Tensor) -> Image.Image:
    """Returns a tensor `[c, height, width]` as a picture."""
    scaled = image * 255 if image.is_floating_point() else image
    return Image.fromarray(scaled.permute(1, 2, 0).to(torch.uint8).numpy())


FUNCTIONS = (
    resize,
    pad,
    crop,
    normalize,
    grayscale_to_rgb,
    rgb_to_grayscale,
    pil_to_tensor,
    to_pil_image,
)


@contextmanager
def torchvision_or_stand_in() -> Iterator[None]:
    """Lets modules that import torchvision be imported; torchvision itself stays unknown."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        yield
        return
    members: dict[str, Any] = {f.__name__: f for f in FUNCTIONS}
    members["InterpolationMode"] = InterpolationMode
    made = {name: ModuleType(name) for name in NAMES}
    made["torchvision.transforms.v2.functional"] = ModuleType("functional")
    made["torchvision.transforms.functional"] = ModuleType("functional")
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
        vars(module).update(members)
    _give_to_transformers(made["torchvision.transforms.v2.functional"])
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def _give_to_transformers(functions: ModuleType) -> None:
    """Puts the functions where transformers leaves a gap when torchvision is missing."""
    # Imported late, since transformers may be importing this module in torchvision's place.
    from transformers import image_processing_backends, image_utils

    mapping = _mapping()
    modules: tuple[Any, ...] = (image_processing_backends, image_utils)
    for module in modules:
        module.pil_torch_interpolation_mapping = mapping
        module.torch_pil_interpolation_mapping = {v: k for k, v in mapping.items()}
    modules[0].tvF = functions


def _mapping() -> dict[Image.Resampling, InterpolationMode]:
    same = ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
    nearest = {Image.Resampling.NEAREST: InterpolationMode.NEAREST_EXACT}
    return nearest | {Image.Resampling[name]: InterpolationMode[name] for name in same}
