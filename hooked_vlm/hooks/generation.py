"""Which forward pass of a generation is in progress: the prefill, or a later step.

What is counted is what runs.  A pass continues another when it is given a key-value cache
that holds something, or the prompt of the prefill and more behind it.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hooked_vlm.anatomy.caches import caches_among, is_cache, prompts_among
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.hook_point import PassCounter


@contextmanager
def count_steps(model: nn.Module, run: PassCounter) -> Iterator[None]:
    """Counts the passes of a generation, and notes which of them repeat its prompt.

    Raises `HookError` in a pass that continues another, when the cache between them is of
    no kind that is known: its functions would act as if it were the first.
    """
    returned: list[weakref.ref] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caches, prompt = caches_among(args, kwargs), prompts_among(args, kwargs)
        run.repeats = not caches and _repeats(prompt, run.prompt)
        if run.repeats or any(cache.get_seq_length() for cache in caches):
            run.steps += 1
            return
        _refuse_unknown_cache((*args, *kwargs.values()), returned)
        if run.is_generation and run.steps >= 0:
            raise HookError(
                "One generation began twice: a later pass was given neither a key-value cache "
                f"that holds anything nor its prompt again (arguments: {', '.join(kwargs)}), so "
                "generated positions cannot be told from the prompt. Expected a transformers.Cache "
                "among the arguments. Generate with use_cache=False."
            )
        run.steps, run.prompt = 0, prompt

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        values = output.values() if isinstance(output, ModelOutput) else _values(output)
        kept = (value for value in values if not isinstance(value, Tensor))
        # Plain values, and tuples of tensors, take no weak references.
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


def _values(output: Any) -> Iterable[Any]:
    """Returns what a model's own kind of output holds."""
    if isinstance(output, tuple | list):
        return output
    return vars(output).values() if hasattr(output, "__dict__") else ()


def _repeats(given: Tensor | None, prompt: Tensor | None) -> bool:
    """Whether a pass without a cache is given the prompt of the prefill, and more behind it."""
    if given is None or prompt is None or given.ndim != prompt.ndim or len(given) != len(prompt):
        return False
    length = prompt.shape[1]
    return given.shape[1] > length and torch.equal(given[:, :length], prompt)


def _refuse_unknown_cache(given: Sequence[Any], returned: Sequence[weakref.ref]) -> None:
    """Raises `HookError` when a pass is given an object that the pass before it returned."""
    kept = [found for found in (ref() for ref in returned) if found is not None]
    strange = next((value for value in given if any(value is found for found in kept)), None)
    if strange is not None and not is_cache(strange):
        raise HookError(
            f"This pass was given the {type(strange).__name__} that the pass before returned, "
            "which is no key-value cache of a known kind: expected a transformers.Cache, or an "
            "object with get_seq_length(). Whether the pass continues a prompt is not known, so "
            "hook.step and prefill_only would be wrong. Generate with use_cache=False."
        )
