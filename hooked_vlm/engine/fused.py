"""Rows that join the batch together, made by `patched_rows` in one pass over memory.

Hook by hook, a joining row is copied whole, written to, cut to its suffix and appended to the
rows that are there.  Where the kernel can run, and each joining cell is one patch or one step
along a direction, its rows are made at once and each is written once.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.clean_run import Clean
from hooked_vlm.engine.fingerprints import remember
from hooked_vlm.engine.kernels import patched_rows, way_for
from hooked_vlm.engine.stages import RowPlan
from hooked_vlm.hooks.located import Located
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.placing import Placed, recorded_at, require_made_for
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.interventions.steer import Steer


WAYS = ("triton",)
"""Implementations of the kernel that pay here: on a CPU hooks are as fast."""


@dataclass(frozen=True, eq=False)
class Write:
    """One cell's step as the kernel takes it: which positions, and from where or along what."""

    targets: Located
    values: Tensor | None = None
    """`[source, pos, d_model]` of a patch."""
    sources: Sequence[tuple[int, Tensor]] = ()
    steer: Steer | None = None

    @property
    def kind(self) -> Hashable:
        """What all steps of one call have in common."""
        return self.steer and self.steer.mode


def joined_rows(
    model: Any, clean: Clean, jobs: Sequence[RowPlan], start: int, by_hooks: Callable[[], Tensor]
) -> Tensor | None:
    """Returns rows `[job * prompt, pos, d_model]` from `start` on of jobs that join together.

    None where hooks have to make them.  The first time for a kind of step the kernel's rows are
    held against those that hooks make, and where they differ, or it cannot run, hooks go on making
    them.
    """
    writes = writes_of(clean, jobs)
    if not writes:
        return None

    def agree() -> bool:
        make = partial(fused_rows, clean, jobs, writes, start)
        try:
            found = attempt(make, "the kernel that makes rows failed")
        except GrowthError:
            return False
        expected = by_hooks()
        if writes[0].steer is None:
            return torch.equal(found, expected)
        unit = torch.finfo(found.dtype).eps * float(expected.abs().max())
        return bool((found - expected).abs().max() <= 4 * unit)

    whole = clean.residuals[jobs[0].stage]
    kind = ("fused rows", writes[0].kind, whole.dtype, whole.device, WAYS)
    return fused_rows(clean, jobs, writes, start) if remember(model, kind, agree) else None


def writes_of(clean: Clean, jobs: Sequence[RowPlan]) -> list[Write]:
    """Returns what each of some jobs writes where it joins; empty where the kernel is no way."""
    stage = jobs[0].stage
    whole = clean.residuals.get(stage)
    if whole is None or way_for(whole) not in WAYS:
        return []
    if stage in clean.added or any(job.front for job in jobs):
        return []
    writes = [write for job in jobs if (write := _write(clean, job)) is not None]
    shapes = {write.values.shape[1:] for write in writes if write.values is not None}
    kinds = {write.kind for write in writes}
    alike = len(writes) == len(jobs) and len(kinds) == 1 and len(shapes) <= 1
    return writes if alike else []


def fused_rows(
    clean: Clean, jobs: Sequence[RowPlan], writes: Sequence[Write], start: int
) -> Tensor:
    """Returns the rows of jobs with one write each, by one call of the kernel."""
    whole = clean.residuals[jobs[0].stage]
    steer_at: Tensor | None = None
    steering: dict[str, Tensor] = {}
    n_rows, length = len(jobs) * len(whole), clean.size[1]
    token_map = torch.full((n_rows, length), -1)
    clean_row = torch.arange(len(whole)).repeat(len(jobs))
    source_row = torch.zeros(n_rows, dtype=torch.long)
    if writes[0].steer is None:
        tables, offsets = _tables([write.values for write in writes if write.values is not None])
        for number, write in enumerate(writes):
            for (b, target), (s, source) in zip(write.targets, write.sources, strict=True):
                row = number * len(whole) + b
                token_map[row, target] = source
                source_row[row] = offsets[id(write.values)] + s
        source = tables.to(whole)
    else:
        source, steer_at = whole[:0], torch.zeros(n_rows, length, dtype=torch.bool)
        for number, write in enumerate(writes):
            for b, target in write.targets:
                steer_at[number * len(whole) + b, target] = True
        steering = _steering(writes, len(whole))
    here = whole.device
    return patched_rows(
        whole[:, start - clean.first :],
        source,
        # Sent, and not moved: the host would wait for each, before every block.
        sent(token_map[:, start:], here),
        clean_row=sent(clean_row, here),
        source_row=sent(source_row, here),
        steer_at=None if steer_at is None else sent(steer_at[:, start:], here),
        **{name: sent(x, here) for name, x in steering.items()},
        mode=writes[0].steer.mode if writes[0].steer else "add",
        by=way_for(whole),
        check_values=False,
    )


def _write(clean: Clean, job: RowPlan) -> Write | None:
    """Returns a job's only step at its stage, or None where that is no such step."""
    steps = job.between(job.stage)
    if len(steps) != 1 or not isinstance(steps[0].part, Placed):
        return None
    placed, part = steps[0].part, steps[0].part.part
    if part.heads is not None or getattr(part, "neurons", None) is not None:
        return None
    if getattr(part, "subspace", None) is not None:
        return None
    if type(part) is Steer and part.directions.numel() == part.directions.shape[-1]:
        found = Write(placed.located[0], steer=part)
    elif type(part) is Patch and isinstance(part.source, Recording):
        targets, sources = placed.located
        found = Write(targets, recorded_at(placed, part.source), sources)
    else:
        return None
    here = clean.residuals[job.stage]
    rows = here.new_empty(*clean.size, here.shape[-1], device="meta")
    require_made_for(placed.where, rows, placed.inputs, placed.places)
    return found


def _tables(values: Sequence[Tensor]) -> tuple[Tensor, dict[int, int]]:
    """Returns distinct sources concatenated, and each one's first row there."""
    distinct = list({id(x): x for x in values}.values())
    offsets, taken = {}, 0
    for x in distinct:
        offsets[id(x)] = taken
        taken += len(x)
    return (distinct[0] if len(distinct) == 1 else torch.cat(distinct)), offsets


def _steering(writes: Sequence[Write], batch: int) -> dict[str, Tensor]:
    steers = [write.steer for write in writes if write.steer is not None]
    return {
        "directions": torch.stack([s.directions.reshape(-1) for s in steers]).float(),
        "direction_row": torch.arange(len(steers)).repeat_interleave(batch),
        "strength": torch.tensor([float(s.alpha) for s in steers]).repeat_interleave(batch),
    }
