"""The clean run of a sweep, with what cells start from: residuals, keys and values, vision."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.calls import forward_parameters
from hooked_vlm.errors import HookError
from hooked_vlm.growing.fitting import CACHES, MASK
from hooked_vlm.growing.prefix import Recorder
from hooked_vlm.known import shapes_of
from hooked_vlm.partial import uncached
from hooked_vlm.replay import encoder_of, recording


class GrowthError(HookError):
    """Why a model, or a sweep, cannot be run as one growing batch."""


@dataclass(frozen=True, eq=False)
class Clean:
    """One run without any cell's interventions (but under those that all cells share)."""

    inputs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    logits: Tensor
    residuals: Mapping[int, Tensor]
    """In front of blocks, by their number (n_layers: behind all)."""
    outputs: Mapping[int, Tensor]
    """What the block in front handed on, where the model adds something to that (`added`)."""
    added: Mapping[int, Tensor]
    """What a model adds between two blocks (visual features, in DeepStack), by the later one."""
    keys: Sequence[tuple[Tensor, Tensor]]
    """Each block's keys and values; empty where they were not asked for, or cannot be had."""
    masks: Sequence[Tensor | None]
    """Each block's attention mask."""
    encoded: Sequence[Any] | None
    """What each call of the vision encoder returned."""
    signature: Hashable
    """Shapes of everything that blocks were called with."""
    size: tuple[int, int]
    """Prompts and positions."""


def run_clean(
    model: Any,
    inputs: Mapping[str, Any],
    base: Sequence[Any],
    stages: set[int],
    arguments: Mapping[str, Any],
    want_keys: bool,
) -> Clean:
    """Runs the clean pass and keeps the residual stream at `stages`.

    Raises `GrowthError` for a model whose blocks do not hand on one residual stream.
    """
    blocks = blocks_of(model)
    n_layers = len(blocks)
    arguments = {**uncached(model.hf_model), **arguments}
    inputs_of: dict[int, Tensor] = {}
    outputs_of: dict[int, Tensor] = {}
    masks: list[Tensor | None] = [None] * n_layers
    recorders = [Recorder() for _ in blocks]
    signature: list[Hashable] = []

    def before(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs_of[i] = hidden_of(args, kwargs).detach()
            if i < n_layers:
                masks[i] = kwargs.get(MASK)
                signature.append(signature_of(args, kwargs))

        return hook

    def after(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            outputs_of[i] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    with ExitStack() as stack:
        encoded = stack.enter_context(recording(encoder_of(model)))
        # Their hooks come first, so that ours see what they changed.
        stack.enter_context(model.hooks(base, inputs=inputs))
        if want_keys:
            stack.enter_context(with_caches(blocks, recorders))
        for i, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(before(i), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after(i)).remove)
        norm = model.anatomy.lm.final_norm
        if norm is None:
            raise GrowthError("there is no final norm behind its blocks")
        last = model.hf_model.get_submodule(norm)
        handle = last.register_forward_pre_hook(before(n_layers), with_kwargs=True)
        stack.callback(handle.remove)
        logits = model(asked(inputs), **arguments)
    if len(inputs_of) != n_layers + 1 or any(x.ndim != 3 for x in inputs_of.values()):
        raise GrowthError("its blocks do not pass on one residual stream [batch, pos, d_model]")
    added = {}
    for i in range(n_layers):
        handed, taken = outputs_of[i].to(inputs_of[i + 1].device), inputs_of[i + 1]
        if not torch.equal(handed, taken):
            added[i + 1] = taken - handed
    keys = [recorder.found[0] for recorder in recorders if len(recorder.found) == 1]
    return Clean(
        inputs,
        arguments,
        logits,
        {stage: inputs_of[stage] for stage in sorted(stages)},
        {stage: outputs_of[stage - 1] for stage in added},
        added,
        keys if len(keys) == n_layers else (),
        masks,
        encoded or None,
        tuple(signature),
        (inputs_of[0].shape[0], inputs_of[0].shape[1]),
    )


def signature_of(args: tuple, kwargs: Mapping[str, Any]) -> Hashable:
    """Returns what a block was called with, by shapes and kinds."""
    return shapes_of((args, kwargs))


def asked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns inputs as the model is given them: labels, and with them a loss, are left out."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def blocks_of(model: Any) -> list[nn.Module]:
    """Returns the language model's blocks."""
    return [model.hf_model.get_submodule(block.path) for block in model.anatomy.lm.blocks]


def hidden_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Returns a block's residual stream among its arguments."""
    return args[0] if args else kwargs["hidden_states"]


def cache_name(block: nn.Module) -> str | None:
    """Returns the keyword under which a block takes a key-value cache, if it takes one."""
    return next((name for name in CACHES if name in forward_parameters(block)), None)


@contextmanager
def with_forwards(
    blocks: Sequence[nn.Module], wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Puts another `forward` in the place of each block's own, for the length of a `with` block."""
    own = [vars(block).get("forward") for block in blocks]
    try:
        for i, block in enumerate(blocks):
            block.forward = wrap(i, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


@contextmanager
def with_caches(blocks: Sequence[nn.Module], caches: Sequence[Any]) -> Iterator[None]:
    """Gives each block a cache of its own in the place of the model's."""

    def wrap(i: int, own: Callable[..., Any]) -> Callable[..., Any]:
        name = cache_name(blocks[i])
        if name is None:
            return own

        def forward(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **{**kwargs, name: caches[i]})

        return forward

    with with_forwards(blocks, wrap):
        yield
