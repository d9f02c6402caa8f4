"""Cells as rows of one growing batch, after a control for each kind of pass.

Before the first growing pass of a kind goes one with noise in it (`proofs`).  What it does to the
logits must be what it does in a plain pass, within rounding (`noise`); where it is not,
`GrowthError` says so and the sweep runs by a plainer way.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.engine.attempts import GrowthError, attempt, require_worth
from hooked_vlm.engine.batch import Growing, compared_jobs, trimmed_of
from hooked_vlm.engine.budget import PASS_TOKENS, reserve, row_bytes, rows_within
from hooked_vlm.engine.clean_run import (
    Clean,
    Metric,
    OnProgress,
    blocks_of,
    is_hooked_by_others,
    run_clean,
)
from hooked_vlm.engine.fingerprints import content_of, is_known, remember, ways_of_attending
from hooked_vlm.engine.folded_run import folds_under, is_separate, run_folded
from hooked_vlm.engine.folding import Layout
from hooked_vlm.engine.proofs import (
    keeps_keys,
    kind_of,
    note_called,
    prove,
    uncleaned,
    unproved,
    verify,
)
from hooked_vlm.engine.shared import open_runs
from hooked_vlm.engine.stages import MERGED, RowPlan, first_image_token, ids_of, job_of
from hooked_vlm.engine.starts import are_masks_closed, groups_of, starts_of, whole_rows
from hooked_vlm.engine.vision import Early, merges_first
from hooked_vlm.errors import HookedVLMWarning, callers_level, counted
from hooked_vlm.interventions.chain import Cell, flattened, is_located


FEWEST = 2
"""Cells from which on growing pays."""


@dataclass
class PassReport:
    """What a run took."""

    passes: int = 0
    rows: int = 0
    starts: list[int] = field(default_factory=list)
    common: tuple[int, int] | None = None
    """How many prompts went in how many rows, where prompts that share an image have one row."""
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
        rows = self.common and (self.common[0], counted(self.common[1], "row"))
        common = f"; {rows[0]} prompts in {rows[1]}" if rows else ""
        return (
            f"growing: {counted(self.passes, 'pass', 'passes')} of {counted(self.rows, 'row')}, "
            f"from positions {', '.join(map(str, sorted(set(self.starts))))}{common}{idle}"
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
    # 1. What rules growing out without a pass: a refusal then costs nothing.
    require_worth(model, cells, FEWEST)
    if ids_of(inputs) is None:
        raise GrowthError("these inputs have no input_ids")
    if is_hooked_by_others(model):
        raise GrowthError("torch hooks of others are on its blocks: they would see rows of cells")
    with torch.no_grad():
        # 2. Where each cell's rows join and start.  An edit of the merged embeddings may be made on
        # the rows only where these are the first block's input: that is measured where it counts.
        sites = {
            part.site
            for cell in cells
            for part in flattened(cell.interventions)
            if is_located(part)
        }
        merged_first = MERGED not in sites or merges_first(model, inputs)
        jobs = _jobs(model, inputs, cells, merged_first)
        # A pass of its own, once a model: it must not come within one whose calls are recorded.
        model.block_outputs(lambda: model(inputs, **arguments))
        starts = starts_of(jobs, arguments, inputs)
        # 3. One clean run, which the rows of all cells start from.
        clean, early = _beginnings(model, inputs, cells[0].base, jobs, starts, arguments)
        if any(starts) and not clean.keys:
            _warn_whole_rows(model)
        passes = _Passes(model, clean, early, cells[0].base, merged_first, pass_tokens, memory)
        scores: dict[int, Tensor] = {}

        def note(job: RowPlan, logits: Tensor) -> None:
            scores[job.index] = metric(logits)
            if on_progress is not None:
                on_progress(len(scores), len(cells))

        # 4. Cells that change nothing have the clean run's logits; cells that treat the prompts of
        # an image alike may have one row for them.
        idle, alike = compared_jobs(model, clean, jobs)
        for job in jobs:
            if job.index in idle:
                note(job, clean.logits)
        passes.report.idle = len(idle)
        # 5. The passes: those that start near one another together, as a pass has one start.
        for start, whole in groups_of(jobs, starts):
            # Without clean keys, or where a token before `start` sees one after it, rows are whole.
            start = start if clean.keys and are_masks_closed(clean, start) else 0
            left = [job for job in whole if job.index not in idle]
            layout = clean.fold and clean.fold.paying_layout(start)
            common = [job for job in left if job.index in alike] if layout else []
            if common and not passes.folds(common, start, layout):
                common = []
            apart = [job for job in left if job not in common]
            # Each pass is checked before its logits are taken: no score comes of an unproved kind.
            for group, how in ((common, layout), (apart, None)):
                while group:
                    size = passes.cells_from(start, how)
                    chunk, group = group[:size], group[size:]
                    passes.check(chunk, start, how, alone=size == 1)
                    for job, logits in passes.run(chunk, start, how):
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

    def cells_from(self, start: int, layout: Layout | None) -> int:
        """Returns how many cells a pass from a position on has."""
        prompts, sizes = self._sizes(start, layout)
        limits = {"pass_tokens": self.tokens, "memory": self.memory}
        return max(1, rows_within(self.model, *sizes, **limits) // prompts)

    def _sizes(self, start: int, layout: Layout | None) -> tuple[int, tuple[int, int, int, int]]:
        """Returns the rows of a cell, and what `row_bytes` takes of one."""
        (prompts, length), logits = self.clean.size, self.clean.logits
        carried = length - start
        if layout is not None:
            prompts, carried = layout.n_rows, layout.width
            length = carried + layout.kept_places.shape[1]
        return prompts, (length, length - carried, logits.shape[1], logits.element_size())

    @cached_property
    def _devices(self) -> set[torch.device]:
        """Where the blocks are."""
        return {p.device for block in blocks_of(self.model) for p in block.parameters()}

    def folds(self, jobs: Sequence[RowPlan], start: int, layout: Layout | None) -> bool:
        """Whether rows that prompts have in common are proved right for some jobs."""
        refused = ("no common rows", kind_of(self.model, self.clean, start, layout, False))
        if is_known(self.model, refused):
            return False
        size = self.cells_from(start, layout)
        try:
            for chunk in (jobs[i : i + size] for i in range(0, len(jobs), size)):
                self.check(chunk, start, layout, alone=size == 1)
        except GrowthError as error:
            why = str(error)
            remember(self.model, refused, lambda: why)
            return False
        return True

    def check(
        self, chunk: Sequence[RowPlan], start: int, layout: Layout | None, *, alone: bool
    ) -> None:
        """Raises `GrowthError` unless noise comes out right in a pass of this kind.

        It goes through beside one of the jobs, in a pass of its own: whether a sweep is the
        first of its kind must not show in its numbers.
        """
        is_trimmed = bool(trimmed_of(self.model, self.clean, chunk))
        missing = unproved(self.model, self.clean, chunk, start, layout, is_trimmed)
        for site, stage in missing.items():
            # Rows beside it need not be a job's own: what counts is that there are others.
            beside = replace(self._trimmed_as(chunk, is_trimmed), front=())
            try:
                off = self._verify(None if alone else beside, site, start, layout)
            except torch.OutOfMemoryError:
                if alone:
                    raise
                off = self._verify(None, site, start, layout)
            self.report.worst = max(self.report.worst, off)
            self.report.controls += 1
            prove(self.model, self.clean, site, stage, start, layout, is_trimmed)

    def _verify(
        self, beside: RowPlan | None, site: str, start: int, layout: Layout | None
    ) -> float:
        early = Early(self.model, self.clean.inputs, None)
        control = partial(
            verify,
            self.model,
            self.clean,
            self.base,
            beside,
            site,
            start,
            layout,
            lambda jobs: self._logits(jobs, start, early, layout),
            merged_first=self.merged_first,
        )
        return attempt(control, "its control failed")

    def _trimmed_as(self, chunk: Sequence[RowPlan], is_trimmed: bool) -> RowPlan:
        """Returns a job of a chunk that alone decides how the last block runs."""
        return next(
            job for job in chunk if bool(trimmed_of(self.model, self.clean, [job])) == is_trimmed
        )

    def run(
        self, chunk: Sequence[RowPlan], start: int, layout: Layout | None
    ) -> list[tuple[RowPlan, Tensor]]:
        """Returns each job's logits, in smaller passes where one does not fit."""
        prompts, sizes = self._sizes(start, layout)
        each = row_bytes(self.model, *sizes, scores=False)
        reserve(self._devices, len(chunk) * prompts * each)
        try:
            logits = self._logits(chunk, start, self.early, layout)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            half = len(chunk) // 2
            self._shrink(half, start, layout)
            parts = [chunk[i : i + half] for i in range(0, len(chunk), half)]
            return [x for part in parts for x in self.run(part, start, layout)]
        self.report.passes += 1
        self.report.rows += len(chunk) * (layout.n_rows if layout else self.clean.size[0])
        if layout is not None:
            self.report.common = self.clean.size[0], layout.n_rows
        self.report.starts.append(start)
        return list(zip(chunk, logits, strict=True))

    def _shrink(self, n_cells: int, start: int, layout: Layout | None) -> None:
        """Makes all later passes as small as one of so many cells, and warns of it."""
        batch, length = self.clean.size
        each = batch * (length - start) if layout is None else layout.prompts.size
        self.tokens, before = n_cells * each, self.tokens
        warnings.warn(
            f"A pass of this sweep did not fit into memory with pass_tokens={before}; the rest "
            f"runs with pass_tokens={self.tokens}. Passes of another size give other last bits: "
            f"give pass_tokens={self.tokens} to have all passes of this size.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )

    def _logits(
        self, jobs: Sequence[RowPlan], start: int, early: Early | None, layout: Layout | None
    ) -> Tensor:
        """Returns what a pass of some jobs gives; `GrowthError` says why it cannot be had."""
        grown = Growing(self.model, self.clean, jobs, start, early, layout)
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


def _jobs(
    model: Any, inputs: Mapping[str, Any], cells: Sequence[Cell], merged_first: bool
) -> list[RowPlan]:
    find_first = cache(partial(first_image_token, model, inputs))
    how = {"merged_first": merged_first, "first_image": find_first}
    found = [job_of(model, inputs, cell, i, **how) for i, cell in enumerate(cells)]
    jobs = [job for job in found if job is not None]
    if len(jobs) != len(found):
        missing = counted(len(found) - len(jobs), "cell")
        raise GrowthError(
            f"rows cannot carry what {missing} would change (interventions of the user's own "
            "that may act anywhere, sites of theirs outside blocks, or a base that acts after a "
            "cell's own)"
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
    if brings_all and not base:
        # Nothing of the clean run's goes into such rows; once they are proved right, it is
        # not made.
        clean = uncleaned(model, inputs, arguments)
        if clean is not None:
            alone = {bool(trimmed_of(model, clean, [job])) for job in jobs}
            together = {bool(trimmed_of(model, clean, jobs))}
            if not any(unproved(model, clean, jobs, 0, None, trims) for trims in alone | together):
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
    key: Hashable = ()
    if runs:
        how = content_of(arguments), ways_of_attending(model), is_separate(model)
        key = "clean", content_of(inputs), how
    kept = runs.get(key) if runs else None

    def run() -> Clean:
        keep = want_keys and keeps_keys(model, inputs, base, arguments)
        wanted = stages
        if kept:
            if stages <= kept.residuals.keys() and (kept.keys or not keep):
                return kept
            # It takes the place of what is kept: sweeps that alternate must both find theirs.
            wanted, keep = stages | kept.residuals.keys(), keep or bool(kept.keys)
        needed = starts if keep and not runs else ()
        make = partial(run_clean, model, inputs, base, wanted, arguments, keep, needed)
        if not folds_under(model, base):
            return make()
        return run_folded(model, inputs, lambda folding: make(folding=folding), arguments)

    clean = attempt(run, "its clean run failed")
    if runs and clean is not kept:
        runs.keep(key, clean, (clean.residuals, clean.keys, clean.encoded, clean.logits))
    return clean
