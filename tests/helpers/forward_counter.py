"""Counting forward passes: what is wrong should be said before the first of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from hooked_vlm.model.vlm import HookedVLM


@contextmanager
def count_forwards(model: HookedVLM) -> Iterator[list[int]]:
    """Yields a list that grows by one entry for every forward pass of the wrapped model."""
    calls: list[int] = []
    handle = model.hf_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()
