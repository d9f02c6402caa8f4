"""How a sweep's cells run: plainly, the definition, or as a growing batch, or why not as one."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.forward_counter import count_forwards
from helpers.growing_sweeps import compared, make_region, sweep_of
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.proofs import forget
from hooked_vlm.engine.run import run_plain
from hooked_vlm.engine.stages import RowPlan
from hooked_vlm.engine.starts import starts_of
from hooked_vlm.errors import HookedVLMWarning, InterventionError
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Cell, Chain, source_of
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording, record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.sweeps.sweep import Sweep


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_pass_for_each_cell_in_order(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    cells = [Cell((0,), ()), Cell((1,), (Ablate(1, at=LastToken()),)), Cell((2,), (Ablate(2),))]
    told: list[tuple[int, int]] = []
    with count_forwards(model) as forwards:
        scores = run_plain(
            model,
            inputs,
            cells,
            lambda x: x[:, -1],
            lambda *d: told.append(d),
            {"logits_to_keep": 1},
        )
    assert len(forwards) == 3
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not any(score.requires_grad for score in scores)
    with torch.no_grad():
        for cell, score in zip(cells, scores, strict=True):
            logits = model.run_with_hooks(inputs, cell.interventions, logits_to_keep=1)
            assert torch.equal(score, logits[:, -1])


def test_recorded_runs_are_put_in_everywhere() -> None:
    model = tiny("llava")
    source, reference = make_inputs("llava", seed=2), make_inputs("llava", seed=3)
    runs = {id(i): record(model, i, ["blocks.0.hook_resid_pre"]) for i in (source, reference)}
    patch = Patch(0, source=source)
    mean = Ablate(0, to="mean", reference=reference)
    steer = Steer(0, directions=torch.ones(48), alpha=1.0)
    cell = Cell((), (patch, Chain(mean, Chain(patch)), steer)).with_sources(runs)
    first, chain, last = cell.interventions
    assert isinstance(first.source, Recording)
    assert isinstance(chain.parts[0].reference, Recording)
    assert isinstance(chain.parts[1].parts[0].source, Recording)
    assert last is steer
    assert source_of(patch) == ("source", source)
    assert source_of(mean) == ("reference", reference)
    assert source_of(steer)[1] is None
    assert patch.source is source  # the cell was copied, the intervention left alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", [0, 1, "blocks.1.hook_attn_out", "hook_logits"])
def test_what_all_cells_begin_with_is_kept(family: str, site: Any) -> None:
    at = LastToken() if site == "hook_logits" else make_region(family)
    sweep = sweep_of(family, ["swap", "last"], [2, 3])
    under = Sweep(sweep.inputs, sweep.axes, sweep.make, [Ablate(site, at=at)])
    if site == "hook_logits":  # after the cells' own begins
        with pytest.raises(GrowthError, match="rows cannot carry what"):
            compared(tiny(family), under)
        forget(tiny(family))
        with pytest.warns(HookedVLMWarning, match="cannot run by the engine 'growing'"):
            fast = under.run(tiny(family), lambda x: x[:, -1], dims=("batch", "token"))
        assert fast.attrs["engine"].startswith("restart (no growing batch: ")
        return
    compared(tiny(family), under, logits_to_keep=1)


def test_a_short_front_is_carried() -> None:
    """Where little comes before the first change, rows are whole: the same bits, no mask."""
    inputs = {"input_ids": torch.zeros(1, 40)}
    jobs = [RowPlan(0, 1, first) for first in (3, 4, 30)]
    assert starts_of(jobs, {}, inputs) == [0, 4, 30]


def test_what_cannot_grow_says_why() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    under = Sweep(inputs, {"i": [0, 1]}, lambda i: Ablate("vision_projector.hook_out"), [Ablate(1)])
    with pytest.raises(GrowthError, match="rows cannot carry what 2 cells would change"):
        run_growing(model, inputs, under.recorded(model), lambda x: x)
    sweep = Sweep(inputs, {"i": [0, 1]}, lambda i: Ablate(i))
    cells = sweep.recorded(model)
    doubled = model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x * 2)])
    with doubled, pytest.raises(GrowthError, match="hooks are open"):
        run_growing(model, inputs, cells, lambda x: x)
    with pytest.raises(InterventionError, match=r"no engine 'growin' .*'growing'"):
        sweep.run(model, lambda x: x, engine="growin")


@dataclass(frozen=True)
class Own:
    """An intervention of a user's own class, which may act anywhere: rows cannot carry it."""

    slot: int

    def check(self, *_: Any) -> None: ...

    def hooks_for(self, *_: Any) -> list[Any]:
        return [(f"blocks.{self.slot}.hook_resid_pre", lambda x, hook: x * 0.5)]


def run_by(model: Any, cells: list[Any]) -> tuple[str, list[str]]:
    """Runs a sweep of some interventions; returns its engine, and what was warned of."""
    sweep = Sweep(make_inputs("llava", 2, seed=1), {"i": range(len(cells))}, lambda i: cells[i])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scores = sweep.run(model, lambda x: x[:, -1, 0])
    return scores.attrs["engine"], [str(warning.message) for warning in told]


def test_a_slower_engine_is_told_once_for_a_model_and_reason() -> None:
    model = tiny("llava")
    forget(model)
    engine, told = run_by(model, [Own(1), Own(2), Own(2), Own(1)])
    assert engine.startswith("plain (no growing batch: rows cannot carry what 4 cells")
    assert len(told) == 1 and "cannot run by the engine 'growing': rows cannot carry" in told[0]
    assert len(told[0]) <= 400 and 'scores.attrs["engine"]' in told[0]
    assert run_by(model, [Own(1), Own(2)])[1] == []  # the same reason, another number
    model.hf_model.train()
    try:
        engine, (first, second) = run_by(model, [Ablate(i) for i in range(4)])
    finally:
        model.hf_model.eval()
    assert engine.startswith("plain") and "'growing': the model is in training" in first
    assert "'restart': the model is in training" in second


def test_where_a_faster_engine_saves_nothing_or_hooks_are_open_nothing_is_told() -> None:
    model = tiny("llava")
    forget(model)
    engine, told = run_by(model, [Ablate(1)])
    assert engine.startswith("plain (no growing batch: there is one cell") and told == []
    with model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x * 2)]):
        engine, told = run_by(model, [Ablate(i) for i in range(4)])
    assert engine.startswith("plain (no growing batch: hooks are open") and told == []


def test_errors_of_a_metric_are_not_taken_for_something_else() -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["zero"], [0, 1])

    def metric(logits: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        sweep.run(model, metric)
