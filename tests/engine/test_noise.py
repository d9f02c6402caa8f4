"""The bound of a control is the measured noise of the model and its arithmetic, within limits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.growing_sweeps import sweep_of
from helpers.questions import ask
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.engine import noise
from hooked_vlm.engine.arguments import Fit
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.batch import Growing
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.noise import apart, at_tokens, bound_for, limits
from hooked_vlm.engine.proofs import forget
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.sweeps.sweep import Sweep


@contextmanager
def tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrix products of numbers with ten bits of mantissa, by kernels that differ with the rows.

    Kernels of a GPU for other shapes compute other parts in TF32; here the point at which a value
    is rounded up moves with the number of rows.
    """
    true = nn.functional.linear

    def rounded(x: Tensor, by: int) -> Tensor:
        bits = x.contiguous().view(torch.int32) + (1 << 12) + by
        return (bits & ~((1 << 13) - 1)).view(torch.float32)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n_rows = x.numel() // x.shape[-1]
        return true(rounded(x, 997 * n_rows % 4096 - 2048), rounded(weight, 0), bias)

    before = torch.get_float32_matmul_precision()
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "linear", linear)
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_grow_under_tf32_and_faults_are_found(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sweep = HookedVLM(build(family)), sweep_of(family, ["swap", "last"], [0, 1, 2, 3])
    cells, (least, most) = sweep.recorded(model), limits(torch.float32)
    with tf32(monkeypatch):
        _, report = run_growing(model, sweep.inputs, cells, lambda x: x[:, -1])
        assert least < report.worst < most
        assert least < bound_for(model, sweep.inputs, {}, torch.float32, 1.0) < most / 2
        forget(model)
        true = Fit.arguments
        monkeypatch.setattr(Fit, "arguments", lambda self, given: _shifted(true(self, given)))
        with pytest.raises(GrowthError, match=r"off by .* \(at most .* is rounding\)"):
            run_growing(model, sweep.inputs, cells, lambda x: x[:, -1])


def _shifted(given: dict) -> dict:
    """Rows whose positions are off by one."""
    given["position_embeddings"] = tuple(x.roll(1, -2) for x in given["position_embeddings"])
    return given


def test_in_half_precision_a_fault_below_the_table_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sweep = HookedVLM(build("llava", dtype=torch.float16)), sweep_of("llava", ["last"], [1])
    inputs = {**sweep.inputs, "pixel_values": sweep.inputs["pixel_values"].half()}
    cells = sweep.recorded(HookedVLM(build("llava"))) * 2
    with torch.no_grad():
        bound = bound_for(model, inputs, {}, torch.float16, 1.0)
    assert limits(torch.float16)[0] < bound < 0.75 * limits(torch.float16)[1]
    true, off = Growing.run, 1.25 * bound
    monkeypatch.setattr(Growing, "run", lambda self: true(self) * (1 + off))
    with pytest.raises(GrowthError, match="is rounding"):
        run_growing(model, inputs, cells, lambda x: x[:, -1])


def test_noise_is_measured_only_where_the_least_bound_does_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    measured: list[float | None] = []
    true = noise._measured

    def note(*args: Any) -> float | None:
        measured.append(true(*args))
        return measured[-1]

    monkeypatch.setattr(noise, "_measured", note)
    forget(model)
    assert bound_for(model, inputs, {}, torch.float32, 4e-5) == 5e-5 and not measured
    # In float32 it is far below the table, which stays.
    assert bound_for(model, inputs, {}, torch.float32, 1.0) == 5e-5
    assert bound_for(model, inputs, {}, torch.float32, float("nan")) == 5e-5
    (once,) = measured
    assert once is not None and 1e-8 < once < 5e-6
    # Inputs that the model does not take twice leave the table's highest.
    forget(model)
    monkeypatch.setattr(noise, "_measured", lambda *_: None)
    assert bound_for(model, inputs, {}, torch.float32, 1.0) == limits(torch.float32)[1]


def test_the_coarsest_dtype_on_the_way_counts() -> None:
    """Some models compute in half precision, and return logits in float32."""
    model, inputs = HookedVLM(build("llava", dtype=torch.bfloat16)), make_inputs("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert bound_for(model, inputs, {}, torch.float32, 0.0) == limits(torch.bfloat16)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bound_for(tiny("llava"), inputs, {}, torch.float32, 0.0) == limits(torch.bfloat16)[0]


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_nothing_is_near_logits_that_say_nothing(value: float) -> None:
    empty = torch.full((2, 3), value)
    assert apart(torch.ones(2, 3), empty) == apart(empty, empty) == float("inf")
    assert not apart(torch.full((2, 3), float("nan")), torch.ones(2, 3)) <= 1  # and not >= 1


@pytest.mark.parametrize("engine", ["plain", "growing"])
def test_a_model_whose_logits_are_nan_gives_nan(engine: str) -> None:
    model = HookedVLM(build("llava"))
    norm = model.hf_model.get_submodule(str(model.anatomy.lm.final_norm))
    torch.nn.init.constant_(norm.weight, float("nan"))  # type: ignore[arg-type]
    inputs = ask("llava", [[5, 5]])
    sweep = Sweep(inputs, {"slot": [1, 2]}, lambda slot: Patch(slot, source=inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)  # a slower engine runs
        found = sweep.run(model, lambda x: x[:, -1, 0], engine=engine, logits_to_keep=1)
    assert found.isnull().all()


@pytest.mark.parametrize("keep", [0, 1, 3, [0, 2], torch.tensor([1, -1])])
def test_tokens_of_logits_by_what_is_kept(keep: Any) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = {"input_ids": mask, "attention_mask": mask}
    index = slice(-keep, None) if isinstance(keep, int) else torch.as_tensor(keep)
    logits = torch.arange(8.0).reshape(2, 4, 1)[:, index]
    found = at_tokens(logits, inputs, {"logits_to_keep": keep})
    assert torch.equal(found, logits[mask[:, index] == 1])
    assert at_tokens(logits, {"input_ids": mask}, {}) is logits
