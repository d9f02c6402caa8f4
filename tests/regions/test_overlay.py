import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from helpers.toy_grids import make_grid, resized_grids
from hooked_vlm.errors import GridError, RegionError
from hooked_vlm.regions import overlay
from hooked_vlm.regions.overlay import draw_regions
from hooked_vlm.regions.region import Region


def drawn(grid, regions, **options) -> np.ndarray:
    image = Image.new("RGB", grid.image_size, "white")
    return np.asarray(draw_regions(image, grid, regions, labels=False, opacity=1.0, **options))


@given(resized_grids())
@settings(deadline=None, max_examples=40)
def test_each_pixel_is_coloured_by_the_cell_that_its_centre_lies_in(grid):
    even = Region.from_mask(np.indices(grid.shape).sum(0) % 2 == 0, "even")
    picture = drawn(grid, even)
    assert picture.shape == (grid.image_size[1], grid.image_size[0], 3)
    blue = (picture == (0, 0x72, 0xB2)).all(-1)
    x0, y0, x1, y1 = grid.visible_box
    width, height = grid.image_size
    for y in np.linspace(0, height - 1, 7).astype(int):
        for x in np.linspace(0, width - 1, 7).astype(int):
            center = (float(x) + 0.5, float(y) + 0.5)
            seen = x0 <= center[0] < x1 and y0 <= center[1] < y1
            assert blue[y, x] == (seen and grid.at(*center) in even)


def test_the_region_fills_its_box_to_the_pixel():
    grid = make_grid(4, 4, cell_px=10)
    blue = (drawn(grid, grid.box(10, 20, 30, 30)) == (0, 0x72, 0xB2)).all(-1)
    expected = np.zeros((40, 40), dtype=bool)
    expected[20:30, 10:30] = True
    assert (blue == expected).all()
    zoomed = (drawn(grid, grid.box(10, 20, 30, 30), zoom=3) == (0, 0x72, 0xB2)).all(-1)
    assert (zoomed == expected.repeat(3, 0).repeat(3, 1)).all()


def test_opacity_mixes_and_the_image_given_is_left_alone():
    grid = make_grid(2, 2, cell_px=20)
    image = Image.new("RGB", (40, 40), (200, 100, 0))
    picture = draw_regions(image, grid, grid.cells([(1, 1)]), opacity=0.5)
    assert picture.getpixel((30, 30)) == (100, 107, 89)  # halfway to (0, 114, 178)
    assert picture.getpixel((5, 5)) == (200, 100, 0)
    assert image.getpixel((30, 30)) == (200, 100, 0)
    clear = draw_regions(np.asarray(image), grid, grid.all(), opacity=0.0, labels=False)
    assert clear.getpixel((5, 5)) == (200, 100, 0) and clear.size == (40, 40)


def test_the_legend_stands_below_and_names_every_region():
    grid = make_grid()
    image = Image.new("RGB", grid.image_size, "white")
    strips = [grid.strip("vertical", 0, 4), grid.strip("vertical", 8, 12)]
    short = draw_regions(image, grid, strips[:1])
    long = draw_regions(
        image, grid, {f"a region with a long name {i}": strips[0] for i in range(4)}
    )
    assert short.size[0] == 336 < short.size[1] < long.size[1]
    assert (np.asarray(short)[345:] != 255).any()
    assert draw_regions(image, grid, []).size == (336, 336)
    # Two regions of one name stay two: both colours are in the picture.
    both = np.asarray(draw_regions(image, grid, strips, opacity=1.0, labels=False))
    assert len(np.unique(both.reshape(-1, 3), axis=0)) >= 4


def test_wrong_input_is_named():
    grid = make_grid(2, 2, cell_px=20)
    image = Image.new("RGB", (40, 40))
    with pytest.raises(
        GridError, match="image is 41x40 px, and the grid was made for one of 40x40"
    ):
        draw_regions(Image.new("RGB", (41, 40)), grid, grid.all())
    with pytest.raises(RegionError, match="no cell to draw"):
        draw_regions(image, grid, grid.all() - grid.all())
    with pytest.raises(RegionError, match="Combine regions of one grid"):
        draw_regions(image, grid, Region.everything((3, 3)))
    with pytest.raises(RegionError, match=r"opacity=1\.5"):
        draw_regions(image, grid, grid.all(), opacity=1.5)


def test_j2_what_no_cell_shows_is_greyed_and_cells_begin_with_a_line():
    # 40x20 px, of which the cells show the middle 20x20: two of 10x20 px each.
    grid = make_grid(1, 2, image_size=(40, 20), processed_size=(20, 20), offset=(10.0, 0.0))
    image = Image.new("RGB", (40, 20), (200, 100, 0))
    picture = np.asarray(draw_regions(image, grid, [], labels=False)).astype(float)
    given = np.array([200, 100, 0])
    cropped, line = 0.35 * given + 0.65 * 96, 0.5 * given + 0.5 * 128
    assert np.abs(picture[5, :10] - cropped).max() <= 0.5
    assert np.abs(picture[5, 30:] - cropped).max() <= 0.5
    assert np.abs(picture[:, [10, 20]] - line).max() <= 0.5
    assert np.abs(picture[0, 10:30] - line).max() <= 0.5
    assert (picture[1:, 11:20] == given).all() and (picture[1:, 21:30] == given).all()


def test_j2_an_outline_is_in_full_colour_inside_the_region():
    grid = make_grid(3, 3, cell_px=10)
    image = Image.new("RGB", (30, 30), (200, 100, 0))
    picture = np.asarray(draw_regions(image, grid, grid.cells([(1, 1)]), labels=False))
    full = (picture == (0, 0x72, 0xB2)).all(-1)
    expected = np.zeros((30, 30), dtype=bool)
    expected[10:20, 10:20] = True
    expected[11:19, 11:19] = False
    assert (full == expected).all()


def test_j2_regions_of_one_name_are_numbered_from_2_on() -> None:
    region = Region.column_band((4, 4), 0, 1)
    name = region.name
    assert list(overlay._named([region] * 3)) == [name, f"{name} (2)", f"{name} (3)"]


def test_j2_the_legend_ends_two_gaps_behind_its_longest_entry() -> None:
    region = Region.column_band((4, 4), 0, 1)
    legend = overlay._with_legend(Image.new("RGB", (8, 8), "white"), {"a region": region})
    dark = np.flatnonzero((np.asarray(legend) < 255).any(axis=(0, 2)))
    gap = 6
    assert dark[0] == gap and abs(legend.width - 1 - dark[-1] - 2 * gap) <= 2
