"""A block's arguments fitted to rows: masks, and where rows may begin."""

import torch

from helpers.growing_sweeps import compared
from helpers.tiny_models import make_inputs, tiny
from hooked_vlm.engine.arguments import causal_mask, is_closed, mask_of
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep


def test_a_prefix_is_clean_only_where_nothing_looks_ahead() -> None:
    causal = causal_mask(0, 5, torch.device("cpu"))
    assert causal[0, 0].tolist() == torch.ones(5, 5).tril().bool().tolist()
    assert causal_mask(3, 5, torch.device("cpu")).shape == (1, 1, 2, 5)
    assert all(is_closed(causal, start) for start in range(5))
    block = causal.clone()
    block[..., 1:4, 1:4] = True  # an image block that sees all of itself, as in Gemma 3
    assert [is_closed(block, start) for start in range(5)] == [True, True, False, False, True]
    additive = torch.where(block, 0.0, torch.finfo(torch.float32).min)
    assert [is_closed(additive, start) for start in range(5)] == [True, True, False, False, True]
    assert is_closed(None, 3)


def test_rows_of_an_image_block_that_sees_itself_begin_in_front_of_it() -> None:
    """In Gemma 3 image tokens before a patched one see it: their keys change."""
    model, inputs = tiny("gemma-3"), make_inputs("gemma-3", 2, seed=1)
    inputs["token_type_ids"] = (inputs["input_ids"] == 299).long()
    source = make_inputs("gemma-3", 2, seed=2) | {"token_type_ids": inputs["token_type_ids"]}
    last_column = Region.column_band((3, 3), 2, 3)
    sweep = Sweep(
        inputs, {"slot": [0, 1, 2]}, lambda slot: Patch(slot, at=last_column, source=source)
    )
    compared(model, sweep)


def test_j2_a_mask_is_found_by_its_name_or_by_its_shape() -> None:
    square, by_prompt = torch.zeros(2, 1, 5, 5), torch.ones(2, 5)
    hidden = torch.zeros(2, 5, 8)
    assert mask_of((hidden,), {"attention_mask": by_prompt, "bias": square}, 5) is by_prompt
    assert mask_of((hidden, square), {"attention_mask": None}, 5) is square
    assert mask_of((hidden,), {"causal": square}, 5) is square
    for other in (torch.zeros(2, 1, 5, 4), torch.zeros(2, 5, 5), torch.zeros(1, 2, 1, 5, 5)):
        assert mask_of((hidden, other), {"causal": other}, 5) is None
