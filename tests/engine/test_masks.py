"""Sweeps grow under every implementation of attention, with what each takes in a mask's place."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attention_kernels import FLASH, FLEX, Flash, attending
from helpers.growing_sweeps import BOUND, make_region
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.run import run_plain
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.sweeps.sweep import Sweep


PADDING = 2


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        # FlexAttention has no gradients on a CPU.
        warnings.filterwarnings("ignore", "The route of a pixel could not be measured")
        yield


def padded(family: str, batch: int) -> dict[str, Tensor]:
    """Prompts of which the first begins with padding."""
    inputs = make_inputs(family, batch, seed=1)
    inputs["attention_mask"][0, :PADDING] = 0
    return inputs


def sweep_of(family: str, inputs: dict[str, Tensor], where: str) -> Sweep:
    source = make_inputs(family, len(inputs["input_ids"]), seed=2)
    return Sweep(
        inputs,
        {"slot": [0, 1, 2]},
        lambda slot: (
            Patch(slot, at=LastToken(), source=source)
            if where == "last"
            else Ablate(slot, at=make_region(family))
        ),
    )


def grown(model: Any, sweep: Sweep) -> Any:
    """Checks a growing batch against plain passes of the same attention."""
    cells = sweep.recorded(model)
    # What padding computes is nobody's: eager attention lets it see what comes after it.
    is_whole = bool(sweep.inputs["attention_mask"].all())
    how: Any = (lambda x: x, None, {} if is_whole else {"logits_to_keep": 1})
    plain = run_plain(model, sweep.inputs, cells, *how)
    scores, report = run_growing(model, sweep.inputs, cells, *how)
    for one, other in zip(scores, plain, strict=True):
        assert float((one - other).abs().max()) <= BOUND * float(other.abs().max())
    return report, torch.stack(plain)


CASES = [
    (family, name)
    for family in FAMILIES
    for name in ("eager", "sdpa", FLEX, FLASH)
    if (family, name) != ("qwen2-vl", FLEX)  # transformers has none for it
]


@pytest.mark.parametrize("where", ["last", "image"])
@pytest.mark.parametrize("pad", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_attention_grows_and_answers_alike(
    family: str, name: str, pad: bool, where: str
) -> None:
    inputs = padded(family, 2) if pad else make_inputs(family, 2, seed=1)
    sweep = sweep_of(family, inputs, where)
    with attending(tiny(family), name) as (model, _):
        report, found = grown(model, sweep)
    if where == "last":
        assert max(report.starts) == inputs["input_ids"].shape[1] - 1
    if name == FLASH and family == "gemma-3":
        return  # it cannot let image tokens see one another, in plain passes neither
    _, expected = grown(tiny(family), sweep)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def kinds(kernels: Flash) -> set[Any]:
    """How the language model's attention was asked: queries, keys, bounds, without heads."""
    made = set()
    for call in kernels.calls:
        if call["causal"]:
            q, k = call["q"][:-2], call.get("k", ())[:-2]
            made.add((q, k, *(tuple(x) for x in call.get("bounds", ()))))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_is_given_queries_and_keys_and_no_mask(family: str) -> None:
    inputs = make_inputs(family, 2, seed=1)
    length = inputs["input_ids"].shape[1]
    sweep = sweep_of(family, inputs, "last")
    with attending(tiny(family), FLASH) as (model, kernels):
        cells = sweep.recorded(model)
        run_growing(model, inputs, cells, lambda x: x[:, -1], None, {"logits_to_keep": 1})
        kernels.calls.clear()
        run_growing(model, inputs, cells, lambda x: x[:, -1], None, {"logits_to_keep": 1})
    # The clean run, and 1, 2 and 3 cells of two prompts with their last position alone.
    rows = {((n, 1), (n, length)) for n in (2, 4, 6)}
    assert kinds(kernels) == {((2, length), (2, length))} | rows


def test_flash_attention_is_given_the_bounds_of_padded_prompts() -> None:
    inputs = padded("llava", 2)
    length = inputs["input_ids"].shape[1]
    sweep = sweep_of("llava", inputs, "last")
    with attending(tiny("llava"), FLASH) as (model, kernels):
        cells = sweep.recorded(model)
        run_growing(model, inputs, cells, lambda x: x[:, -1], None, {"logits_to_keep": 1})
    two = [0, length - PADDING, 2 * length - PADDING]
    keys = [0]
    for _ in range(3):
        keys += [keys[-1] + length - PADDING, keys[-1] + 2 * length - PADDING]
    expected = {((2 * length - PADDING,), (), tuple(two), tuple(two))}
    for cells_joined in (1, 2, 3):
        n = 2 * cells_joined
        expected.add(((n,), (), tuple(range(n + 1)), tuple(keys[: n + 1])))
    assert expected <= kinds(kernels)
