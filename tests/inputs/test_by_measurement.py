"""Where an element came from, with processors written by hand; templates from hand-made routes."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from helpers.toy_grids import make_grid
from hooked_vlm.errors import GridError
from hooked_vlm.inputs.by_measurement import (
    Template,
    make_template,
    places_of,
    ramp_images,
    shows_what_it_says,
)
from hooked_vlm.inputs.pixel_routing import NOWHERE, SEVERAL, Routes


ROWS, PROJECTED = "vision_encoder.blocks.0.hook_resid_pre", "vision_projector.hook_out"
Places = tuple[np.ndarray, np.ndarray]


def array(image: Image.Image) -> np.ndarray:
    """Pixels `[3, height, width]`, normalised in some way of a processor's own."""
    return (np.asarray(image, dtype=np.float64).transpose(2, 0, 1) - 120) / 60


def pixels_of(places: Places) -> tuple[np.ndarray, np.ndarray]:
    """The column and the row of the image that each element shows, -1 for padding."""
    x, y = (np.floor(np.where(np.isfinite(p), p, -1)).astype(int) for p in places)
    return x, y


# --- from an image to the pixel tensor -----------------------------------------------------


def test_ramps_rise_from_border_to_border() -> None:
    black, white, right, down = (np.asarray(i).astype(int) for i in ramp_images((20, 10)))
    assert (black.shape, black.max(), white.min()) == ((10, 20, 3), 0, 255)
    assert np.array_equal(right[0, :, 0], np.round((np.arange(20) + 0.5) / 20 * 255))
    assert np.array_equal(down[:, 0, 0], np.round((np.arange(10) + 0.5) / 10 * 255))
    assert (right == right[:1]).all()
    assert (down == down[:, :1]).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_crop_shows_the_pixels_it_cut_out(data: st.DataObject) -> None:
    width, height = (data.draw(st.integers(8, 120)) for _ in range(2))
    x0, y0 = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    flip = data.draw(st.booleans())

    def process(image: Image.Image) -> Tensor:
        cut = array(image.crop((x0, y0, x1, y1)))
        return torch.from_numpy(cut[:, :, ::-1].copy() if flip else cut)

    x, y = pixels_of(places_of(process, (width, height)))
    columns = np.arange(x0, x1)[:: -1 if flip else 1]
    assert x.shape == (3, y1 - y0, x1 - x0)
    assert (x == columns).all()
    assert (y == np.arange(y0, y1)[:, None]).all()


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_smaller_picture_shows_the_middles_of_what_it_averaged(factor: int) -> None:
    size = 64, 32

    def process(image: Image.Image) -> Tensor:
        small = image.resize((64 // factor, 32 // factor), Image.Resampling.BOX)
        return torch.from_numpy(array(small)).bfloat16().float()  # as coarse as models take it

    x, y = places_of(process, size)
    middles = (np.arange(64 // factor) + 0.5) * factor
    assert np.abs(x - middles).max() < 0.5
    assert np.abs(y - middles[: 32 // factor, None]).max() < 0.5


def test_padding_has_no_place() -> None:
    def process(image: Image.Image) -> Tensor:
        padded = np.full((3, 20, 26), 0.7)  # no pixel of the image has this grey
        padded[:, 2:18, 5:21] = array(image)
        return torch.from_numpy(padded)

    x, y = places_of(process, (16, 16))
    known = np.zeros((3, 20, 26), dtype=bool)
    known[:, 2:18, 5:21] = True
    assert np.array_equal(np.isfinite(x), known)
    assert np.array_equal(np.isfinite(y), known)
    columns, rows = pixels_of((x, y))
    assert (columns[:, 2:18, 5:21] == np.arange(16)).all()
    assert (rows[:, 2:18, 5:21] == np.arange(16)[:, None]).all()


def test_tiles_and_patches_in_any_order() -> None:
    """Two tiles in the wrong order, cut into patches whose features stand channel last."""

    def process(image: Image.Image) -> Tensor:
        tiles = [array(image)[:, :, 8:], array(image)[:, :, :8]]
        patches = np.stack(tiles).reshape(2, 3, 2, 4, 2, 4).transpose(0, 2, 4, 3, 5, 1)
        return torch.from_numpy(patches.reshape(2, 4, 48).copy())

    x, y = pixels_of(places_of(process, (16, 8)))
    tile, patch, feature = np.ogrid[:2, :4, :48]
    assert (x == 8 * (1 - tile) + 4 * (patch % 2) + feature // 3 % 4).all()
    assert (y == 4 * (patch // 2) + feature // 12).all()


# --- from routes to a grid -----------------------------------------------------------------

Box = tuple[float, float, float, float]


class Layout:
    """Tiles of n x n tokens, each of side² patches of 2x2 px, over boxes of an image."""

    def __init__(self, boxes: Sequence[Box], n: int = 2, side: int = 1, first: int = 3) -> None:
        self.boxes, self.n, self.side, self.first = boxes, n, side, first
        self.gap, self.prefix = 0, 0  # separators after each row; class tokens

    @property
    def n_tokens(self) -> int:
        return len(self.boxes) * self.n * (self.n + self.gap)

    def token(self, tile: int, row: int, col: int) -> int:
        """Which of the image's tokens a cell of a tile is."""
        return (tile * self.n + row) * (self.n + self.gap) + col

    def routes(self) -> Routes:
        n, side = self.n, self.side
        cells = np.array(
            [
                [[self.token(t, r, c) for c in range(n)] for r in range(n)]
                for t in range(len(self.boxes))
            ]
        )
        patches = (cells + self.first).repeat(side, 1).repeat(side, 2)
        pixels = patches.repeat(2, 1).repeat(2, 2)
        class_tokens = [NOWHERE] * self.prefix
        rows = {
            ROWS: [torch.tensor([*class_tokens, *tile.ravel()]) for tile in patches],
            PROJECTED: [torch.from_numpy(tile.ravel() + self.first) for tile in cells],
        }
        return Routes(torch.from_numpy(pixels), rows)

    def places(self) -> Places:
        m = self.n * self.side * 2
        middles = (np.arange(m) + 0.5) / m
        x = [np.tile(x0 + middles * (x1 - x0), (m, 1)) for x0, _, x1, _ in self.boxes]
        y = [np.tile((y0 + middles * (y1 - y0))[:, None], (1, m)) for _, y0, _, y1 in self.boxes]
        return np.stack(x), np.stack(y)

    def template(self, size: tuple[int, int], **changed: Any) -> Template:
        given: dict[str, Any] = {
            "routes": self.routes(),
            "places": self.places(),
            "image_tokens": self.first + torch.arange(self.n_tokens),
        }
        given |= changed
        return make_template(size=size, cell_px=cell_px, **given)


def cell_px(n_patches: int) -> int:
    return 2 * isqrt(n_patches)


def test_one_grid() -> None:
    layout = Layout([(0, 0, 32, 16)], n=4, side=2)
    layout.prefix = 1
    template = layout.template((32, 16))
    (view,) = template.views
    assert (template.n_tokens, template.n_encoder_images) == (16, 1)
    assert np.array_equal(view.tokens, np.arange(16).reshape(4, 4))
    assert view.processed_size == (16, 16)  # cells of 2x2 patches of 2 px
    assert view.scale == (0.5, 1.0)
    assert view.offset == (0.0, 0.0)
    assert view.patches is not None
    assert view.rows is not None
    for row, col in np.ndindex(4, 4):
        corner = 1 + 2 * row * 8 + 2 * col  # after the class token
        patches = [[0, corner + shift] for shift in (0, 1, 8, 9)]
        assert view.patches[row, col].tolist() == patches
        assert view.rows[row, col].tolist() == [[0, 4 * row + col]]


def test_a_crop_shows_in_scale_and_offset() -> None:
    """Of 40x16 px the middle 16x16 are seen, at twice their size."""
    (view,) = Layout([(12, 0, 28, 16)], n=8, side=2).template((40, 16)).views
    assert view.processed_size == (32, 32)
    edges = (np.arange(9) * 4 + view.offset[0]) / view.scale[0]
    np.testing.assert_allclose(edges, 12 + 2 * np.arange(9), atol=1e-6)
    assert (view.scale[1], view.offset[1]) == (2.0, 0.0)


TILES = [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]
WHOLE = (0, 0, 32, 32)


@pytest.mark.parametrize("thumbnail", ["first", "last", "none"])
def test_tiles_make_one_grid_and_the_thumbnail_another(thumbnail: str) -> None:
    boxes = {"first": [WHOLE, *TILES], "last": [*TILES, WHOLE], "none": TILES}[thumbnail]
    layout = Layout(boxes, n=2)
    template = layout.template((32, 32))
    start = 1 if thumbnail == "first" else 0
    fine, *coarse = template.views
    assert (template.n_encoder_images, template.n_tokens) == (len(boxes), 4 * len(boxes))
    assert fine.patches is not None
    for row, col in np.ndindex(4, 4):
        tile, inside = start + row // 2 * 2 + col // 2, (row % 2, col % 2)
        assert fine.tokens[row, col] == layout.token(tile, *inside)
        assert fine.patches[row, col].tolist() == [[tile, inside[0] * 2 + inside[1]]]
    assert (fine.scale, fine.processed_size) == ((0.25, 0.25), (8, 8))
    assert len(coarse) == (thumbnail != "none")
    for view in coarse:
        tile = 0 if thumbnail == "first" else 4
        assert view.tokens.tolist() == (np.arange(4).reshape(2, 2) + 4 * tile).tolist()
        assert (view.scale, view.processed_size) == ((0.125, 0.125), (4, 4))


def test_an_image_shown_twice_makes_two_views() -> None:
    template = Layout([WHOLE, WHOLE], n=3).template((32, 32))
    first, second = template.views
    assert np.array_equal(second.tokens, first.tokens + 9)
    assert first.tokens.tolist() == np.arange(9).reshape(3, 3).tolist()
    assert first.scale == second.scale
    assert second.patches is not None
    assert second.patches[..., 0].unique().tolist() == [1]


def test_a_column_shown_twice_is_a_view_of_that_column_alone() -> None:
    """Two tiles overlap by one column of cells: no view claims what it does not show."""
    whole, again = Layout([(0, 0, 16, 16), (12, 0, 28, 16)], n=4).template((28, 16)).views
    assert (whole.tokens.shape, again.tokens.shape) == ((4, 7), (4, 1))
    edges = (np.array([0, again.processed_size[0]]) + again.offset[0]) / again.scale[0]
    np.testing.assert_allclose(edges, [12, 16])
    assert again.tokens[:, 0].tolist() == [16, 20, 24, 28]


def test_separators_are_counted_and_shown_nowhere() -> None:
    layout = Layout([WHOLE], n=3)
    layout.gap = 1
    template = layout.template((32, 32))
    assert template.n_tokens == 12
    assert template.views[0].tokens.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]


def test_tokens_in_any_order_are_put_where_they_look() -> None:
    """A model may number its tokens column by column, or shuffled: places say where they are."""
    layout, random = Layout([WHOLE], n=4), np.random.default_rng(0)
    order = random.permutation(16)
    routes = layout.routes()
    shuffled = torch.from_numpy(order)[routes.pixels - layout.first] + layout.first
    (view,) = layout.template((32, 32), routes=Routes(shuffled, {})).views
    assert view.tokens.ravel().tolist() == order.tolist()
    assert view.patches is None


def test_rows_that_differ_in_number_are_left_out() -> None:
    layout = Layout([WHOLE], n=2)
    routes = layout.routes()
    routes.rows[ROWS][0][0] = NOWHERE
    (view,) = layout.template((32, 32), routes=routes).views
    assert view.patches is None
    assert view.rows is not None


def test_a_short_prompt_is_no_matter() -> None:
    """Tokens of one row or one column, and a single token, are grids too."""
    for box in ((0, 0, 32, 8), (0, 0, 8, 32)):
        wide = Layout([box], n=1).template((int(box[2]), int(box[3])))
        (view,) = wide.views
        assert (view.tokens.tolist(), view.offset) == ([[0]], (0.0, 0.0))
        assert view.scale == (2 / box[2], 2 / box[3])


# --- what is no grid -----------------------------------------------------------------------


def refused(layout: Layout, match: str, change: Callable[[Any, Places], None]) -> None:
    routes, places = layout.routes(), layout.places()
    layout.template((32, 32), routes=routes, places=places)  # fine as it is
    change(routes.pixels, places)
    with pytest.raises(GridError, match=match):
        layout.template((32, 32), routes=routes, places=places)


def test_a_hole_is_refused() -> None:
    layout = Layout([WHOLE], n=3)
    for token in range(9):

        def cut(pixels: Tensor, places: Places, token: int = token) -> None:
            pixels[pixels == layout.first + token] = NOWHERE

        refused(layout, "8 visual tokens of one scale make no grid", cut)


def test_a_padded_tile_is_refused() -> None:
    def pad(pixels: Tensor, places: Places) -> None:
        for place in places:
            place[1, -2:] = np.nan  # the last row of the second tile

    refused(Layout(TILES), "padded this image into its tiles", pad)


def test_half_a_padded_token_is_refused() -> None:
    def pad(pixels: Tensor, places: Places) -> None:
        for place in places:
            place[0, :, -1] = np.nan

    refused(Layout([WHOLE], n=4), "padded this image into its tiles", pad)


def test_what_reaches_several_is_refused() -> None:
    def mix(pixels: Tensor, places: Places) -> None:
        pixels[0, 0, 0] = SEVERAL

    refused(Layout([WHOLE]), "no place in the image", mix)


def test_pixels_that_reach_no_image_token_are_refused() -> None:
    def lose(pixels: Tensor, places: Places) -> None:
        pixels += 100

    refused(Layout([WHOLE]), "No image token of the prompt depends on a pixel", lose)


def test_tiles_that_overlap_by_half_a_cell_are_refused() -> None:
    layout = Layout([(0, 0, 16, 16), (14, 0, 30, 16)], n=4)
    with pytest.raises(GridError, match="make no grid"):
        layout.template((30, 16))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_j2_a_grid_is_held_against_what_the_processor_shows(factor: int) -> None:
    """Of 64x32 px the right 32 columns, made smaller by a factor."""

    def process(image: Image.Image) -> Tensor:
        small = image.crop((32, 0, 64, 32)).reduce(factor)
        return torch.from_numpy(array(small))[None]

    side, scale = 32 // factor, 1 / factor
    true: dict[str, Any] = {
        "image_size": (64, 32),
        "processed_size": (side, side),
        "scale": (scale, scale),
        "offset": (side * 1.0, 0.0),
    }
    assert shows_what_it_says(make_grid(2, 2, **true), process)
    for wrong in (
        {"scale": (2 * scale, scale)},
        {"scale": (scale, scale / 2)},
        {"offset": (0.0, 0.0)},
        {"offset": (side * 1.0, side * 0.5)},
    ):
        assert not shows_what_it_says(make_grid(2, 2, **{**true, **wrong}), process)
