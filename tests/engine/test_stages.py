"""Where a cell's rows join a growing batch."""

import pytest

from helpers.growing_sweeps import sweep_of
from helpers.tiny_models import make_inputs, tiny
from hooked_vlm.engine.stages import job_of, stage_of
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep


def test_where_cells_join() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    (swap,) = sweep_of("llava", ["swap"], [2]).plan(model)
    job = job_of(model, inputs, swap, 0)
    first = int(model.grids(inputs)[0][0].positions.min())
    assert job is not None and (job.stage, job.first) == (2, first)
    assert stage_of("blocks.1.hook_resid_pre", 3) == (1, True)
    assert stage_of("hook_logits", 3) == (3, False)
    assert stage_of("hook_embed", 3) == (-1, False)
    assert stage_of("hook_merged_embed", 3) == (0, True)
    assert stage_of("hook_merged_embed", 3, merged_first=False) == (-1, False)


@pytest.mark.parametrize(
    ("base", "own", "stage"),
    [
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", 1),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre", 1),
        ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", 1),
        # What the base does comes after what the cell does, or may.
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", None),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre", None),
        ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_pre", None),
    ],
)
def test_j2_a_cell_joins_only_where_all_of_its_base_lies_before_it(base, own, stage) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    for later in ((), (Ablate("blocks.2.hook_mlp_out"),)):
        made = (Ablate(own), *later)
        (cell,) = Sweep(inputs, {"i": [0]}, lambda i, made=made: list(made), [Ablate(base)]).plan(
            model
        )
        job = job_of(model, inputs, cell, 0)
        assert (None if job is None else job.stage) == stage


def test_j2_rows_begin_with_the_first_position_that_any_step_changes() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    image = int(model.grids(inputs)[0][0].positions.min())
    left = Region.column_band((6, 6), 0, 1)
    for made, first in (
        ([Ablate("vision_projector.hook_out", at=left), Ablate(2, at=LastToken())], image),
        ([Ablate(1, at=LastToken()), Ablate(2, at=left)], image),
        ([Ablate("vision_projector.hook_out", at=left), Ablate(2)], 0),
    ):
        (cell,) = Sweep(inputs, {"i": [0]}, lambda i, made=made: made).plan(model)
        job = job_of(model, inputs, cell, 0)
        assert job is not None and job.first == first
