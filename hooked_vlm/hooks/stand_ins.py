"""Running part of a model, with something else in the place of the rest.

All of it runs the wrapped model's own forward, so positions (M-RoPE among them), masks and
whatever else it makes in front of its layers are its own.  `run_until` ends the pass by
an exception in front of a layer; `skipping` lets the layers below one pass their input on
unchanged, which costs nothing, and the caller puts the residual stream in there.
`recording` notes what a module returns in one pass, `replaying` returns it in others.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.anatomy.source import first_argument
from hooked_vlm.anatomy.vision import Stack
from hooked_vlm.errors import HookError, UnknownHookError, UnsupportedModelError


class _Stopped(Exception):  # noqa: N818 - it is no error
    """Carries the residual stream out of a forward pass that `run_until` ends."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


def layer_index(layer: int, n_layers: int, word: str, behind: bool = True) -> int:
    """Returns a layer counted from the front; `n_layers` means `behind` the last, if allowed."""
    if not -n_layers <= layer < n_layers + behind:
        more = f" (and {n_layers} for behind the last)" if behind else ""
        raise UnknownHookError(
            f"{word}={layer} is out of range: this model has LM layers 0 to {n_layers - 1}{more}."
        )
    return layer + n_layers if layer < 0 else layer


def uncached(model: nn.Module) -> dict[str, bool]:
    """Returns the keyword that keeps a model from making a key-value cache, if it takes that."""
    own = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    known = "use_cache" in own or any(p.kind is p.VAR_KEYWORD for p in own.values())
    return {"use_cache": False} if known else {}


def run_until(model: nn.Module, lm: Stack, layer: int, run: Callable[[], Any]) -> Tensor:
    """Returns the residual stream in front of an LM block, ending the pass of `run` there."""
    layer = layer_index(layer, len(lm.blocks), "stop_at_layer")
    behind = lm.final_norm if layer == len(lm.blocks) else lm.blocks[layer].path
    if behind is None:
        raise UnsupportedModelError("This model has no final norm to stop in front of.")

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Stopped(first_argument(module, args, kwargs))

    handle = model.get_submodule(behind).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Stopped as stopped:
        return stopped.residual
    finally:
        handle.remove()
    raise HookError(f"The forward pass ended before it reached LM layer {layer}.")


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Puts another `forward` in the place of a module's own, for the length of a `with` block."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own


@contextmanager
def skipping(blocks: Sequence[nn.Module], tuples: Sequence[int]) -> Iterator[None]:
    """Lets blocks return their input, for the length of a `with` block.

    `tuples` says which of them return their hidden state as the first of a tuple, by the
    length of that tuple (0: they return it alone).
    """

    def passed(block: nn.Module, length: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_argument(block, args, kwargs)
            return (hidden, *[None] * (length - 1)) if length else hidden

        return forward

    with ExitStack() as stack:
        for block, length in zip(blocks, tuples, strict=True):
            stack.enter_context(standing_in(block, passed(block, length)))
        yield


EMBEDDINGS = ("hook_embed", "hook_merged_embed")
"""Sites in front of the first block."""


def noting(own: Callable[..., Any], name: str, written: set[str]) -> Callable[..., Any]:
    """Returns a hook function that adds its site's name to `written` when it changes something."""

    def noted(activation: Any, hook: Any) -> Any:
        changed = own(activation, hook=hook)
        if changed is not None:
            written.add(name)
        return changed

    return noted


def returns_tuples(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[int]:
    """Returns how long a tuple each block returns (0: none), as one pass of `run` shows."""
    found = [0] * len(blocks)

    def note(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            found[i] = len(output) if isinstance(output, tuple) else 0

        return hook

    handles = [block.register_forward_hook(note(i)) for i, block in enumerate(blocks)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


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
