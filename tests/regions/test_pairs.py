import warnings

import pytest
import torch
from hypothesis import assume, given, settings

from helpers.toy_grids import make_grid, masks_of_one_grid, regions
from hooked_vlm.errors import HookedVLMWarning, RegionError
from hooked_vlm.regions.pairs import CellPairs, pair_cells, swap_pairs
from hooked_vlm.regions.region import Region


GEMMA, QWEN = (16, 16), (12, 12)
GEMMA_STRIPS = Region.column_band(GEMMA, 0, 5, "left"), Region.column_band(GEMMA, 11, 16, "right")
GEMMA_SQUARES = (
    Region.rectangle(GEMMA, rows=(6, 9), cols=(0, 3), name="left square"),
    Region.rectangle(GEMMA, rows=(6, 9), cols=(12, 15), name="right square"),
)


def test_gemma_s_published_strips_put_objects_one_column_off_and_say_so():
    with pytest.warns(
        HookedVLMWarning, match=r"maps 6 of 9 object cells.*\(6, 0\) is paired with \(6, 11\)"
    ):
        pairs = pair_cells(*GEMMA_STRIPS, objects=GEMMA_SQUARES)
    met = dict(zip(pairs.targets, pairs.sources, strict=True))
    assert met[0, 0] == (0, 11) and met[0, 1] == (0, 12) and len(pairs) == 80


def test_gemma_s_aligned_strips_put_object_on_object():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = pair_cells(*GEMMA_STRIPS, "aligned", GEMMA_SQUARES)
    met = dict(zip(pairs.targets, pairs.sources, strict=True))
    assert pairs.target == Region.column_band(GEMMA, 0, 4)
    assert pairs.source == Region.column_band(GEMMA, 12, 16)
    assert {met[cell] for cell in GEMMA_SQUARES[0]} == set(GEMMA_SQUARES[1])


def test_qwen_s_strips_are_the_same_either_way():
    strips = Region.column_band(QWEN, 0, 4), Region.column_band(QWEN, 8, 12)
    square = Region.rectangle(QWEN, rows=(5, 7), cols=(1, 3))
    objects = square, square.shifted(cols=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published = swap_pairs(*strips, objects=objects)
        assert published == swap_pairs(*strips, pairing="aligned", objects=objects)
    assert len(published) == 96


def test_unequal_strips_are_refused_and_can_be_aligned():
    """What'sUp "table" on Gemma: 96 against 64 tokens (protocol 2.1, 2.7)."""
    strips = (
        Region.column_band(GEMMA, 0, 6, "left strip"),
        Region.column_band(GEMMA, 12, 16, "right strip"),
    )
    table = Region.rectangle(GEMMA, rows=(10, 15), cols=(2, 4))
    objects = table, table.shifted(cols=10)
    with pytest.raises(RegionError, match="'left strip' has 96 cells and 'right strip' has 64"):
        swap_pairs(*strips, objects=objects)
    pairs = pair_cells(*strips, "aligned", objects)
    assert pairs.target == Region.column_band(GEMMA, 2, 6) and len(pairs) == 64


@given(masks_of_one_grid(2, min_cells=1))
@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore:.*same shape:hooked_vlm.errors.HookedVLMWarning")
def test_a_swap_is_its_own_inverse(masks):
    a, b = regions(masks)
    b = b - a
    assume(b)
    size = min(len(a), len(b))
    a, b = Region(a.shape, a.cells[:size]), Region(b.shape, b.cells[:size])
    pairs = swap_pairs(a, b)
    assert pairs.target == a | b == pairs.source
    target, source = pairs.tokens()
    h = torch.randn(1, a.shape[0] * a.shape[1], 3)
    swapped = h.clone()
    swapped[:, target] = h[:, source]
    again = swapped.clone()
    again[:, target] = swapped[:, source]
    assert torch.equal(again, h)
    assert torch.equal(swapped[:, a.tokens], h[:, b.tokens])
    met = dict(zip(pairs.targets, pairs.sources, strict=True))
    assert all(met[met[cell]] == cell for cell in met)
    assert set(zip(pairs.sources, pairs.targets, strict=True)) == set(met.items())


def test_positions_and_patches_keep_the_pairs_in_step():
    target_grid, source_grid = make_grid(4, 4, first=2), make_grid(4, 4, first=30, gap=1)
    pairs = swap_pairs(Region((4, 4), ((0, 0), (1, 1))), Region((4, 4), ((0, 1), (1, 2))))
    target, source = pairs.positions(target_grid, source_grid)
    for t, s, cell, other in zip(target, source, pairs.targets, pairs.sources, strict=True):
        assert target_grid.positions[cell] == t
        assert source_grid.positions[other] == s
    target, source = pairs.patches(target_grid)
    assert len(target) == 4 * len(pairs)
    # Each patch is written from the same corner of the other cell: one cell to the right.
    assert (source[:8] - target[:8]).tolist() == [2] * 8
    assert pairs.positions(target_grid)[1].tolist() == [3, 8, 2, 7]
    with pytest.raises(RegionError, match="4x4 cells, and this image has 5x4"):
        pairs.positions(make_grid(5, 4))


def test_regions_of_other_shapes_warn_and_bad_pairs_are_refused():
    row, column = Region.row_band(QWEN, 0, 1, "row"), Region.column_band(QWEN, 3, 4, "column")
    with pytest.warns(HookedVLMWarning, match="'row' and 'column' do not have the same shape"):
        pair_cells(row, column)
    with pytest.raises(RegionError, match="share 1 cell, which a swap would write twice"):
        swap_pairs(row, column)
    with pytest.raises(RegionError, match=r"No pairing 'publishd'.*Did you mean 'published'"):
        pair_cells(row, row.shifted(rows=1), "publishd")
    with pytest.raises(RegionError, match="aligned pairing moves one object onto the other"):
        pair_cells(row, row.shifted(rows=1), "aligned")
    with pytest.raises(RegionError, match=r"not inside .*: 1 of its cells are outside"):
        pair_cells(
            row, row.shifted(rows=1), objects=(Region(QWEN, ((5, 5),)), Region(QWEN, ((1, 0),)))
        )
    with pytest.raises(RegionError, match="neither can be moved onto the other"):
        objects = Region(QWEN, ((0, 0),)), Region(QWEN, ((1, 0), (1, 1)))
        pair_cells(row, row.shifted(rows=1), "aligned", objects)
    with pytest.raises(RegionError, match="no cell to pair"):
        pair_cells(row - row, row)
    with pytest.raises(RegionError, match="Combine regions of one grid"):
        pair_cells(row, Region.row_band(GEMMA, 0, 1))
    with pytest.raises(RegionError, match="written twice"):
        CellPairs((2, 2), ((0, 0), (0, 0)), ((0, 1), (1, 1)))
    with pytest.raises(RegionError, match="Cannot write 1 cell from 2"):
        CellPairs((2, 2), ((0, 0),), ((0, 1), (1, 1)))
