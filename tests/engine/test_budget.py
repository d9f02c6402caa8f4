"""A sweep runs in passes of a declared size; in smaller ones where memory does not hold them."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from helpers.growing_sweeps import compared, sweep_of
from helpers.tiny_models import tiny
from hooked_vlm.engine.batch import Growing
from hooked_vlm.engine.budget import CACHED, MOST, PASS_TOKENS, row_bytes, rows_within
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.proofs import forget
from hooked_vlm.errors import HookedVLMWarning


def test_rows_go_in_passes_that_a_budget_holds() -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap", "zero"], [0, 1, 2, 3])
    cells = sweep.recorded(model)
    whole, _ = run_growing(model, sweep.inputs, cells, lambda x: x)
    length = sweep.inputs["input_ids"].shape[1]
    each = row_bytes(model, length, 3, length, 4)
    told: list[tuple[int, int]] = []
    parts, report = run_growing(
        model, sweep.inputs, cells, lambda x: x, lambda *step: told.append(step), memory=8 * each
    )
    # Eight rows are four cells of two prompts.
    assert report.passes == 2 and report.rows == 16 and told[-1] == (8, 8)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))
    scores = sweep.run(model, lambda x: x[:, -1, 0], memory=1)
    assert scores.attrs["engine"].startswith("growing: 8 passes of 16 rows")


@pytest.mark.parametrize("free", [2**20, 2**45])
def test_a_busy_machine_has_the_passes_of_an_idle_one(
    monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap", "zero"], [0, 1, 2, 3], batch=8)
    how: Any = {"metric": lambda x: x[:, -1, 0], "logits_to_keep": 1}
    expected = sweep.run(model, **how)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    found = sweep.run(model, **how)
    # The same products of the same shapes: the same bits.
    assert found.attrs == expected.attrs and found.equals(expected)
    assert "1 pass of 64 rows" in found.attrs["engine"]


def test_a_pass_has_the_declared_number_of_positions() -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap", "zero"], [0, 1, 2, 3])
    length = sweep.inputs["input_ids"].shape[1]
    for tokens, passes in ((6 * (length - 3), 3), (6 * (length - 3) - 1, 4), (1, 8)):
        scores = sweep.run(model, lambda x: x[:, -1, 0], pass_tokens=tokens)
        assert scores.attrs["engine"].startswith(f"growing: {passes} passes of 16 rows")
        plan = sweep.plan(model).explain(pass_tokens=tokens)
        assert (plan.passes, plan.rows) == (passes, 16)
    assert rows_within(model, 1000, 0, 1, 4) == PASS_TOKENS // 1000


def test_a_pass_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["swap", "zero"], [0, 1, 2, 3])
    true = Growing.run
    forget(model)

    def run(self: Growing) -> Tensor:
        if len(self.jobs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self)

    monkeypatch.setattr(Growing, "run", run)
    told = pytest.warns(HookedVLMWarning, match=f"did not fit .* pass_tokens={PASS_TOKENS}; the")
    with told as warnings:
        report = compared(model, sweep)
    assert report.passes == 2
    # All of a sweep's passes are then as small, and are so from the start where asked for.
    tokens = int(str(warnings[0].message).rpartition("pass_tokens=")[2].split()[0])
    assert len(warnings) == 1 and tokens == 8 * sweep.inputs["input_ids"].shape[1]
    scores = sweep.run(model, lambda x: x[:, -1, 0], pass_tokens=tokens)
    assert scores.attrs["engine"].startswith("growing: 2 passes of 16 rows")


def test_a_cpu_without_memory_halves_a_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["swap", "zero"], [0, 1, 2, 3])
    true = Growing.run

    def run(self: Growing) -> Tensor:
        if len(self.jobs) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return true(self)

    monkeypatch.setattr(Growing, "run", run)
    with pytest.warns(HookedVLMWarning, match="did not fit into memory"):
        assert compared(model, sweep).passes == 2


def test_j2_rows_on_a_cpu_are_those_whose_widest_activation_its_caches_hold() -> None:
    model = tiny("llava")
    assert model.cfg.d_mlp == 96 and model.device.type == "cpu"
    for length, start, itemsize in ((9000, 0, 4), (9000, 8000, 4), (9000, 8000, 8)):
        held = CACHED // ((length - start) * 96 * itemsize)
        assert 0 <= held < MOST
        found = rows_within(model, length, start, 1, itemsize, pass_tokens=2**60)
        assert found == max(1, held), (length, start, itemsize)
    assert rows_within(model, 10, 0, 1, 4, pass_tokens=2**60) == MOST
    each = row_bytes(model, 100, 50, 1, 4)
    given = [rows_within(model, 100, 50, 1, 4, memory=n * each + n) for n in (0, 1, 7)]
    assert given == [1, 1, 7]
