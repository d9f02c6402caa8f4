import warnings
from typing import Any

import numpy as np
import pytest
from einops import rearrange
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    LlavaImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from helpers.toy_grids import make_grid
from hooked_vlm.errors import GridError, HookedVLMWarning
from hooked_vlm.inputs.pixel_map import pixel_transform


PLAIN: dict[str, Any] = {"do_normalize": False, "resample": 0}
SQUARE_96: dict[str, Any] = {"size": {"height": 96, "width": 96}}
CLIP_84: dict[str, Any] = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(**PLAIN, **CLIP_84),
    "crop alone": CLIPImageProcessorPil(**PLAIN, **CLIP_84, do_resize=False),
    "oblong crop": CLIPImageProcessorPil(
        **PLAIN, size={"shortest_edge": 84}, crop_size={"height": 60, "width": 101}
    ),
    "siglip": SiglipImageProcessorPil(**PLAIN, **SQUARE_96),
    "gemma-3": Gemma3ImageProcessorPil(**PLAIN, **SQUARE_96),
    "llava": LlavaImageProcessorPil(**PLAIN, **CLIP_84),
    "llava padded": LlavaImageProcessorPil(**PLAIN, **CLIP_84, do_pad=True, image_mean=[0, 0, 0]),
    "qwen2-vl": Qwen2VLImageProcessorPil(**PLAIN),
    "pixtral": PixtralImageProcessorPil(**PLAIN, size={"longest_edge": 96}),
    "untouched": SiglipImageProcessorPil(**PLAIN, do_resize=False),
}


def seen(processor: Any, image: Image.Image) -> np.ndarray:
    """Returns what the encoder sees of the image's red channel, as `[height, width]`."""
    out = processor(image, return_tensors="np")
    if "image_grid_thw" not in out:
        return out["pixel_values"][0, 0]
    _, rows, cols = out["image_grid_thw"][0]
    patches = rearrange(
        out["pixel_values"],
        "(r c mr mc) (rgb t ph pw) -> rgb t (r mr ph) (c mc pw)",
        r=rows // 2,
        c=cols // 2,
        mr=2,
        mc=2,
        rgb=3,
        t=2,
        ph=14,
    )
    return patches[0, 0]


@pytest.mark.parametrize("size", [(120, 90), (83, 140), (84, 84), (200, 61)], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_white_box_is_seen_where_the_transform_says(name, size):
    """The map is not read from our own reading of the code: real processors move real boxes."""
    processor = PROCESSORS[name]
    x0, y0, x1, y1 = size[0] // 2 - 8, size[1] // 2 - 9, size[0] // 2 + 6, size[1] // 2 + 7
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[y0:y1, x0:x1] = 255
    found = seen(processor, Image.fromarray(pixels)) > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale, offset = pixel_transform(processor, size, (found.shape[1], found.shape[0]))
    for axis, (low, high) in enumerate(((x0, x1), (y0, y1))):
        white = np.flatnonzero(found.any(axis=axis))
        expected = low * scale[axis] - offset[axis], high * scale[axis] - offset[axis]
        # Nearest-neighbour resizing keeps edges to within one processed pixel.
        assert abs(white[0] - expected[0]) <= 1
        assert abs(white[-1] + 1 - expected[1]) <= 1


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_white_cell_of_the_encoder_s_image_is_the_cell_of_that_pixel(name):
    size = (150, 110)
    processor = PROCESSORS[name]
    box = (60, 40, 95, 75)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    view = seen(processor, Image.fromarray(pixels))
    processed = (view.shape[1], view.shape[0])
    scale, offset = pixel_transform(processor, size, processed)
    grid = make_grid(5, 6, image_size=size, processed_size=processed, scale=scale, offset=offset)
    rows = np.minimum(np.arange(processed[1]) * 5 // processed[1], 4)
    cols = np.minimum(np.arange(processed[0]) * 6 // processed[0], 5)
    white = np.zeros((5, 6))
    np.add.at(white, (rows[:, None], cols[None]), view > 0.5)
    area = processed[0] * processed[1] / 30
    surely = {(int(r), int(c)) for r, c in np.argwhere(white > 0.6 * area)}
    surely_not = {(int(r), int(c)) for r, c in np.argwhere(white < 0.4 * area)}
    found = set(grid.box(*box, rule=0.5).cells)
    assert surely and surely <= found and not found & surely_not


def test_known_numbers_of_clip_and_of_llava_s_padding():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    assert pixel_transform(clip, (640, 400), (336, 336)) == ((537 / 640, 0.84), (100.0, 0.0))
    padded = LlavaImageProcessorPil(do_pad=True, size=336, crop_size=336)
    scale, offset = pixel_transform(padded, (640, 400), (336, 336))
    assert scale == (0.525, 0.525) and offset == (0.0, -120 * 0.525)


def test_no_processor_means_that_the_whole_image_was_scaled():
    assert pixel_transform(None, (100, 50), (200, 200)) == ((2.0, 4.0), (0.0, 0.0))


def test_settings_that_do_not_explain_the_size_warn():
    with pytest.warns(HookedVLMWarning, match=r"96x80 px of an image of 50x40 px.* to 96x96"):
        scale, offset = pixel_transform(PROCESSORS["siglip"], (50, 40), (96, 80))
    assert scale == (1.92, 2.0) and offset == (0.0, 0.0)


def test_a_size_that_is_not_positive_is_refused():
    with pytest.raises(GridError, match=r"processed image's size is \(0, 4\)"):
        pixel_transform(None, (4, 4), (0, 4))
