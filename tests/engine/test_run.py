"""The plain execution of a sweep's cells: the definition that faster ways must meet."""

import pytest
import torch

from helpers.forward_counter import count_forwards
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine.run import run_plain
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Cell, Chain, source_of
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording, record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.regions.positions import LastToken


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
