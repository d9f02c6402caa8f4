"""Detects which forward pass of a generation is in progress: the prefill, or a later step.

Each pass that runs is counted.  A pass continues the previous one when its arguments have a
non-empty key-value cache, or the prompt of the prefill followed by more tokens.  A prefill may
take several passes, each a chunk of the prompt; they are one step.

A pass is a call of the outermost module that runs.  That is not always the wrapped model: the
`generate` of some models calls that of the language model inside (BLIP-2), and a wrapper around
the model may call the model, or a module between the two.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hooked_vlm.anatomy.caches import (
    cached_positions,
    caches_among,
    is_cache,
    prompts_among,
)
from hooked_vlm.errors import HookError, counted
from hooked_vlm.hooks.checkpointing import has_gradient
from hooked_vlm.hooks.hook_point import PassCounter


@contextmanager
def at_each_pass(
    entries: Sequence[nn.Module],
    begin: Callable[[tuple, dict], None],
    end: Callable[[Any], None],
) -> Iterator[None]:
    """Calls functions before and after each pass, for the duration of a `with` block.

    `entries` are modules that contain one another, from the outside: whichever runs outermost
    makes the pass.  `end` is given its output, or None after an error.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        running.append(module)
        if len(running) == 1:
            begin(args, kwargs)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if running and running[-1] is module:  # else an error came before `enter`
            running.pop()
            if not running:
                end(output)

    handles = []
    for module in entries:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def count_steps(entries: Sequence[nn.Module], run: PassCounter) -> Iterator[None]:
    """Counts the passes of a generation, and records which of them repeat its prompt.

    Raises `HookError` in a pass that continues another with an unknown kind of cache, because
    it would be counted as a first pass.
    """
    returned: list[weakref.ref] = []

    def begin(args: tuple, kwargs: dict) -> None:
        run.owner.require_current()
        run.running = True
        caches, prompt = caches_among(args, kwargs), prompts_among(args, kwargs)
        run.n_new = 0 if caches else _new_tokens(prompt, run.prompt)
        start = cached_positions(caches)
        if run.steps == 0 and not run.n_new and _continues_prefill(run, start, prompt):
            return
        if run.n_new or start:
            run.steps += 1
            return
        _refuse_unknown_cache((*args, *kwargs.values()), returned)
        if run.is_generation and run.steps >= 0:
            raise HookError(
                "One generation began twice: a later pass was given neither a non-empty key-value "
                f"cache nor its prompt again (arguments: {', '.join(kwargs)}; expected a "
                "transformers.Cache among them), so generated positions cannot be distinguished "
                "from the prompt. Generate with use_cache=False."
            )
        run.steps, run.prompt = 0, prompt

    def end(output: Any) -> None:
        run.running = False
        run.has_gradient = has_gradient(output)
        values = output.values() if isinstance(output, ModelOutput) else _values(output)
        kept = (value for value in values if not isinstance(value, Tensor))
        # Plain values and tuples of tensors cannot be weakly referenced.
        returned[:] = [weakref.ref(v) for v in kept if type(v).__weakrefoffset__]

    with at_each_pass(entries, begin, end):
        yield


def _continues_prefill(run: PassCounter, start: int, prompt: Tensor | None) -> bool:
    """Whether a pass computes a further chunk of the prompt, after the `start` positions cached.

    Raises `HookError` where this is not known and would matter.
    """
    if not start or prompt is None or prompt.shape[1] == 1:
        return False
    if run.length is not None:
        return start < run.length
    if run.prefill_only:
        raise HookError(
            f"A pass of {counted(prompt.shape[1], 'token')} continues another, so it may be a "
            "chunk of the prompt, on which the hooks act, or come after it. Give the prompt, "
            "hooks(…, inputs=inputs), or use model.generate(inputs, fwd_hooks=…)."
        )
    return False


def _values(output: Any) -> Iterable[Any]:
    """Returns the values in an output that is not a transformers `ModelOutput`."""
    if isinstance(output, tuple | list):
        return output
    return vars(output).values() if hasattr(output, "__dict__") else ()


def _new_tokens(given: Tensor | None, prompt: Tensor | None) -> int:
    """Returns how many tokens an input has after the prompt of the prefill (0: no such prompt)."""
    if given is None or prompt is None or given.ndim != prompt.ndim or len(given) != len(prompt):
        return 0
    length = prompt.shape[1]
    repeats = given.shape[1] > length and torch.equal(given[:, :length], prompt)
    return given.shape[1] - length if repeats else 0


def _refuse_unknown_cache(given: Sequence[Any], returned: Sequence[weakref.ref]) -> None:
    """Raises `HookError` when a pass gets an object of the previous pass that is no known cache."""
    kept = [found for found in (ref() for ref in returned) if found is not None]
    strange = next((value for value in given if any(value is found for found in kept)), None)
    if strange is not None and not is_cache(strange):
        raise HookError(
            f"This pass was given the {type(strange).__name__} that the pass before returned, "
            "which is not a known kind of key-value cache: expected a transformers.Cache, or an "
            "object with get_seq_length(). It is unknown whether the pass continues a prompt, so "
            "hook.step and prefill_only would be wrong. Generate with use_cache=False."
        )
