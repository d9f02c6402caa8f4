"""Detects which forward pass of a generation is in progress: the prefill, or a later step.

Each pass that runs is counted.  A pass continues the previous one when its arguments have a
non-empty key-value cache, or the prompt of the prefill followed by more tokens.  A prefill may
take several passes, each a chunk of the prompt; they are one step.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
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
from hooked_vlm.hooks.hook_point import PassCounter


@contextmanager
def count_steps(model: nn.Module, run: PassCounter) -> Iterator[None]:
    """Counts the passes of a generation, and records which of them repeat its prompt.

    Raises `HookError` in a pass that continues another with an unknown kind of cache, because
    it would be counted as a first pass.
    """
    returned: list[weakref.ref] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        run.owner.require_current()
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

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        values = output.values() if isinstance(output, ModelOutput) else _values(output)
        kept = (value for value in values if not isinstance(value, Tensor))
        # Plain values and tuples of tensors cannot be weakly referenced.
        returned[:] = [weakref.ref(v) for v in kept if type(v).__weakrefoffset__]

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
