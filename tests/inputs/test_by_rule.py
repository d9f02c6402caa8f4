import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.errors import GridError
from hooked_vlm.inputs.by_rule import ImageLayout, token_grids


IMG, SEP = 9, 7


def layout(rows: int, cols: int) -> ImageLayout:
    size = (cols * 14, rows * 14)
    return ImageLayout(rows, cols, rows, cols, size, size, (1.0, 1.0))


def ids(*runs: int) -> torch.Tensor:
    """Returns one prompt: a positive number is a run of image tokens, 0 is a text token."""
    return torch.cat([torch.full((n or 1,), IMG if n else 1) for n in runs])


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans()), max_size=3),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_image_gets_its_own_tokens(prompts, told):
    """Images of any size, with or without text between them, in prompts of any length."""
    rows, layouts = [], []
    for images in prompts:
        row = [0]
        for n_rows, n_cols, separated in images:
            row += [n_rows * n_cols] + [0] * separated
            layouts.append(layout(n_rows, n_cols))
        rows.append(ids(*row))
    width = max(map(len, rows))
    batch = torch.stack([torch.cat([torch.zeros(width - len(r)).long(), r]) for r in rows])
    counts = [len(images) for images in prompts]
    grids = token_grids(batch, IMG, layouts, counts if told else None)
    assert [grid.shape for grid in grids] == [(one.rows, one.cols) for one in layouts]
    assert [grid.image for grid in grids] == list(range(len(layouts)))
    for prompt, row in enumerate(batch):
        own = [grid for grid in grids if grid.prompt == prompt]
        assert len(own) == counts[prompt]
        used = [int(p) for grid in own for p in grid.positions.flatten()]
        assert used == (row == IMG).nonzero().flatten().tolist()


def test_row_separators_as_in_pixtral():
    row = torch.tensor([1, IMG, IMG, SEP, IMG, IMG, SEP, 1])
    (grid,) = token_grids(row[None], IMG, [layout(2, 2)])
    assert grid.positions.tolist() == [[1, 2], [4, 5]]


def test_counts_that_disagree_name_both_numbers():
    with pytest.raises(GridError, match=r"Prompt 0 has 5 image tokens .*image \(2x3\); expected 6"):
        token_grids(ids(0, 5)[None], IMG, [layout(2, 3)])
    with pytest.raises(GridError, match=r"has 7 image tokens .* 1 image \(2x3\); expected 6"):
        token_grids(ids(0, 7)[None], IMG, [layout(2, 3)])
    with pytest.raises(GridError, match=r"Prompt 1 has 0 image tokens .* \(2x3\); expected 6"):
        token_grids(torch.stack([ids(6), ids(*[0] * 6)]), IMG, [layout(2, 3)] * 2, [1, 1])
    with pytest.raises(GridError, match=r"Got 2 images .* image tokens for 1"):
        token_grids(ids(0, 6)[None], IMG, [layout(2, 3)] * 2)
    with pytest.raises(GridError, match="1 entry for 2 prompts"):
        token_grids(torch.stack([ids(6), ids(6)]), IMG, [layout(2, 3)] * 2, [2])


def test_a_grid_that_is_not_the_image_s_is_noticed_by_its_separators():
    row = torch.tensor([1, IMG, IMG, SEP, IMG, IMG, SEP, IMG, IMG])
    with pytest.raises(GridError, match="2 rows of 3 visual tokens, but row 0 is interrupted"):
        token_grids(row[None], IMG, [layout(2, 3)])


def test_j2_an_image_has_nothing_before_its_patches_unless_that_is_said():
    (grid,) = token_grids(ids(0, 6)[None], IMG, [layout(2, 3)])
    assert (grid.n_prefix, grid.offset, grid.prompt, grid.image) == (0, (0.0, 0.0), 0, 0)
    assert grid.all().patches(grid).tolist() == list(range(6))
