"""Cells as rows of one growing batch, after a control for each kind of pass.

Before the first growing pass of a kind goes one with noise in it (`proofs`).  What it does to the
logits must be what it does in a plain pass, within rounding (`noise`); where it is not,
`GrowthError` says so and the sweep runs by a plainer way.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy.caches import cache_parameter
from hooked_vlm.engine.arguments import is_closed
from hooked_vlm.engine.attempts import GrowthError, attempt, require_worth
from hooked_vlm.engine.batch import Growing, idle_jobs, trimmed_of
from hooked_vlm.engine.budget import PASS_TOKENS, rows_within
from hooked_vlm.engine.clean_run import Clean, Metric, OnProgress, run_clean
from hooked_vlm.engine.fingerprints import content_of, remember, ways_of_attending
from hooked_vlm.engine.proofs import (
    keeps_keys,
    note_called,
    prove,
    uncleaned,
    unproved,
    verify,
)
from hooked_vlm.engine.shared import open_runs
from hooked_vlm.engine.stages import MERGED, RowPlan, ids_of, job_of
from hooked_vlm.engine.vision import Early, merges_first
from hooked_vlm.errors import HookedVLMWarning, callers_level, counted
from hooked_vlm.interventions.chain import Cell, flattened


FEWEST = 2
"""Cells from which on growing pays."""
SHORT = 0.1
"""Share of the prompt below which leaving its front out saves less than a mask costs."""
NEAR = 0.15
"""Cells whose first changed positions differ by less than this share of the prompt go together."""


@dataclass
class PassReport:
    """What a run took."""

    passes: int = 0
    rows: int = 0
    starts: list[int] = field(default_factory=list)
    idle: int = 0
    """Cells that change nothing: they have the clean run's logits."""
    controls: int = 0
    """Passes that were made for a control; a kind that was proved before needs none."""
    worst: float = 0.0
    """Largest difference between a control's logits and a plain pass's, over the largest logit."""

    def __str__(self) -> str:
        """Says it in a line."""
        # Nothing of the controls: who was first of a kind is no property of the numbers.
        verb = "changes" if self.idle == 1 else "change"
        idle = f"; {counted(self.idle, 'cell')} {verb} nothing" if self.idle else ""
        return (
            f"growing: {counted(self.passes, 'pass', 'passes')} of {counted(self.rows, 'row')}, "
            f"from positions {', '.join(map(str, sorted(set(self.starts))))}{idle}"
        )


def run_growing(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    on_progress: OnProgress | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    memory: int | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> tuple[list[Tensor], PassReport]:
    """Returns the metric of every cell, in order, and how that was done.

    A pass has at most `pass_tokens` positions, and takes about `memory` bytes where that is given.

    Raises `GrowthError` where the sweep has to be run another way; nothing is returned then.
    """
    arguments = dict(forward_kwargs or {})
    require_worth(model, cells, FEWEST)
    if ids_of(inputs) is None:
        raise GrowthError("these inputs have no input_ids")
    with torch.no_grad():
        sites = {
            part.site
            for cell in cells
            for part in flattened(cell.interventions)
            if hasattr(part, "first")
        }
        merged_first = MERGED not in sites or merges_first(model, inputs)
        jobs = _jobs(model, inputs, cells, merged_first)
        model.block_outputs(lambda: model(inputs, **arguments))
        starts = starts_of(jobs, arguments, inputs)
        clean, early = _beginnings(model, inputs, cells[0].base, jobs, starts, arguments)
        if any(starts) and not clean.keys:
            _warn_whole_rows(model)
        passes = _Passes(model, clean, early, cells[0].base, merged_first, pass_tokens, memory)
        scores: dict[int, Tensor] = {}

        def note(job: RowPlan, logits: Tensor) -> None:
            scores[job.index] = metric(logits)
            if on_progress is not None:
                on_progress(len(scores), len(cells))

        idle = idle_jobs(model, clean, jobs)
        for job in jobs:
            if job.index in idle:
                note(job, clean.logits)
        passes.report.idle = len(idle)
        for start, whole in groups_of(jobs, starts):
            group = [job for job in whole if job.index not in idle]
            start = start if clean.keys and _closed(clean, start) else 0
            while group:
                size = passes.cells_from(start)
                chunk, group = group[:size], group[size:]
                passes.check(chunk, start, alone=size == 1)
                for job, logits in passes.run(chunk, start):
                    note(job, logits)
    return [scores[i] for i in range(len(cells))], passes.report


@dataclass(eq=False)
class _Passes:
    """The growing passes of a sweep."""

    model: Any
    clean: Clean
    early: Early | None
    base: Sequence[Any]
    merged_first: bool
    tokens: int
    """Positions of a pass; fewer, once a pass has not fitted into memory."""
    memory: int | None
    report: PassReport = field(default_factory=PassReport)

    def cells_from(self, start: int) -> int:
        """Returns how many cells a pass from a position on has."""
        (batch, length), logits = self.clean.size, self.clean.logits
        rows = rows_within(
            self.model,
            length,
            start,
            logits.shape[1],
            logits.element_size(),
            pass_tokens=self.tokens,
            memory=self.memory,
        )
        return max(1, rows // batch)

    def check(self, chunk: Sequence[RowPlan], start: int, *, alone: bool) -> None:
        """Raises `GrowthError` unless noise comes out right in a pass of this kind.

        It goes through beside one of the jobs, in a pass of its own: whether a sweep is the
        first of its kind must not show in its numbers.
        """
        is_trimmed = bool(trimmed_of(self.model, self.clean, chunk))
        missing = unproved(self.model, self.clean, chunk, start, is_trimmed)
        for site, stage in missing.items():
            # Rows beside it need not be a job's own: what counts is that there are others.
            beside = replace(self._trimmed_as(chunk, is_trimmed), front=())
            try:
                off = self._verify(None if alone else beside, site, start)
            except torch.OutOfMemoryError:
                if alone:
                    raise
                off = self._verify(None, site, start)
            self.report.worst = max(self.report.worst, off)
            self.report.controls += 1
            prove(self.model, self.clean, site, stage, start, is_trimmed)

    def _verify(self, beside: RowPlan | None, site: str, start: int) -> float:
        early = Early(self.model, self.clean.inputs, None)
        control = partial(
            verify,
            self.model,
            self.clean,
            self.base,
            beside,
            site,
            start,
            lambda jobs, start: self._logits(jobs, start, early),
            merged_first=self.merged_first,
        )
        return attempt(control, "its control failed")

    def _trimmed_as(self, chunk: Sequence[RowPlan], is_trimmed: bool) -> RowPlan:
        """Returns a job of a chunk that alone decides how the last block runs."""
        return next(
            job for job in chunk if bool(trimmed_of(self.model, self.clean, [job])) == is_trimmed
        )

    def run(self, chunk: Sequence[RowPlan], start: int) -> list[tuple[RowPlan, Tensor]]:
        """Returns each job's logits, in smaller passes where one does not fit."""
        try:
            logits = self._logits(chunk, start, self.early)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            half = len(chunk) // 2
            self._shrink(half, start)
            parts = [chunk[i : i + half] for i in range(0, len(chunk), half)]
            return [x for part in parts for x in self.run(part, start)]
        self.report.passes += 1
        self.report.rows += len(chunk) * self.clean.size[0]
        self.report.starts.append(start)
        return list(zip(chunk, logits, strict=True))

    def _shrink(self, n_cells: int, start: int) -> None:
        """Makes all later passes as small as one of so many cells, and warns of it."""
        batch, length = self.clean.size
        self.tokens, before = n_cells * batch * (length - start), self.tokens
        warnings.warn(
            f"A pass of this sweep did not fit into memory with pass_tokens={before}; the rest "
            f"runs with pass_tokens={self.tokens}. Passes of another size give other last bits: "
            f"give pass_tokens={self.tokens} to have all passes of this size.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )

    def _logits(self, jobs: Sequence[RowPlan], start: int, early: Early | None) -> Tensor:
        """Returns what a pass of some jobs gives; `GrowthError` says why it cannot be had."""
        grown = Growing(self.model, self.clean, jobs, start, early)
        return attempt(grown.run, "a block refused the rows")


def _warn_whole_rows(model: Any) -> None:
    """Warns, once for a model, that its rows carry more positions than they need."""

    def warn() -> bool:
        why = whole_rows(model) or "its blocks do not run alike with a cache that only records"
        warnings.warn(
            f"Sweeps on {model.cfg.model_name} are slower than they could be: every row carries "
            f"all positions of the prompt, because {why}. The numbers are the same.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
        return True

    remember(model, "carries whole rows", warn)


def whole_rows(model: Any) -> str:
    """Returns why rows have to carry all positions, as far as the blocks' signatures say it."""
    lm = model.anatomy.lm.blocks
    taking = [cache_parameter(model.hf_model.get_submodule(block.path)) for block in lm]
    missing = sum(name is None for name in taking)
    if not missing:
        return ""
    return f"{missing} of its {len(lm)} blocks take no key-value cache (a transformers.Cache)"


def _jobs(
    model: Any, inputs: Mapping[str, Any], cells: Sequence[Cell], merged_first: bool
) -> list[RowPlan]:
    found = [
        job_of(model, inputs, cell, i, merged_first=merged_first) for i, cell in enumerate(cells)
    ]
    jobs = [job for job in found if job is not None]
    if len(jobs) != len(found):
        missing = counted(len(found) - len(jobs), "cell")
        raise GrowthError(
            f"rows cannot carry what {missing} would change (interventions of a class of the "
            "user's, or a base that acts after a cell's own)"
        )
    return jobs


def _beginnings(
    model: Any,
    inputs: Mapping[str, Any],
    base: Sequence[Any],
    jobs: Sequence[RowPlan],
    starts: Sequence[int],
    arguments: Mapping[str, Any],
) -> tuple[Clean, Early | None]:
    """Returns what rows begin with: the clean run's, and what jobs bring along themselves."""
    early = Early.of(model, inputs, jobs) if any(job.front for job in jobs) else None
    brings_all = early is not None and all(job.front for job in jobs) and not any(starts)
    if early and early.tower and brings_all and not base:
        # Nothing of the clean run's goes into such rows; once they are proved right, it is
        # not made.
        clean = uncleaned(model, inputs, arguments, early.tower.encoded)
        if clean is not None:
            alone = {bool(trimmed_of(model, clean, [job])) for job in jobs}
            together = {bool(trimmed_of(model, clean, jobs))}
            if not any(unproved(model, clean, jobs, 0, trims) for trims in alone | together):
                return clean, early
    stages = {job.stage for job in jobs}
    # Rows that bring their beginning along are held against all of the clean run's.
    needed = [] if early else [start for start, _ in groups_of(jobs, starts)]
    clean = _clean(model, inputs, base, stages, arguments, needed, any(starts))
    note_called(model, clean)
    return clean, early


def _clean(
    model: Any,
    inputs: Mapping[str, Any],
    base: Sequence[Any],
    stages: set[int],
    arguments: Mapping[str, Any],
    starts: Sequence[int],
    want_keys: bool,
) -> Clean:
    """Returns the clean run, its keys and values only where keeping them changes nothing.

    Where other sweeps may need it too, all of it is kept, else what rows from `starts` on need.
    """
    runs = None if base else open_runs(model)
    how = repr(sorted(arguments.items())), ways_of_attending(model)
    key = ("clean", content_of(inputs), how) if runs else ()
    kept = runs.get(key) if runs else None

    def run() -> Clean:
        keep = want_keys and keeps_keys(model, inputs, base, arguments)
        if kept and stages <= kept.residuals.keys() and (kept.keys or not keep):
            return kept
        needed = starts if keep and not runs else ()
        return run_clean(model, inputs, base, stages, arguments, keep, needed)

    clean = attempt(run, "its clean run failed")
    if runs and clean is not kept:
        runs.keep(key, clean, (clean.residuals, clean.keys, clean.encoded, clean.logits))
    return clean


def starts_of(
    jobs: Sequence[RowPlan], arguments: Mapping[str, Any], inputs: Mapping[str, Any]
) -> list[int]:
    """Returns, by job, the first position that its rows carry."""
    length = _length(inputs)
    starts = firsts_of(jobs, arguments, inputs)
    starts = [start if start >= SHORT * length else 0 for start in starts]
    if all(job.front for job in jobs) and sum(starts) <= length:
        return [0] * len(jobs)  # less than the clean run that whole rows can do without
    return starts


def firsts_of(
    jobs: Sequence[RowPlan], arguments: Mapping[str, Any], inputs: Mapping[str, Any]
) -> list[int]:
    """Returns, by job, the first position that its rows cannot do without."""
    length = _length(inputs)
    keep = arguments.get("logits_to_keep", 0)
    if not isinstance(keep, int):
        return [0] * len(jobs)
    # All positions (0): those before are the clean run's.
    last = length - keep if keep else length - 1
    return [max(0, min(job.first, last, length - 1)) for job in jobs]


def groups_of(jobs: Sequence[RowPlan], starts: Sequence[int]) -> list[tuple[int, list[RowPlan]]]:
    """Returns jobs whose rows begin near one another together, with where they all begin."""
    order = sorted(range(len(jobs)), key=lambda i: starts[i])
    near = NEAR * max(starts, default=0)
    groups: list[tuple[int, list[RowPlan]]] = []
    for i in order:
        if not groups or starts[i] - groups[-1][0] > near:
            groups.append((starts[i], []))
        groups[-1][1].append(jobs[i])
    return [(start, sorted(group, key=lambda job: job.stage)) for start, group in groups]


def _closed(clean: Clean, start: int) -> bool:
    return all(is_closed(mask, start) for mask in {id(m): m for m in clean.masks}.values())


def _length(inputs: Mapping[str, Any]) -> int:
    ids = ids_of(inputs)
    assert ids is not None
    return ids.shape[1]
