"""A sweep runs in passes that memory holds."""

import pytest
import torch
from torch import Tensor

from helpers.growing_sweeps import compared, sweep_of
from helpers.tiny_models import tiny
from hooked_vlm.engine.batch import Growing
from hooked_vlm.engine.budget import CACHED, MOST, row_bytes, rows_within
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.proofs import forget


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
    assert rows_within(model, length, 3, length, 4, None) == 512


def test_a_pass_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["swap", "zero"], [0, 1, 2, 3])
    true = Growing.run
    forget(model)

    def run(self: Growing) -> Tensor:
        if len(self.jobs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self)

    monkeypatch.setattr(Growing, "run", run)
    report = compared(model, sweep)
    assert report.passes == 2


def test_j2_rows_on_a_cpu_are_those_whose_widest_activation_its_caches_hold() -> None:
    model = tiny("llava")
    assert model.cfg.d_mlp == 96 and model.device.type == "cpu"
    for length, start, itemsize in ((9000, 0, 4), (9000, 8000, 4), (9000, 8000, 8)):
        held = CACHED // ((length - start) * 96 * itemsize)
        assert 0 <= held < MOST
        found = rows_within(model, length, start, 1, itemsize, 2**60)
        assert found == max(1, held), (length, start, itemsize)
    assert rows_within(model, 10, 0, 1, 4, 2**60) == MOST
    each = row_bytes(model, 100, 50, 1, 4)
    assert [rows_within(model, 100, 50, 1, 4, n * each + n) for n in (0, 1, 7)] == [1, 1, 7]
