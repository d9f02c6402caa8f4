"""The clean run of a sweep, with what cells start from: residuals, keys and values, vision."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.caches import cache_parameter
from hooked_vlm.anatomy.source import first_argument
from hooked_vlm.engine.arguments import is_closed, mask_of
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.fingerprints import has_foreign_hooks, shapes_of
from hooked_vlm.engine.folding import Fold
from hooked_vlm.hooks.stand_ins import encoder_of, recording, standing_in, uncached
from hooked_vlm.interventions.chain import flattened, is_located


Metric = Callable[[Tensor], Tensor]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Clean:
    """One run without any cell's interventions (but under those that all cells share)."""

    inputs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    logits: Tensor
    residuals: Mapping[int, Tensor]
    """Before blocks, by their number (n_layers: after all), from position `first` on."""
    outputs: Mapping[int, Tensor]
    """What the block before returned, where the model adds something to that (`added`)."""
    added: Mapping[int, Tensor]
    """What a model adds between two blocks (visual features, in DeepStack), by the later one."""
    keys: Sequence[tuple[Tensor, Tensor]]
    """Each block's keys and values; empty where they were not asked for, or cannot be had."""
    masks: Sequence[Any]
    """Each block's attention mask: a tensor, FlexAttention's, or None."""
    encoded: Sequence[Any] | None
    """What each call of the vision encoder returned."""
    signature: Hashable
    """Shapes of everything that blocks were called with."""
    size: tuple[int, int]
    """Prompts and positions."""
    first: int = 0
    """The first position of `residuals`."""
    base_sites: tuple[str, ...] = ()
    """Where what all cells begin with acts."""
    fold: Fold | None = None
    """Which tokens of its prompts are the same, where its blocks ran on rows of a fold."""
    is_made: bool = True
    """False where it is only known how it would call the blocks."""


def run_clean(
    model: Any,
    inputs: Mapping[str, Any],
    base: Sequence[Any],
    stages: set[int],
    arguments: Mapping[str, Any],
    want_keys: bool,
    starts: Sequence[int] = (),
    folding: Any = None,
) -> Clean:
    """Runs the clean pass and keeps the residual stream at `stages`.

    Where `starts` says from which positions on rows will go, only what they need is kept.
    `folding` (see `folded_run.Folding`) stands in for the blocks.

    Raises `GrowthError` for a model whose blocks do not return one residual stream.
    """
    # 1. What takes notes.  The model's own cache is off: nothing is generated, and recorders take
    # its place where keys are wanted.
    blocks = blocks_of(model)
    n_layers = len(blocks)
    arguments = {**uncached(model.hf_model), **arguments}
    seen = _Seen(n_layers, stages, starts)
    unfolded = folding.unfolded_keys if folding else None
    recorders = [Recorder(max(starts, default=None), unfolded) for _ in blocks]
    # 2. One pass under all of it.
    with ExitStack() as stack:
        encoded = stack.enter_context(recording(encoder_of(model)))
        # Their hooks come first, so that ours see what they changed.
        stack.enter_context(model.hooks(base, inputs=inputs))
        if want_keys:
            stack.enter_context(with_caches(blocks, recorders))
        if folding:  # around the caches: rows are fitted to a call without any
            stack.enter_context(with_forwards(blocks, folding.wrap))
        for i, block in enumerate(blocks):
            before = block.register_forward_pre_hook(seen.before(i), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(block.register_forward_hook(seen.after).remove)
        # The stream after all blocks is read before the norm, which logits alone do not give.
        norm = model.anatomy.lm.final_norm
        if norm is None:
            raise GrowthError("there is no final norm after its blocks")
        last = model.hf_model.get_submodule(norm)
        handle = last.register_forward_pre_hook(seen.before(n_layers), with_kwargs=True)
        stack.callback(handle.remove)
        logits = model(asked(inputs), **arguments)
    # 3. Whether rows can start from what was noted: the stream is known only now.
    if len(seen.shapes) != n_layers + 1 or any(len(shape) != 3 for shape in seen.shapes.values()):
        raise GrowthError("its blocks do not pass on one residual stream [batch, pos, d_model]")
    # A block that updates its cache twice, or never, keeps something else than keys by token.
    keys = [recorder.found[0] for recorder in recorders if len(recorder.found) == 1]
    keys = keys if len(keys) == n_layers else []
    if seen.first and not (keys and seen.is_closed()):  # a later block looks ahead, or keeps none
        return run_clean(model, inputs, base, stages, arguments, want_keys, (), folding)
    return Clean(
        inputs,
        arguments,
        logits,
        {stage: seen.residuals[stage] for stage in sorted(stages)},
        seen.outputs,
        seen.added,
        keys,
        seen.masks,
        encoded or None,
        tuple(seen.signature),
        (seen.shapes[0][0], seen.shapes[0][1]),
        seen.first,
        tuple(sorted(part.site for part in flattened(base) if is_located(part))),
        folding.fold if folding else None,
    )


class _Seen:
    """What passes between blocks of a clean run, as far as it is kept."""

    def __init__(self, n_layers: int, stages: set[int], starts: Sequence[int]) -> None:
        self.n_layers, self.stages, self.starts = n_layers, stages, starts
        self.first = min(starts, default=0)
        """The first position of what is kept of the residual stream."""
        self.residuals: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}
        self.masks: list[Any] = [None] * n_layers
        self.signature: list[Hashable] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self._handed: Tensor | None = None

    def before(self, i: int) -> Callable[..., None]:
        """Returns a hook before block i, or after all."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = first_argument(module, args, kwargs)
            taken = given.detach()
            self.shapes[i] = tuple(taken.shape)
            if i < self.n_layers:
                self.masks[i] = mask_of(args, kwargs, taken.shape[1])
                self.signature.append(signature_of(args, kwargs))
            if i == 0 and not self.is_closed():
                self.first = 0
            # The same tensor object means that nothing was added, so its numbers are not compared.
            if self._handed is not None and given is not self._handed:
                handed = self._handed.detach().to(taken.device)
                if not torch.equal(handed, taken):
                    self.added[i], self.outputs[i] = taken - handed, handed
            if i in self.stages:
                self.residuals[i] = taken[:, self.first :].clone() if self.first else taken

        return hook

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Is the hook after every block: notes what it returned."""
        self._handed = output[0] if isinstance(output, tuple) else output

    def is_closed(self) -> bool:
        """Whether, by the masks so far, nothing before a start looks ahead of it."""
        masks = {id(mask): mask for mask in self.masks}.values()
        return all(is_closed(mask, start) for mask in masks for start in {*self.starts})


def signature_of(args: tuple, kwargs: Mapping[str, Any]) -> Hashable:
    """Returns what a block was called with, by shapes and kinds."""
    return shapes_of((args, kwargs))


def asked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns inputs as the model is given them: labels, and with them a loss, are left out."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def blocks_of(model: Any) -> list[nn.Module]:
    """Returns the language model's blocks."""
    return [model.hf_model.get_submodule(block.path) for block in model.anatomy.lm.blocks]


def is_hooked_by_others(model: Any) -> bool:
    """Whether blocks have torch hooks that are neither ours nor transformers'.

    Such a hook would see rows of cells, or of several prompts, where it expects prompts.
    """
    return any(map(has_foreign_hooks, blocks_of(model)))


@contextmanager
def with_forwards(
    blocks: Sequence[nn.Module], wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Puts another `forward` in the place of each block's own, for the length of a `with` block."""
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.enter_context(standing_in(block, wrap(i, block.forward)))
        yield


@contextmanager
def with_caches(blocks: Sequence[nn.Module], caches: Sequence[Any]) -> Iterator[None]:
    """Gives each block a cache of its own in the place of the model's."""

    def wrap(i: int, own: Callable[..., Any]) -> Callable[..., Any]:
        name = cache_parameter(blocks[i])
        if name is None:
            return own

        def forward(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **{**kwargs, name: caches[i]})

        return forward

    with with_forwards(blocks, wrap):
        yield


class Recorder:
    """Notes the keys and values that a block makes, and hands them back as they are."""

    def __init__(
        self, last: int | None = None, whole: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Notes the positions before `last`; all, where there is none.

        `whole` gives the prompts' keys back, where blocks run on rows of another kind.
        """
        self.last, self.whole = last, whole
        self.found: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with `[batch, head, pos, d]`."""
        self.found.append((self._kept(key), self._kept(value)))
        return key, value

    def _kept(self, x: Tensor) -> Tensor:
        x = x.detach() if self.whole is None else self.whole(x.detach())
        # A copy: a view would keep all of it.
        return x if self.last is None else x[:, :, : self.last].clone()

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing has come before."""
        return 0
