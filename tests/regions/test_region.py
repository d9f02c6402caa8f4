import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.toy_grids import cell_of_patch, make_grid, masks_of_one_grid, regions, resized_grids
from hooked_vlm.errors import GridError, RegionError
from hooked_vlm.regions.positions import AnyOf, LastToken, PromptRow
from hooked_vlm.regions.region import Region, union_of


@given(masks_of_one_grid(3))
@settings(deadline=None, max_examples=100)
def test_set_laws(masks):
    a, b, c = regions(masks)
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert a | a == a == a & a and ~~a == a
    assert a | b == b | a and (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a - b == a & ~b
    assert len(a) + len(~a) == a.shape[0] * a.shape[1] and not a & ~a
    assert a - b <= a <= a | b
    assert a.isdisjoint(~a) and union_of([a, b, c]) == a | b | c


@given(masks_of_one_grid(1))
@settings(deadline=None, max_examples=50)
def test_mask_tokens_and_cells_say_the_same(masks):
    (region,) = regions(masks)
    assert Region.from_mask(region.mask) == region
    assert list(region.cells) == [tuple(cell) for cell in np.argwhere(region.mask)]
    assert all(cell in region for cell in region) and (99, 0) not in region
    if region:
        assert region.tokens.tolist() == np.flatnonzero(region.mask).tolist()


@given(masks_of_one_grid(1, min_cells=1), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_a_ring_is_what_lies_within_its_width(masks, width):
    (region,) = regions(masks)
    expected = []
    for row, col in ~region:
        distance = min(max(abs(row - r), abs(col - c)) for r, c in region)
        if distance <= width:
            expected.append((row, col))
    assert region.ring(width).cells == tuple(expected)


def test_a_ring_of_the_paper_s_square():
    square = Region.rectangle((12, 12), rows=(5, 7), cols=(1, 3), name="square")
    ring = square.ring()
    assert len(ring) == 12 and ring.name == "ring(square, 1)"
    assert len(square.ring(2)) == 6 * 5 - 4  # cut off at the image's left border
    with pytest.raises(RegionError, match="ring of width 0"):
        square.ring(0)


@given(resized_grids(), st.data())
@settings(deadline=None, max_examples=60)
def test_positions_and_patches_partition(grid, data):
    bits = data.draw(st.lists(st.booleans(), min_size=len(grid), max_size=len(grid)))
    a = Region.from_mask(np.array(bits).reshape(grid.shape))
    parts = [part for part in (a, ~a) if part]
    positions = torch.cat([part.positions(grid) for part in parts])
    assert sorted(positions.tolist()) == grid.positions.flatten().tolist()
    patches = torch.cat([part.patches(grid) for part in parts])
    n_patches = grid.patch_rows * grid.patch_cols
    assert sorted(patches.tolist()) == list(range(grid.n_prefix, grid.n_prefix + n_patches))
    for part in parts:
        by_cell = part.patches_by_cell(grid)
        assert by_cell.shape == (len(part), n_patches // len(grid))
        assert sorted(by_cell.flatten().tolist()) == part.patches(grid).tolist()
        for cell, patches_of_cell in zip(part, by_cell, strict=True):
            assert {cell_of_patch(grid, int(p)) for p in patches_of_cell} == {cell}


def test_patches_of_a_qwen_cell_and_of_a_llava_cell():
    qwen = make_grid(12, 12, patches=2)
    assert qwen.cells([(1, 2)]).patches(qwen).tolist() == [52, 53, 76, 77]
    llava = make_grid(24, 24, patches=1, n_prefix=1)  # a CLS token stands first
    assert llava.cells([(0, 0), (1, 0)]).patches(llava).tolist() == [1, 25]


@pytest.mark.parametrize(("tall", "wide"), [(1, 3), (3, 1), (2, 3)])
def test_j2_a_cell_is_a_block_of_patches_also_where_it_is_no_square(tall, wide):
    grid = make_grid(2, 4, patch_rows=2 * tall, patch_cols=4 * wide, n_prefix=5)
    patches = np.arange(8 * tall * wide).reshape(2 * tall, 4 * wide) + 5
    for region in (grid.all(), grid.cells([(0, 3), (1, 1)])):
        for (row, col), found in zip(region, region.patches_by_cell(grid), strict=True):
            block = patches[row * tall : (row + 1) * tall, col * wide : (col + 1) * wide]
            assert found.tolist() == block.flatten().tolist()
            assert {grid.cell_of_patch(int(patch)) for patch in found} == {(row, col)}


def test_j2_patches_that_divide_in_one_direction_alone_are_refused():
    for changed in ({"patch_rows": 9}, {"patch_cols": 9}, {"patch_rows": 2}, {"patch_cols": 2}):
        with pytest.raises(GridError, match="is not a multiple of the token grid 4x4"):
            grid = make_grid(4, 4, **changed)
            grid.all().patches(grid)


def test_names_and_printing():
    square = Region.rectangle((12, 12), rows=(5, 7), cols=(1, 3), name="square")
    strip = Region.column_band((12, 12), 0, 4, name="strip")
    assert str(square) == "square (4 of 12x12 cells: rows 5-6, columns 1-2)"
    assert (strip - square).name == "(strip - square)"
    assert repr(strip - square).startswith("Region('(strip - square)', 44 of 12x12 cells, within")
    assert str(square & ~square) == "(square & ~square) (0 of 12x12 cells)"
    assert square.named("red") == square
    assert hash(square.named("red")) == hash(square)
    assert Region((2, 3), ((1, 2), (0, 0), (0, 0))).cells == ((0, 0), (1, 2))
    assert square.shifted(cols=8).cells[0] == (5, 9)


def test_regions_that_cannot_be_are_refused():
    with pytest.raises(RegionError, match=r"'tall' has 2 of 3 cells off the grid.* \(-1, 0\)"):
        Region((2, 2), ((0, 0), (2, 0), (-1, 0)), "tall")
    with pytest.raises(RegionError, match="off the grid"):
        Region.rectangle((4, 4), (0, 2), (0, 2)).shifted(rows=3)
    with pytest.raises(RegionError, match=r"rows 2 to 2 \(half-open\)"):
        Region.row_band((4, 4), 2, 2)
    with pytest.raises(RegionError, match="0x4 cells has no cell"):
        Region((0, 4), ())
    with pytest.raises(RegionError, match=r"grid of 4x4 cells and 'b' on one of 4x5"):
        _ = Region.everything((4, 4), "a") | Region.everything((4, 5), "b")
    with pytest.raises(RegionError, match="union of no regions"):
        union_of([])


def test_an_empty_region_may_exist_but_not_be_used():
    grid = make_grid(3, 3)
    nothing = grid.all() - grid.all()
    assert not nothing and len(nothing) == 0
    for use in (nothing.positions, nothing.patches, nothing.patches_by_cell):
        with pytest.raises(RegionError, match="has no cells, so there is no"):
            use(grid)
    with pytest.raises(RegionError, match="has no cells"):
        _ = nothing.tokens
    with pytest.raises(RegionError, match="has no cells, so there is no ring around it"):
        nothing.ring()


def test_a_region_of_another_grid_and_patches_that_do_not_divide():
    region = Region.everything((4, 4), "theirs")
    with pytest.raises(RegionError, match="'theirs' is on a grid of 4x4 cells, and this image"):
        region.positions(make_grid(4, 5))
    with pytest.raises(GridError, match="patch grid 9x8 is not a multiple of the token grid 4x4"):
        region.patches(make_grid(4, 4, patch_rows=9))


def test_a_region_in_a_prompt():
    first, second = make_grid(2, 2, first=1), make_grid(2, 2, first=6)
    ids = torch.zeros(12, dtype=torch.long)
    one = PromptRow(ids, torch.ones_like(ids), grids=(first,))
    two = PromptRow(ids, torch.ones_like(ids), grids=(first, second))
    corner = Region((2, 2), ((1, 1),), "corner")
    assert corner.positions(one).tolist() == [4]
    with pytest.raises(RegionError, match=r"prompt has 2.*of_image"):
        corner.positions(two)
    assert corner.of_image(1).positions(two).tolist() == [9]
    assert corner.of_image(-2).positions(two).tolist() == [4]
    with pytest.raises(RegionError, match="not in a prompt of 2 images"):
        corner.of_image(2).positions(two)
    both = corner | LastToken() | corner
    assert isinstance(both, AnyOf) and both.positions(one).tolist() == [4, 11]
    assert (LastToken() | corner).positions(one).tolist() == [4, 11]
    assert str(both).endswith("| last token | corner (1 of 2x2 cells: rows 1-1, columns 1-1)")
    with pytest.raises(TypeError):
        _ = corner | 3
