"""Where a cell's rows join a growing batch."""

from helpers.growing_sweeps import sweep_of
from helpers.tiny_models import make_inputs, tiny
from hooked_vlm.engine.stages import job_of, stage_of


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
