"""Which tokens of a batch are the same, and how they lie in rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.engine.folding import Fold, FoldedFit, FoldError, same_for_shared


def batch_of(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a stream that says each token's id and place, ids and mask, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    token = (mask.cumsum(1) - 1) * mask
    return torch.stack([ids, token], dim=-1).double(), ids, mask


@st.composite
def prompts(draw: st.DrawFn) -> list[list[int]]:
    n_images = draw(st.integers(1, 3))
    found = []
    for image in range(n_images):
        front = [1, *[10 + image] * draw(st.integers(4, 9))]
        for _ in range(draw(st.integers(1, 3))):
            found.append(front + draw(st.lists(st.integers(2, 4), min_size=1, max_size=4)))
    return draw(st.permutations(found))


@settings(max_examples=60, deadline=None)
@given(prompts(), st.integers(0, 6))
def test_rows_hold_every_token_and_see_what_it_sees(asked: list[list[int]], start: int) -> None:
    hidden, ids, mask = batch_of(asked)
    fold = Fold.find(hidden, ids, mask)
    if fold is None:
        return
    start = min(start, ids.shape[1] - 1)
    layout = fold.layout(start)
    x = hidden[:, start:]
    assert torch.equal(layout.unfolded(layout.folded(x)), x)
    twice = torch.cat([x, x + 1])
    assert torch.equal(layout.unfolded(layout.folded(twice)), twice)
    keys = hidden[:, None]  # [batch, head, pos, d]
    both = torch.cat([layout.kept_keys(keys)[:, 0], layout.folded(x)], dim=1)
    shown = layout.mask(torch.ones(1, 1, *[ids.shape[1]] * 2).tril().bool(), ids.device)
    assert torch.equal(
        shown.expand(layout.n_rows, -1, -1, -1),
        layout.mask(None, ids.device).expand(layout.n_rows, -1, -1, -1),
    )
    shown = shown.expand(layout.n_rows, -1, -1, -1)[:, 0]
    for b, prompt in enumerate(asked):
        first = ids.shape[1] - len(prompt)
        for p in range(max(start, first), ids.shape[1]):
            row, column = layout.rows[b, p - start], layout.columns[b, p - start]
            seen = both[row][shown[row, column]]
            own = [token for token in seen.tolist() if token[0] or token[1]]
            assert sorted(own) == sorted(hidden[b, first : p + 1].tolist())


def test_images_that_differ_are_not_shared() -> None:
    hidden, ids, mask = batch_of([[1, 9, 9, 9, 9, 9, 2], [1, 9, 9, 9, 9, 9, 3]])
    assert Fold.find(hidden, ids, mask) is not None
    hidden[1, 1] += 1e-9  # the same ids, and another image
    assert Fold.find(hidden, ids, mask) is None


def test_padding_on_the_right_is_not_shared() -> None:
    hidden, ids, mask = batch_of([[1, 9, 9, 9, 9, 2], [1, 9, 9, 9, 9, 3]])
    mask[1, -1] = 0
    assert Fold.find(hidden, ids, mask) is None


def test_short_beginnings_do_not_pay() -> None:
    # The same words before other images, in many prompts: rows would be long, and see little.
    fronts = [[*range(1, 9), *range(20 * i, 20 * i + 12)] for i in range(1, 9)]
    assert Fold.find(*batch_of(fronts)) is None


@pytest.fixture
def fold() -> Fold:
    hidden, ids, mask = batch_of([[1, 9, 9, 9, 9, 9, 2], [1, 9, 9, 9, 9, 9, 3, 4]])
    found = Fold.find(hidden, ids, mask)
    assert found is not None
    return found


def test_what_is_shared_must_not_see_the_question(fold: Fold) -> None:
    length = fold.length
    causal = torch.ones(1, 1, length, length).tril().bool()
    padded = causal & (torch.arange(length) >= torch.from_numpy(fold.pads)[:, None, None, None])
    assert all(bool(x) for x in same_for_shared(fold, "attention_mask", padded))
    whole = padded | torch.ones_like(padded)
    assert not all(bool(x) for x in same_for_shared(fold, "attention_mask", whole))
    added = torch.where(padded, 0.0, torch.finfo(torch.float32).min)
    assert all(bool(x) for x in same_for_shared(fold, "attention_mask", added))
    added[1, 0, 3, 1] = -2.0  # another bias for a shared token in one prompt
    assert not all(bool(x) for x in same_for_shared(fold, "attention_mask", added))


def test_arguments_that_differ_between_prompts_are_noticed(fold: Fold) -> None:
    of_images = torch.randn(1, 5, 3).repeat(2, 1, 1)  # as cross-attention gets them
    assert all(bool(x) for x in same_for_shared(fold, "states", of_images))
    of_images[1, 0, 0] += 1
    assert not all(bool(x) for x in same_for_shared(fold, "states", of_images))
    positions = torch.arange(fold.length)[None] - torch.from_numpy(fold.pads)[:, None]
    assert all(bool(x) for x in same_for_shared(fold, "position_ids", positions))
    whole = torch.arange(fold.length)[None]
    assert not all(bool(x) for x in same_for_shared(fold, "position_ids", whole))


def test_arguments_are_fitted_by_token(fold: Fold) -> None:
    layout = fold.layout(2)
    fit = FoldedFit(2, fold.length, 3, 2, layout=layout)
    positions = torch.arange(fold.length)[None] - torch.from_numpy(fold.pads)[:, None]
    rotary = positions[None].expand(3, -1, -1)  # as M-RoPE has them
    fitted = fit.arguments({"position_ids": rotary, "scale": 0.5})
    assert fitted["scale"] == 0.5
    expected = positions[layout.prompts, layout.places]
    assert torch.equal(fitted["position_ids"][1], expected.repeat(3, 1))
    with pytest.raises(FoldError, match="no mask by query and key"):
        fit.arguments({"attention_mask": torch.ones(2, fold.length)})


def test_a_row_is_never_filled_with_what_others_see() -> None:
    hidden, ids, mask = batch_of([[1, 9, 9, 9, 9, 2], [1, 9, 9, 9, 9, 3], [1, 8, 8, 8, 8, 2]])
    fold = Fold.find(hidden, ids, mask)
    assert fold is not None
    layout = fold.layout(0)
    assert layout.n_rows == 2
    alone = int(np.flatnonzero(layout.prompts[:, 0] == 2)[0])
    assert (layout.seen_as[alone, :, 6:] == -1).all()
