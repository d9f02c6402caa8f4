"""Maps of weights over an image, and rollout."""

import numpy as np
import pytest
import torch

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.analysis.attention import attention_rollout, image_map, patch_map
from hooked_vlm.errors import DataError, GridError


def test_rollout_is_the_product_of_mixed_layers() -> None:
    random = torch.Generator().manual_seed(0)
    patterns = [
        torch.randn(2, 3, 5, 5, generator=random)
        .masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
        .softmax(-1)
        for _ in range(4)
    ]
    found = attention_rollout(patterns, residual=0.3)
    assert found.shape == (4, 2, 5, 5)
    for b in range(2):
        whole = np.eye(5)
        for layer, pattern in enumerate(patterns):
            mean = pattern[b].double().numpy().mean(0)
            mixed = 0.7 * mean + 0.3 * np.eye(5)
            whole = (mixed / mixed.sum(1, keepdims=True)) @ whole
            np.testing.assert_allclose(found[layer, b], whole, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 2, 5))
    one = attention_rollout([x[0] for x in patterns], residual=0.3)
    torch.testing.assert_close(one, found[:, 0])


def test_rollout_normalises_rows_of_sinks() -> None:
    half = torch.full((1, 1, 2, 2), 0.25)  # a sink has the other half
    torch.testing.assert_close(attention_rollout([half]).sum(-1), torch.ones(1, 1, 2))


def test_what_rollout_refuses() -> None:
    square, step = torch.ones(1, 2, 4, 4), torch.ones(1, 2, 1, 4)
    for wrong in ([square, torch.ones(1, 2, 5, 5)], [step], []):
        with pytest.raises(DataError):
            attention_rollout(wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_has_the_weight_of_each_cell(family: str) -> None:
    inputs = make_inputs(family, batch=1, images=2)
    grids = tiny(family).grids(inputs)[0]
    length = inputs["input_ids"].shape[1]
    weights = torch.arange(2.0 * length).reshape(2, length)
    for grid in grids:
        found = image_map(weights, grid)
        assert found.shape == (2, *grid.shape)
        for row, col in ((0, 0), (0, 1), (grid.rows - 1, grid.cols - 1)):
            assert torch.equal(found[:, row, col], weights[:, grid.positions[row, col]])


def test_keys_before_a_sliding_window_are_zero() -> None:
    grid = tiny("llava").grids(make_inputs("llava"))[0][0]
    start = int(grid.positions[2, 3])
    found = image_map(torch.ones(60 - start), grid, first_key=start)
    assert torch.equal(found.flatten(), (torch.arange(36) >= 2 * 6 + 3).float())
    with pytest.raises(GridError, match="last visual token"):
        image_map(torch.ones(5), grid)


def test_a_map_of_patches_leaves_class_tokens_out() -> None:
    grid = tiny("llava").grids(make_inputs("llava"))[0][0]
    found = patch_map(torch.arange(37.0), grid)
    assert torch.equal(found, torch.arange(1.0, 37).reshape(6, 6))
    with pytest.raises(GridError, match=r"1 \+ 6x6"):
        patch_map(torch.ones(36), grid)
