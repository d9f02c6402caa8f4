"""Noting what a module returns in one pass, and letting it return that in others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.errors import HookError
from hooked_vlm.partial import standing_in


@contextmanager
def recording(module: nn.Module | None) -> Iterator[list[Any]]:
    """Collects what a module returns, call by call, for the length of a `with` block."""
    found: list[Any] = []
    if module is None:
        yield found
        return
    handle = module.register_forward_hook(lambda _, args, output: found.append(copied(output)))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def replaying(module: nn.Module | None, outputs: Sequence[Any] | None) -> Iterator[None]:
    """Lets a module return recorded outputs, call by call, for the length of a `with` block.

    Raises `HookError` where it is called more often than was recorded.
    """
    if module is None or outputs is None:
        yield
        return
    waiting = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return copied(next(waiting))
        except StopIteration:
            raise HookError(
                f"{type(module).__name__} was called more often than the {len(outputs)} times "
                "that were recorded."
            ) from None

    with standing_in(module, forward):
        yield


def copied(output: Any) -> Any:
    """A copy, so that what a model does to an encoder's output in place is not kept."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, output)


def encoder_of(model: Any) -> nn.Module | None:
    """Returns the vision encoder's module, if there is one."""
    vision = model.anatomy.vision
    return None if vision is None else model.hf_model.get_submodule(vision.path)
