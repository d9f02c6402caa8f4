"""One pass of a growing batch through the wrapped model's own blocks.

The model's forward runs as ever on the clean prompts; each of its blocks is replaced for the pass.
A replaced block returns its clean input unchanged, and runs the original block on the rows that
have joined so far.  The last one returns the rows instead, so that the model's own norm and head
finish them.  Rows carry a suffix of their prompt; `Prefix` puts the clean run's keys and values
before theirs, where transformers' blocks expect a key-value cache.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.caches import cache_parameter
from hooked_vlm.anatomy.devices import sent
from hooked_vlm.anatomy.source import first_argument
from hooked_vlm.engine.arguments import Fit, Made, fitted_call
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.clean_run import (
    Clean,
    asked,
    blocks_of,
    signature_of,
    with_forwards,
)
from hooked_vlm.engine.folding import FoldedFit, Layout
from hooked_vlm.engine.fused import joined_rows
from hooked_vlm.engine.prefix import Prefix
from hooked_vlm.engine.stages import RowPlan, StageEdit, last_kept
from hooked_vlm.engine.vision import Early
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.stand_ins import encoder_of, replaying
from hooked_vlm.interventions.attended import PlacedAttend
from hooked_vlm.interventions.placing import is_square


@contextmanager
def last_position_only(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gives modules the last of the positions they are given, for the length of a `with` block.

    What they return is then added to all positions, of which only the last is right after it.
    """

    def last(module: nn.Module, args: tuple) -> tuple | None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3:
            return (args[0][:, -1:], *args[1:])
        return None

    handles = [module.register_forward_pre_hook(last) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def some_positions_only(modules: Sequence[nn.Module], columns: np.ndarray) -> Iterator[None]:
    """Gives modules some positions `[row, n]` of those they are given, for each job's rows.

    At the others they return zeros, which are added to what is not read.
    """
    lengths: list[int] = []

    def index(x: Tensor) -> tuple[Tensor, Tensor]:
        found = sent(torch.from_numpy(columns), x.device).repeat(len(x) // len(columns), 1)
        return torch.arange(len(x), device=x.device)[:, None], found

    def some(module: nn.Module, args: tuple) -> tuple:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            raise GrowthError("a part of its last block takes no [row, pos, d] first")
        lengths.append(args[0].shape[1])
        return (args[0][index(args[0])], *args[1:])

    def spread(module: nn.Module, args: tuple, output: Any) -> Any:
        found = output[0] if isinstance(output, tuple) else output
        whole = found.new_zeros(len(found), lengths.pop(), found.shape[-1])
        whole[index(found)] = found
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(some).remove)
            stack.callback(module.register_forward_hook(spread).remove)
        yield


def trimmed_of(model: Any, clean: Clean, jobs: Sequence[RowPlan]) -> list[nn.Module]:
    """Returns parts of the last block that need run for the last position alone, if it is scored.

    Attention's output map and the feed-forward part, if no job writes inside the block.
    """
    block = model.anatomy.lm.blocks[-1]
    last = len(model.anatomy.lm.blocks) - 1
    inside = [step for job in jobs for step in job.inside() if step.stage == last]
    if last_kept(clean.arguments) != 1 or inside or block.post_norm:
        return []
    paths = [block.attn and block.attn.out, block.mlp and block.mlp.path]
    return [model.hf_model.get_submodule(path) for path in paths if path]


def goes_alike(job: RowPlan) -> bool:
    """Whether a job does all it does where it joins, between two blocks: there it is compared."""
    return not job.front and all(step.between and step.stage == job.stage for step in job.steps)


def compared_jobs(model: Any, clean: Clean, jobs: Sequence[RowPlan]) -> tuple[set[int], set[int]]:
    """Returns jobs that change nothing, and jobs whose prompts can go in common rows.

    The first leave the residual stream as it is where they join, and do nothing else.  The others
    do to tokens that prompts share the same in each of them, and nothing later.
    """
    asked = [job for job in jobs if goes_alike(job)]
    if not asked:
        return set(), set()
    fold, first = clean.fold, clean.first
    frozen = None if fold is None else torch.from_numpy(fold.frozen(first)[:, first:])
    has_frozen = frozen is not None and bool(frozen.any())

    def compared(job: RowPlan) -> Tensor:
        joined = Growing(model, clean, [job], first).joined(job)
        is_same = (joined == clean.residuals[job.stage]).all(-1)
        is_alike = is_same.new_zeros(()) if fold is None else fold.agree(joined, first)
        if frozen is not None and has_frozen:
            is_alike &= (is_same | ~sent(frozen, is_same.device)).all()
        return torch.stack([is_same.all(), is_alike]).to(clean.logits.device)

    # All answers at once: on a GPU each one is waited for.
    answers = torch.stack([compared(job) for job in asked]).tolist()
    said = list(zip(asked, answers, strict=True))
    return {job.index for job, (idle, _) in said if idle}, {job.index for job, (_, a) in said if a}


class Growing:
    """Rows of some jobs, on their way through the blocks."""

    def __init__(
        self,
        model: Any,
        clean: Clean,
        jobs: Sequence[RowPlan],
        start: int,
        early: Early | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Takes jobs in the order of their stages; rows carry the positions from `start` on.

        `early` makes the rows of jobs that act before the blocks.  By `layout` prompts that share
        their beginning go in one row; else each has its own.
        """
        self.model, self.clean, self.start = model, clean, start
        self.jobs = list(jobs)
        self.batch, self.length = clean.size
        self.layout = layout
        self._fitted = Made()
        self.rows: Tensor | None = None
        self.n_joined = 0
        self.blocks = blocks_of(model)
        self.tuples = model.block_outputs(lambda: model(clean.inputs, **clean.arguments))
        self.points = model.hook_dict
        self.trimmed = trimmed_of(model, clean, jobs)
        # Sources are gathered here, once, for the jobs of this pass alone.
        self.edits = {id(s): self._edit(s) for job in self.jobs for s in job.steps}
        bringing = [job for job in self.jobs if job.front and early]
        # Where no clean run is made, the pass itself makes the last one's rows.
        self.leading = bringing.pop() if bringing and not clean.is_made else None
        self.early = early
        self.brought = {id(job): early.rows(job.front) for job in bringing if early}
        self.signature: list[Hashable] = []

    def run(self) -> Tensor:
        """Returns the logits `[job, batch, pos, d_vocab]` of every job."""
        inside = sorted({step.site for job in self.jobs for step in job.inside()})
        pairs = [(site, self._inside(site)) for site in inside]
        with ExitStack() as stack:
            if self.leading is not None and self.early is not None:
                stack.enter_context(self.early.under(self.leading.front))
            else:
                stack.enter_context(replaying(encoder_of(self.model), self.clean.encoded))
            stack.enter_context(self.model.hooks(pairs))
            stack.enter_context(with_forwards(self.blocks, self._forward))
            logits = self.model(asked(self.clean.inputs), **self.clean.arguments)
        if tuple(self.signature) != self.clean.signature:
            raise GrowthError("its blocks were called in another way than in the clean run")
        if len(logits) != len(self.jobs) * self.batch:
            raise GrowthError(f"{len(logits)} rows of logits came of {len(self.jobs)} cells")
        logits = logits.unflatten(0, (len(self.jobs), self.batch))
        missing = self.clean.logits.shape[1] - logits.shape[2]
        if missing > 0:  # all positions were asked for: those before are the clean run's
            front = self.clean.logits[:, :missing].expand(len(self.jobs), -1, -1, -1)
            logits = torch.cat([front, logits], dim=2)
        return logits

    def _forward(self, i: int, own: Callable[..., Any]) -> Callable[..., Any]:
        is_last = i == len(self.blocks) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_argument(self.blocks[i], args, kwargs)
            self.signature.append(signature_of(args, kwargs))
            if i == 0 and self.leading is not None:
                self.brought[id(self.leading)] = hidden.clone()
            self._between(i, hidden)
            if self.rows is not None:
                with self._last_only() if is_last else nullcontext():
                    args, kwargs = self._call(i, args, kwargs)
                    output = own(*args, **kwargs)
                self.rows = output[0] if isinstance(output, tuple) else output
            if is_last:
                self._between(i + 1, hidden)
                hidden = self._unfolded(self.rows)
            return (hidden, *[None] * (self.tuples[i] - 1)) if self.tuples[i] else hidden

        return forward

    def _between(self, stage: int, like: Tensor) -> None:
        """Lets jobs join before a block, and does what they do there."""
        self._edit_rows(stage, is_after=True)
        added = self.clean.added.get(stage)
        if added is not None and self.rows is not None:
            suffix = self._folded(added[:, self.start :].to(self.rows))
            self.rows = (self.rows.unflatten(0, (self.n_joined, -1)) + suffix).flatten(0, 1)
        self._edit_rows(stage, is_after=False)
        joining = [job for job in self.jobs[self.n_joined :] if job.stage == stage]
        if joining:
            made = joined_rows(
                self.model,
                self.clean,
                joining,
                self.start,
                lambda: torch.cat([self.joined(job) for job in joining]),
            )
            parts = [self.joined(job) for job in joining] if made is None else [made]
            parts = [self._folded(part.to(like.device)) for part in parts]
            before = [] if self.rows is None else [self.rows.to(like.device)]
            # Not one buffer of the final size: what blocks make of the rows would grow all the
            # same, and the buffer would be there beside it (`budget.reserve` is what helps).
            self.rows = torch.cat([*before, *parts])
            self.n_joined += len(joining)
            self._fitted.drop_single()

    def joined(self, job: RowPlan) -> Tensor:
        """Returns what a job's rows are before the block at which they join."""
        stage = job.stage
        steps, added = job.between(stage), self.clean.added.get(stage)
        if job.front:
            return self._edited(steps, self._brought(job))[:, self.start :]
        after = [step for step in steps if step.is_after]
        if added is None or not after:
            # A copy: a function of the user's may write into what it is given.
            kept = self.clean.residuals[stage][:, self.start - self.clean.first :].clone()
            for step in steps:
                kept = self._on_suffix(step, kept)
            return kept
        whole = self._edited(after, self.clean.outputs[stage].clone()) + added
        return self._edited(steps[len(after) :], whole)[:, self.start :]

    def _brought(self, job: RowPlan) -> Tensor:
        """Returns the blocks' input of a job that acts before them."""
        whole = self.brought[id(job)]
        if self.start:
            front = self.clean.residuals[0][:, : self.start]
            if not torch.equal(whole[:, : self.start], front):
                raise GrowthError("positions before an image changed with it")
        return whole

    def _edited(self, steps: Sequence[StageEdit], whole: Tensor) -> Tensor:
        for step in steps:
            whole = self._run_edit(step, whole)
        return whole

    def _edit_rows(self, stage: int, *, is_after: bool) -> None:
        """Does what jobs that have joined do between two blocks."""
        edits = [
            (slice(number * self.batch, (number + 1) * self.batch), step)
            for number, job in enumerate(self.jobs[: self.n_joined])
            for step in job.between(stage)
            if step.is_after == is_after
        ]
        if not edits:
            return
        assert self.rows is not None
        # What a block returns may be another's too, so one copy is written to, for all jobs.  A
        # function of the user's may keep what it is given, so it has a copy of its own.
        self.rows = self.rows.clone()
        for part, step in edits:
            edited = self._on_suffix(step, self.rows[part].clone())
            if (edited.shape, edited.dtype) != (self.rows[part].shape, self.rows.dtype):
                raise GrowthError(f"an edit of {step.site} returns another shape or dtype")
            self.rows[part] = edited

    def _call(self, i: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Returns what block i is called with, for the rows."""
        assert self.rows is not None
        block, layout = self.blocks[i], self.layout
        name = cache_parameter(block)
        needs_mask = layout is not None or bool(self.start and name)
        fitted = fitted_call(block, self._fit, self.rows, args, kwargs, needs_mask=needs_mask)
        if self.start and name is not None:
            keys = self.clean.keys[i]
            if layout is None:
                key, value = (x[:, :, : self.start] for x in keys)
            else:
                key, value = (layout.kept_keys(x) for x in keys)
            fitted[1][name] = Prefix(key, value, self.n_joined)
        return fitted

    @property
    def _fit(self) -> Fit:
        sizes = (self.batch, self.length, len(self.jobs), self.start, self._fitted)
        if self.layout is None:
            return Fit(*sizes, n_joined=self.n_joined)
        return FoldedFit(*sizes, n_joined=self.n_joined, layout=self.layout)

    def _folded(self, x: Tensor) -> Tensor:
        return x if self.layout is None else self.layout.folded(x)

    def _unfolded(self, x: Tensor | None) -> Tensor | None:
        return x if self.layout is None or x is None else self.layout.unfolded(x)

    def _last_only(self) -> AbstractContextManager[None]:
        if self.layout is None:
            return last_position_only(self.trimmed)
        return some_positions_only(self.trimmed, self.layout.last)

    # --- what jobs change ------------------------------------------------------------------

    def _edit(self, step: StageEdit) -> Callable[..., Any]:
        (found,) = step.part.hooks_for()
        return found[1]

    def _run_edit(self, step: StageEdit, whole: Tensor) -> Tensor:
        point: HookPoint = self.points[step.site]
        edited = self.edits[id(step)](whole, hook=point)
        return whole if edited is None else edited

    def _on_suffix(self, step: StageEdit, part: Tensor) -> Tensor:
        """Gives an edit a prompt's whole length; positions before the rows' are not changed."""
        point = self.points[step.site]
        if isinstance(step.part, PlacedAttend):  # it needs no more than it changes
            return step.part.edited(part, point, self.start)
        axis = 2 if is_square(step.part.where) else 1
        missing = self.length - part.shape[axis]
        if not self.start or not missing:  # all positions are there
            return self._run_edit(step, part)
        front = part.new_zeros(*part.shape[:axis], missing, *part.shape[axis + 1 :])
        whole = self._run_edit(step, torch.cat([front, part], dim=axis))
        return whole.narrow(axis, missing, part.shape[axis])

    def _inside(self, site: str) -> Callable[..., Any]:
        """Returns a hook function that does what each job does at a site inside a block."""

        def fn(activation: Tensor, hook: HookPoint) -> Tensor:
            if activation.shape[0] != self.n_joined * self.batch:
                raise GrowthError(f"{site} is not by prompt: {tuple(activation.shape)}")
            changed = activation.clone()
            for number, job in enumerate(self.jobs[: self.n_joined]):
                part = slice(number * self.batch, (number + 1) * self.batch)
                for step in job.inside():
                    if step.site == site:
                        changed[part] = self._on_suffix(step, changed[part])
            return changed

        return fn
