"""Sweeps: data that says what varies, planned before anything runs, scored cell by cell."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.forward_counter import count_forwards
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.errors import HookedVLMError, InterventionError, RegionError
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep, final_logits


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def some_scores(logits: Tensor) -> Tensor:
    return final_logits(logits)[:, :3]


def sweep_of(family: str, batch: int = 2) -> Sweep:
    """Kinds of interventions by slot, with two runs and a reference to read from."""
    inputs, source, reference = (make_inputs(family, batch, seed=s) for s in (1, 2, 3))
    n = 6 if family == "llava" else 3
    left, right = Region.column_band((n, n), 0, 1), Region.column_band((n, n), n - 1, n)
    pairs = swap_pairs(left, right)
    direction = torch.randn(48)
    made: dict[str, Any] = {
        "clean": lambda slot: None,
        "swap": lambda slot: Patch(slot, at=pairs, source=source),
        "last": lambda slot: Patch(slot, at=LastToken(), source=source),
        "mean": lambda slot: Ablate(slot, at=left, to="mean", reference=reference),
        "two": lambda slot: [
            Steer(slot, at=left, directions=direction, alpha=2.0),
            Chain(Patch(0, at=right, source=source), Ablate(slot, at=LastToken())),
        ],
    }
    return Sweep(
        inputs, {"kind": list(made), "slot": [0, 2]}, make=lambda kind, slot: made[kind](slot)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_one_hooked_forward_pass(family: str) -> None:
    model, sweep = tiny(family), sweep_of(family)
    scores = sweep.run(
        model, some_scores, dims=("batch", "token"), engine="restart", logits_to_keep=1
    )
    assert scores.dims == ("kind", "slot", "batch", "token")
    assert scores.shape == (5, 2, 2, 3)
    clean = scores.sel(kind="clean", slot=0).values
    for cell in sweep.cells():
        logits = model.run_with_hooks(sweep.inputs, cell.interventions, logits_to_keep=1)
        kind, slot = cell.coords
        here = scores.sel(kind=kind, slot=slot).values
        assert np.array_equal(here, some_scores(logits).numpy()), cell.coords
        assert np.array_equal(here, clean) == (kind == "clean"), cell.coords


def test_sources_run_once_each() -> None:
    model, sweep = tiny("gemma-3"), sweep_of("gemma-3")
    with count_forwards(model) as forwards:
        cells = sweep.recorded(model)
        assert len(forwards) == 2  # the source and the reference, whatever number of cells
        forwards.clear()
        sweep.run(model, some_scores, dims=("batch", "token"), engine="plain")
    assert len(forwards) == 2 + len(cells)
    recorded = record(model, make_inputs("gemma-3", seed=2), ["blocks.0.hook_resid_pre"])
    again = Sweep(make_inputs("gemma-3", seed=1), {"x": [1]}, lambda x: Patch(0, source=recorded))
    with count_forwards(model) as forwards:
        again.recorded(model)
    assert not forwards


@pytest.mark.parametrize("broken", ["site", "size", "heads"])
def test_a_mistake_in_the_last_cell_is_found_before_anything_runs(broken: str) -> None:
    model = tiny("qwen2-vl")
    source = make_inputs("qwen2-vl", seed=2)
    strip, wide = Region.column_band((3, 3), 0, 1), Region.column_band((3, 3), 1, 3)
    mistakes = {
        "site": Patch("blocks.9.hook_resid_post", source=source),
        "size": Patch(1, at=strip, source_at=wide, source=source),
        "heads": Ablate("blocks.0.attn.hook_z", heads=(9,)),
    }
    sweep = Sweep(
        make_inputs("qwen2-vl", seed=1),
        {"cell": range(4)},
        make=lambda cell: Patch(1, at=strip, source=source) if cell < 3 else mistakes[broken],
    )
    with count_forwards(model) as forwards, pytest.raises(HookedVLMError):
        sweep.run(model, some_scores)
    assert not forwards


def test_axes_without_values_and_names_used_twice_are_refused() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", seed=1)
    with count_forwards(model) as forwards:
        for axes in ({}, {"slot": []}):
            with pytest.raises(InterventionError, match="axes with values"):
                Sweep(inputs, axes, make=lambda slot: None).run(model, some_scores)
        with pytest.raises(InterventionError, match="share \\['batch'\\]"):
            Sweep(inputs, {"batch": [1]}, make=lambda batch: None).run(model, some_scores)
    assert not forwards


def test_a_metric_of_other_axes_is_refused_at_the_first_cell() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, seed=1)
    sweep = Sweep(inputs, {"slot": range(4)}, make=lambda slot: Ablate(slot, at=LastToken()))
    with count_forwards(model) as forwards:
        with pytest.raises(InterventionError, match="returned 2 axes, of shape"):
            sweep.run(model, some_scores, engine="plain")
        labels = {"token": ["a", "b"]}
        with pytest.raises(InterventionError, match="coords gives 2 labels"):
            sweep.run(model, some_scores, dims=("batch", "token"), coords=labels, engine="plain")
    assert len(forwards) == 2


def test_progress_and_labels() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    strip = Region.column_band((6, 6), 0, 2, "left")
    told: list[tuple[int, int]] = []
    sweep = Sweep(
        inputs,
        {"place": [strip, LastToken()], "alpha": np.array([0.0, 2.0]), "slot": np.arange(2)},
        make=lambda place, alpha, slot: Steer(
            int(slot), at=place, directions=torch.ones(48), alpha=float(alpha)
        ),
    )
    scores = sweep.run(
        model,
        some_scores,
        dims=("prompt", "token"),
        coords={"token": ["a", "b", "c"]},
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(i, 8) for i in range(1, 9)]
    assert scores.dims == ("place", "alpha", "slot", "prompt", "token")
    assert scores["place"].values.tolist() == [str(strip), "last token"]
    assert scores["alpha"].values.tolist() == [0.0, 2.0]
    assert scores["slot"].values.tolist() == [0, 1]
    assert scores["token"].values.tolist() == ["a", "b", "c"]
    with pytest.raises(InterventionError, match=r"coords labels 'tokne'.*Did you mean 'token'"):
        sweep.run(model, some_scores, dims=("prompt", "token"), coords={"tokne": ["a"]})
    off = scores.sel(alpha=0.0, slot=1, place="last token").values
    assert np.allclose(off, some_scores(model(inputs)).numpy(), atol=1e-6)


def test_a_region_of_another_grid_is_an_error_of_the_plan() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", seed=1)
    sweep = Sweep(
        inputs, {"slot": [0]}, make=lambda slot: Ablate(slot, at=Region((3, 3), ((0, 0),)))
    )
    with pytest.raises(RegionError, match="visual tokens"):
        sweep.plan(model)
