"""Packed order to raster order and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.errors import GridError
from hooked_vlm.hooks import patch_order
from hooked_vlm.hooks.patch_order import from_images, packed_layout, to_images


GRIDS = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)), min_size=1)


def packed_cells(grids: list[tuple[int, int, int]], merge: int) -> torch.Tensor:
    """Returns (image, frame, row, col) of each packed row, as the encoder walks through them."""
    cells = [
        (image, frame, block_row * merge + row, block_col * merge + col)
        for image, (frames, height, width) in enumerate(grids)
        for frame in range(frames)
        for block_row in range(height // merge)
        for block_col in range(width // merge)
        for row in range(merge)
        for col in range(merge)
    ]
    return torch.tensor(cells)


@given(GRIDS, st.sampled_from([1, 2, 3]))
@settings(deadline=None, max_examples=40)
def test_every_image_is_in_raster_order_and_goes_back_exactly(grids, merge):
    grids = [(frames, height * merge, width * merge) for frames, height, width in grids]
    packed = packed_cells(grids, merge)
    order = packed_layout(torch.tensor(grids), merge).patches
    images = to_images(packed, order)
    assert isinstance(images, list) == (len({f * h * w for f, h, w in grids}) > 1)
    for image, (found, (frames, height, width)) in enumerate(zip(images, grids, strict=True)):
        axes = torch.meshgrid(*map(torch.arange, (frames, height, width)), indexing="ij")
        raster = torch.stack(axes, dim=-1).view(-1, 3)
        assert torch.equal(found[:, 1:], raster)
        assert (found[:, 0] == image).all()
    assert torch.equal(from_images(images, order), packed)


def test_merged_tokens_follow_each_other():
    layout = packed_layout(torch.tensor([[1, 4, 4], [1, 2, 6]]), 2)
    assert [rows.tolist() for rows in layout.tokens.rows] == [[0, 1, 2, 3], [4, 5, 6]]
    assert layout.tokens.total == 7
    assert layout.patches.total == 28


def test_a_grid_that_does_not_merge():
    with pytest.raises(GridError, match="3x4 patches cannot be merged in squares of 2x2"):
        packed_layout(torch.tensor([[1, 3, 4]]), 2)


def test_a_layout_of_other_rows():
    with pytest.raises(GridError, match="packed 7 rows where its grid_thw makes 4"):
        to_images(torch.zeros(7, 3), packed_layout(torch.tensor([[1, 2, 2]]), 2).patches)


@pytest.mark.parametrize(
    ("rows", "sides"),
    # 4 and 9 rows for each place: merged blocks of 2x2 and 3x3 patches.
    [(12, 1), (48, 2), (108, 3), (49, 1), (24, 1), (6, 1), (52, 1)],
)
def test_j2_a_grid_of_merged_blocks_is_told_by_the_number_of_patches(rows: int, sides: int):
    grid = torch.tensor([[1, 2, 3], [1, 1, 6]])
    expected = grid * torch.tensor([1, sides, sides])
    assert torch.equal(patch_order._in_patches(grid, torch.zeros(rows, 4)), expected)
    assert torch.equal(patch_order._in_patches(grid, None), grid)


def test_j2_a_few_more_rows_are_class_tokens_before_each_image():
    layout = packed_layout(torch.tensor([[1, 2, 2], [1, 2, 4]]), 2)
    first, second = layout.order("blocks", 12 + 2 * 3).rows
    assert first.tolist() == [0, 1, 2, *(layout.blocks.rows[0] + 3).tolist()]
    assert second.tolist() == [7, 8, 9, *(layout.blocks.rows[1] + 6).tolist()]
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(18))
    # Three more rows for two images are none, and neither are seventeen for each.
    for rows in (12 + 3, 12 + 2 * 17):
        assert layout.order("blocks", rows) is layout.blocks


def test_j2_the_number_of_rows_tells_patches_from_tokens_and_merged_from_single_ones():
    layout = packed_layout(torch.tensor([[1, 2, 2], [1, 2, 4]]), 2)
    assert layout.order("features", 12) is layout.blocks
    assert layout.order("features", 3) is layout.order("tokens", 3) is layout.tokens
    assert [rows.tolist() for rows in layout.order("outside", 6).rows] == [[0, 1], [2, 3, 4, 5]]
    assert layout.order("outside", 12) is layout.patches
    # Four times as many rows: the grid counted squares of 2x2 patches.
    finer = packed_layout(torch.tensor([[1, 4, 4], [1, 4, 8]]), 2)
    found = layout.order("blocks", 48)
    assert all(map(torch.equal, found.rows, finer.blocks.rows)) and found.total == 48


def test_j2_images_of_other_sizes_are_cut_out_of_their_padding_and_put_back():
    layout = packed_layout(torch.tensor([[1, 2, 3], [1, 4, 1]]), 1)
    raw = torch.arange(2 * 5 * 4 * 3).float().reshape(2, 5, 4, 3)
    shown = patch_order.cropped(raw, layout)
    assert torch.equal(shown[0], raw[0, :, :2, :3].flatten(1).T)
    assert torch.equal(shown[1], raw[1, :, :4, :1].flatten(1).T)
    back = patch_order.uncropped([-image for image in shown], raw, layout)
    expected = raw.clone()
    expected[0, :, :2, :3] *= -1
    expected[1, :, :4, :1] *= -1
    assert torch.equal(back, expected) and raw.min() == 0


def test_j2_windows_move_whole_squares_of_one_image():
    grid, windows = torch.tensor([[1, 4, 6]]), torch.tensor([3, 0, 5, 1, 4, 2])
    layout = packed_layout(grid, 2, windows)
    (plain,), (inside,) = packed_layout(grid, 2).patches.rows, layout.blocks.rows
    squares = {int(block): place for place, block in enumerate(windows.tolist())}
    for before, after in zip(plain.tolist(), inside.tolist(), strict=True):
        assert after == squares[before // 4] * 4 + before % 4
    assert layout.tokens.rows[0].tolist() == [squares[block] for block in range(6)]
    assert torch.equal(layout.patches.rows[0], plain)


@pytest.mark.parametrize("rows", [3, 5, 7])
def test_j2_rows_that_are_no_share_of_the_patches_are_one_images_tokens(rows: int):
    """With separators, say; of several images nobody knows whose they are."""
    one = packed_layout(torch.tensor([[1, 2, 2]]), 2)
    assert [image.tolist() for image in one._raster(rows).rows] == [list(range(rows))]
    two = packed_layout(torch.tensor([[1, 2, 2], [1, 2, 2]]), 2)
    assert two._raster(rows) is two.tokens
