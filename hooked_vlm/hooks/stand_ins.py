"""Runs part of a model, with replacements for the other modules.

All functions run the wrapped model's own forward, so it computes positions (including
M-RoPE), masks and everything else before its layers.  `run_until` ends the pass before a
layer by an exception.  `skipping` makes the blocks below a layer return their input, which
takes almost no time; the caller then sets the residual stream at that layer.  `recording`
collects the outputs of a module in one pass, and `replaying` returns them in others.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.anatomy.source import first_argument
from hooked_vlm.anatomy.vision import Stack
from hooked_vlm.errors import HookError, UnknownHookError, UnsupportedModelError, counted
from hooked_vlm.hooks.compiled import eager
from hooked_vlm.hooks.sites import Site


class _Stopped(Exception):  # noqa: N818 - not an error
    """Carries the residual stream out of a forward pass that `run_until` ends."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


def layer_index(layer: int, n_layers: int, word: str) -> int:
    """Returns a layer as a non-negative number; `n_layers` means after the last."""
    if not isinstance(layer, Integral) or isinstance(layer, bool):
        raise UnknownHookError(f"{word}={layer!r} was given; expected the number of a layer.")
    if not -n_layers <= layer <= n_layers:
        raise UnknownHookError(
            f"{word}={layer} is out of range: this model has LM layers 0 to {n_layers - 1} "
            f"(and {n_layers} for after the last)."
        )
    return layer + n_layers if layer < 0 else layer


def uncached(model: nn.Module) -> dict[str, bool]:
    """Returns the keyword that turns off a model's key-value cache, if the model takes it."""
    own = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    known = "use_cache" in own or any(p.kind is p.VAR_KEYWORD for p in own.values())
    return {"use_cache": False} if known else {}


def run_until(model: nn.Module, lm: Stack, layer: int, run: Callable[[], Any]) -> Tensor:
    """Returns the residual stream before an LM block, and ends the pass of `run` there."""
    layer = layer_index(layer, len(lm.blocks), "stop_at_layer")
    stopped = lm.final_norm if layer == len(lm.blocks) else lm.blocks[layer].path
    if stopped is None:
        raise UnsupportedModelError(
            f"stop_at_layer={layer} is after the last block, and this model has no final norm to "
            f"stop at. Read blocks.{layer - 1}.hook_resid_post instead."
        )

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Stopped(first_argument(module, args, kwargs))

    handle = model.get_submodule(stopped).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with eager(model):
            run()
    except _Stopped as stopped:
        return stopped.residual
    finally:
        handle.remove()
    raise HookError(
        f"The forward pass ended before it reached LM layer {layer}. Check that the inputs run "
        "through the language model."
    )


@contextmanager
def ending_encoded(encoder: nn.Module | None, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Ends passes of `run_until` after the vision encoder, for the duration of a `with` block.

    Only where one call of the encoder is given all pixels of `inputs`: no other can follow.
    """
    visual = [name for name in inputs if name.startswith("pixel_values")]
    pixels = inputs.get("pixel_values")
    if encoder is None or len(visual) != 1 or not isinstance(pixels, Tensor):
        yield
        return

    def stop(module: nn.Module, args: tuple, kwargs: dict, _: Any) -> None:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.is_floating_point() and x.numel() == pixels.numel() for x in given):
            raise _Stopped(pixels)

    handle = encoder.register_forward_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's `forward` for the duration of a `with` block."""
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
    """Makes blocks return their input for the duration of a `with` block.

    `tuples` has for each block the length of the tuple whose first item is its hidden state
    (0: the block returns the hidden state alone).
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


def start_site(sites: Mapping[str, Site], layer: int, n_layers: int) -> str:
    """Returns the site of the residual stream before a block, or after the last one."""
    if layer < n_layers:
        return f"blocks.{layer}.hook_resid_pre"
    final = sites.get("ln_final.hook_in")
    is_written = final is not None and not final.read_only
    return "ln_final.hook_in" if is_written else f"blocks.{layer - 1}.hook_resid_post"


EMBEDDINGS = ("hook_embed", "hook_merged_embed")
"""Sites before the first block."""


def noting(own: Callable[..., Any], name: str, written: set[str]) -> Callable[..., Any]:
    """Returns a hook function that adds its site's name to `written` when `own` changes it."""

    def noted(activation: Any, hook: Any) -> Any:
        changed = own(activation, hook=hook)
        if changed is not None:
            written.add(name)
        return changed

    return noted


def returns_tuples(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[int]:
    """Returns the length of each block's output tuple (0: no tuple), measured in one pass."""
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
    """Collects copies of a module's outputs, call by call, for the duration of a `with` block."""
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
def keeping(module: nn.Module | None, found: list[Any]) -> Iterator[None]:
    """Replays a module's outputs, or adds them to `found` where that is empty.

    What is added is what its own forward returns, before any hook.  After an error nothing is.
    """
    if module is None or found:
        with replaying(module, found):
            yield
        return
    own, made = module.forward, []

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        made.append(copied(output))
        return output

    with standing_in(module, forward):
        yield
    found += made


@contextmanager
def replaying(module: nn.Module | None, outputs: Sequence[Any] | None) -> Iterator[None]:
    """Makes a module return recorded outputs, call by call, for the duration of a `with` block.

    Raises `HookError` when the module is called more often than in the recording.
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
                f"{type(module).__name__} was called more than {counted(len(outputs), 'time')}, "
                "which is the number of calls in the recording. Record and replay the same inputs."
            ) from None

    with standing_in(module, forward):
        yield


def copied(output: Any) -> Any:
    """Returns a copy, so that in-place changes by the model do not reach the recording."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, output)


def encoder_of(model: Any) -> nn.Module | None:
    """Returns the vision encoder's module, if there is one."""
    vision = model.anatomy.vision
    return None if vision is None else model.hf_model.get_submodule(vision.path)
