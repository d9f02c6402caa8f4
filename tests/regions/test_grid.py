import itertools
import re
import warnings
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.toy_grids import cell_of_patch, make_grid, resized_grids, visible_cells
from hooked_vlm.errors import GridError, HookedVLMWarning, RegionError
from hooked_vlm.regions.grid import warn_if_resized
from hooked_vlm.regions.region import Region


# An image of 640x400 px as CLIP's processor treats it: shortest edge to 336, centre cut out.
CROPPED = {
    "image_size": (640, 400),
    "processed_size": (336, 336),
    "scale": (537 / 640, 336 / 400),
    "offset": (100.0, 0.0),
}


def test_describe_is_one_line_with_the_paper_s_numbers():
    assert str(make_grid()) == "12x12 visual tokens of 28x28 px, 24x24 patches, image 336x336"
    resized = make_grid(**CROPPED)
    assert str(resized) == (
        "12x12 visual tokens of 33.37x33.33 px, 24x24 patches, image 640x400, seen as 336x336 px"
    )


@pytest.mark.parametrize(
    ("rows", "cell_px", "gap", "cell", "position"),
    [(12, 28, 0, (5, 1), 4 + 61), (16, 56, 0, (6, 12), 4 + 108), (15, 16, 1, (6, 2), 4 + 98)],
    ids=["qwen2-vl", "gemma-3", "pixtral"],
)
def test_object_positions_of_the_paper(rows, cell_px, gap, cell, position):
    """paper, section 4: LM position = first + r N + c, and first + r (N + 1) + c for Pixtral."""
    grid = make_grid(rows, rows, cell_px, gap=gap)
    row, col = cell
    square = (col * cell_px, row * cell_px, (col + 1) * cell_px, (row + 1) * cell_px)
    assert grid.box(*square).positions(grid).tolist() == [position]
    assert grid.at(square[0], square[1]) == cell
    assert grid.positions[cell] == position


def test_coverage_rules_differ_on_partly_covered_cells():
    grid = make_grid(4, 4, cell_px=10)
    box = (4.0, 0.0, 16.0, 8.0)  # 60 % of two cells wide, 80 % of one high: 48 % of each
    assert grid.box(*box, rule="any").cells == ((0, 0), (0, 1))
    assert grid.box(*box, rule=0.48).cells == ((0, 0), (0, 1))
    assert grid.box(*box, rule="center").cells == ((0, 0), (0, 1))
    assert grid.box(0, 0, 14, 10, rule="center").cells == ((0, 0),)
    with pytest.raises(RegionError, match=r"covers no cell by rule 0.5.* most .* 48% of cell"):
        grid.box(*box, rule=0.5)
    with pytest.raises(RegionError, match=r"'knob' covers no cell by rule 'center': .* 4% of cell"):
        grid.box(0, 0, 2, 2, rule="center", name="knob")


@given(resized_grids(), st.data())
@settings(deadline=None, max_examples=80)
def test_a_cell_s_box_covers_that_cell_alone(grid, data):
    cells = visible_cells(grid)
    assume(cells)
    cell = data.draw(st.sampled_from(cells))
    for rule in ("any", "center", 1.0, 0.5):
        assert grid.box(*grid.cell_box(cell), rule=rule).cells == (cell,)


@given(resized_grids(), st.data())
@settings(deadline=None, max_examples=80)
def test_pixel_cell_position_and_back(grid, data):
    width, height = grid.image_size
    x = data.draw(st.integers(0, width - 1)) + 0.5
    y = data.draw(st.integers(0, height - 1)) + 0.5
    x0, y0, x1, y1 = grid.visible_box
    if not (x0 <= x < x1 and y0 <= y < y1):
        with pytest.raises(RegionError, match="cropped away"):
            grid.at(x, y)
        return
    cell = grid.at(x, y)
    box = grid.cell_box(cell)
    assert box[0] <= x < box[2] and box[1] <= y < box[3]
    region = grid.cells([cell])
    assert region.positions(grid).tolist() == [grid.positions[cell]]
    assert {cell_of_patch(grid, int(p)) for p in region.patches(grid)} == {cell}


@given(resized_grids(), st.data())
@settings(deadline=None, max_examples=80)
def test_coverage_grows_with_the_box_and_shrinks_with_the_fraction(grid, data):
    width, height = grid.image_size
    x0, x1 = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
    y0, y1 = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
    assume(x0 < x1 and y0 < y1)

    def cells(box, rule):
        try:
            return set(grid.box(*box, rule=rule).cells)
        except RegionError:
            return set()

    small, large = (x0, y0, x1, y1), (max(x0 - 3, 0), max(y0 - 2, 0), x1, y1)
    assert cells(small, 1.0) <= cells(small, 0.5) <= cells(small, 0.1) <= cells(small, "any")
    assert cells(small, "center") <= cells(small, "any")
    for rule in ("any", "center", 0.5):
        assert cells(small, rule) <= cells(large, rule)
    # Every cell found overlaps the box, and every visible cell that does is found.
    overlapping = set()
    for cell in visible_cells(grid):
        a0, b0, a1, b1 = grid.cell_box(cell)
        if min(a1, x1) - max(a0, x0) > 1e-3 and min(b1, y1) - max(b0, y0) > 1e-3:
            overlapping.add(cell)
    assert overlapping <= cells(small, "any")


@given(resized_grids(), st.data())
@settings(deadline=None, max_examples=60)
def test_a_mask_of_a_box_covers_what_the_box_covers(grid, data):
    width, height = grid.image_size
    x0, x1 = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
    y0, y1 = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
    assume(x0 < x1 and y0 < y1)
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    rule = data.draw(st.sampled_from(["any", 0.3, 0.9]))
    try:
        expected = grid.box(x0, y0, x1, y1, rule=rule)
    except RegionError:
        with pytest.raises(RegionError):
            grid.mask(mask, rule)
        return
    assert grid.mask(mask, rule) == expected == grid.mask(torch.from_numpy(mask), rule)


def test_mask_of_a_diagonal_is_no_box():
    grid = make_grid(2, 2, cell_px=4)
    region = grid.mask(np.eye(8, dtype=bool))
    assert region.cells == ((0, 0), (1, 1))
    with pytest.raises(RegionError, match="most it covers is 25%"):
        grid.mask(np.eye(8, dtype=bool), 0.3)


def test_strips_background_and_all():
    grid = make_grid(3, 4)
    left = grid.strip("vertical", 0, 1)
    top = grid.strip("horizontal", 0, 1, name="top")
    assert left.cells == ((0, 0), (1, 0), (2, 0))
    assert top.cells == ((0, 0), (0, 1), (0, 2), (0, 3)) and top.name == "top"
    assert len(grid.background(left, top)) == 6 == len(grid.all() - left - top)
    assert grid.background() == grid.all() and len(grid.all()) == len(grid) == 12
    with pytest.raises(RegionError, match=r"not 'vertica'\. Did you mean 'vertical'\?"):
        grid.strip("vertica", 0, 1)
    with pytest.raises(RegionError, match=r"columns 3 to 5 \(half-open\), and the grid has 4"):
        grid.strip("vertical", 3, 5)


@pytest.mark.parametrize("box", [(0, 0, 337, 10), (-1, 0, 5, 5), (10, 10, 10, 20), (9, 9, 3, 20)])
def test_a_box_outside_the_image_or_empty_is_refused(box):
    with pytest.raises(RegionError, match=r"empty or reaches outside the image of 336x336 px"):
        make_grid().box(*box)


@pytest.mark.parametrize("side", [300, 480, 640, 799])
def test_a_pixel_at_a_cell_s_edge_belongs_to_one_cell_for_sure(side):
    """336 / 300 * 25 is 27.999…: rounding must neither add a sliver of a cell nor move a point."""
    grid = make_grid(image_size=(side, side), scale=(336 / side, 336 / side))
    assert grid.shows_everything and grid.is_resized
    for k in range(1, 12):
        edge = Fraction(side, 12) * k
        if edge.denominator == 1:
            edge = int(edge)
            assert grid.at(edge, 0) == (0, k) and grid.at(edge - 1, 0) == (0, k - 1)
            assert grid.box(0, 0, edge, edge).cells == tuple(
                (row, col) for row in range(k) for col in range(k)
            )
            assert grid.box(edge, edge, side, side).cells[0] == (k, k)


def test_what_was_cropped_away_is_on_no_cell():
    grid = make_grid(**CROPPED)
    left = 100 / (537 / 640)
    assert grid.visible_box == pytest.approx((left, 0, left + 336 / (537 / 640), 400))
    with pytest.raises(RegionError, match=r"covers no cell\. The cells show x 119.*cropped away"):
        grid.box(0, 0, 100, 100)
    with pytest.raises(RegionError, match=r"\(10, 10\) was cropped away"):
        grid.at(10, 10)
    with pytest.raises(RegionError, match=r"\(700, 10\) is outside the image of 640x400 px"):
        grid.at(700, 10)
    assert grid.box(0, 0, 130, 400).cells == tuple((r, 0) for r in range(12))


def test_a_cell_of_padding_has_no_box_and_is_never_covered():
    # 100x200 px padded to a square of 200 px: the image fills the middle half of the columns.
    grid = make_grid(
        4,
        8,
        image_size=(100, 200),
        processed_size=(200, 200),
        offset=(-50.0, 0.0),
    )
    with pytest.raises(GridError, match=r"Cell \(0, 0\) shows only padding"):
        grid.cell_box((0, 0))
    assert grid.cell_box((0, 2)) == (0, 0, 25, 50)
    assert grid.box(0, 0, 100, 200, rule=1.0) == Region.column_band((4, 8), 2, 6)
    assert grid.at(0, 0) == (0, 2) and grid.at(99.9, 199) == (3, 5)


def test_wrong_input_is_named():
    grid = make_grid(3, 4)
    with pytest.raises(RegionError, match=r"1 of 1 cell off the grid, the first at \(3, 0\)"):
        grid.cell_box((3, 0))
    with pytest.raises(RegionError, match=r"rule 'centre'.*Did you mean 'center'"):
        grid.box(0, 0, 5, 5, rule="centre")
    with pytest.raises(RegionError, match=r"rule 0.0 is not a fraction"):
        grid.box(0, 0, 5, 5, rule=0.0)
    with pytest.raises(GridError, match=r"bool of shape \(84, 112\) \(height, width\)"):
        grid.mask(np.ones((112, 84), dtype=bool))
    with pytest.raises(GridError, match=r"mask is uint8 of shape"):
        grid.mask(np.ones((84, 112), dtype=np.uint8))
    with pytest.raises(GridError, match="Encoder token 48 is no patch: patches are 0 to 47"):
        grid.cell_of_patch(48)
    with pytest.raises(GridError, match=r"Position 3 holds no visual token.* between 4 and 15"):
        grid.cell_of_position(3)
    with pytest.raises(GridError, match="do not ascend in raster order"):
        make_grid(3, 4, positions=torch.arange(12).reshape(4, 3).T)
    with pytest.raises(GridError, match="must be positive"):
        make_grid(3, 4, scale=(0.0, 1.0))


def test_a_resized_image_warns_once_per_size():
    grids = [make_grid(**CROPPED), make_grid(**CROPPED), make_grid()]
    with pytest.warns(HookedVLMWarning) as caught:
        warn_if_resized(grids)
    assert len(caught) == 1
    text = str(caught[0].message)
    for part in ("336x336 px", "640x400 px", "33.37x33.33 px of your image", "cropped"):
        assert re.search(part, text)


def test_an_image_that_was_not_resized_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_resized([make_grid(), make_grid(5, 3)])


def test_a_region_takes_anything_that_looks_like_a_grid():
    plain: Any = SimpleNamespace(
        rows=2,
        cols=2,
        patch_rows=2,
        patch_cols=2,
        n_prefix=1,
        patches=None,
        positions=torch.arange(4).view(2, 2),
    )
    assert Region((2, 2), ((1, 0),)).patches(plain).tolist() == [3]


def test_j2_a_cell_s_size_is_in_pixels_of_the_given_image():
    grid = make_grid(
        3, 4, image_size=(200, 90), processed_size=(100, 180), scale=(0.5, 2.0), offset=(0.0, 0.0)
    )
    assert grid.cell_size == (50, 30)
    assert grid.cell_box((2, 1)) == (50, 60, 100, 90)
    assert grid.shows_everything and grid.is_resized
    assert str(grid) == (
        "3x4 visual tokens of 50x30 px, 6x8 patches, image 200x90, seen as 100x180 px"
    )


def test_j2_the_cell_of_a_measured_patch() -> None:
    """Cells in columns instead of rows, after one class token."""
    tokens = torch.arange(6).reshape(3, 2).T + 1
    rows = torch.stack([0 * tokens, tokens], -1)[:, :, None]
    grid = replace(make_grid(2, 3, patches=1), patches=rows)
    for row, col in itertools.product(range(2), range(3)):
        assert grid.cell_of_patch(int(tokens[row, col])) == (row, col)
    tiles = torch.stack([tokens % 2, tokens], -1)[:, :, None]
    for patches, patch in ((tiles, 1), (rows, 9)):
        with pytest.raises(GridError, match="belongs to 0 cells"):
            replace(grid, patches=patches).cell_of_patch(patch)


def test_j2_the_projectors_rows_of_a_measured_grid_are_those_of_its_cells() -> None:
    assert make_grid(2, 3).projected_tokens().tolist() == [0, 1, 2, 3, 4, 5]
    rows = torch.tensor([[[[0, 5]], [[0, 3]]], [[[0, 1]], [[0, 4]]]])
    assert make_grid(2, 2, projected=rows).projected_tokens().tolist() == [5, 3, 1, 4]
    for other in (rows + torch.tensor([1, 0]), rows.repeat(1, 1, 2, 1)):
        with pytest.raises(GridError, match="not one for each cell"):
            make_grid(2, 2, projected=other).projected_tokens()
