"""What rows are given beside the stream is made once: prefixes, masks, positions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import make_inputs, tiny
from hooked_vlm import LastToken, Patch, Sweep
from hooked_vlm.engine import arguments
from hooked_vlm.engine.batch import Growing
from hooked_vlm.engine.folding import Layout
from hooked_vlm.engine.prefix import Prefix
from hooked_vlm.regions.region import Region


KWARGS = {"metric": lambda logits: logits[:, -1, 0], "logits_to_keep": 1}


def test_a_prefix_is_what_expanding_and_concatenating_give() -> None:
    clean, own = torch.randn(2, 2, 5, 4), torch.randn(6, 3, 2, 4).transpose(1, 2)
    found, again = Prefix(clean, clean, 3).update(own, own)
    expected = torch.cat([clean.repeat(3, 1, 1, 1), own], dim=2)
    assert torch.equal(found, expected) and torch.equal(again, expected)
    assert found.is_contiguous()


def counted(monkeypatch: Any, owner: Any, name: str) -> list[int]:
    """Counts the calls of a function."""
    own, calls = getattr(owner, name), []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


def slots(inputs: dict[str, Tensor], source: dict[str, Tensor], at: Any) -> Sweep:
    return Sweep(inputs, {"slot": [0, 1, 2]}, lambda slot: Patch(slot, at=at, source=source))


@pytest.mark.parametrize("questions", [1, 2])
def test_a_mask_is_made_once_for_a_pass(monkeypatch: Any, questions: int) -> None:
    """Not before each block at which rows join."""
    model, inputs, source = tiny("llava"), make_inputs("llava", 2), make_inputs("llava", 2, seed=2)
    if questions == 2:
        inputs, source = ({name: x[:1].repeat(2, *[1] * (x.ndim - 1)) for name, x in given.items()}
                          for given in (inputs, source))  # fmt: skip
        inputs["input_ids"][1, -1] = source["input_ids"][1, -1] = 7
    right = Region.column_band(model.grids(inputs)[0][0].shape, 4, 6)
    sweep = slots(inputs, source, right)
    expected = sweep.run(model, **KWARGS)  # what is proved once a model
    assert ("2 prompts in 1 row" in expected.attrs["engine"]) is (questions == 2)
    masks = counted(
        monkeypatch, *((arguments, "causal_mask") if questions == 1 else (Layout, "mask"))
    )
    passes = counted(monkeypatch, Growing, "run")
    found = sweep.run(model, **KWARGS)
    assert found.equals(expected)
    # Runs on common rows of the clean run and of the source have one each, too.
    assert len(masks) == len(passes) + (2 if questions == 2 else 0)


def test_the_last_token_alone_needs_no_mask(monkeypatch: Any) -> None:
    """It sees all keys; with a mask, transformers repeats keys for heads that share them."""
    model, inputs, source = tiny("llava"), make_inputs("llava", 2), make_inputs("llava", 2, seed=2)
    masks = counted(monkeypatch, arguments, "causal_mask")
    sweep = slots(inputs, source, LastToken())
    found = sweep.run(model, **KWARGS)
    assert "from positions 44" in found.attrs["engine"]
    assert not masks
    plain = sweep.run(model, **KWARGS, engine="plain")
    assert abs(found - plain).max() < 2e-6 * max(1, abs(plain).max())
