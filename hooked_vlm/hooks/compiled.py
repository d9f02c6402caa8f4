"""Runs compiled models eagerly while hooks are attached.

Compiled code holds the calls that were there when it was compiled: a hook that is attached later
does not run, and no guard of torch's notices.  Runs without hooks stay compiled.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import nn

from hooked_vlm.anatomy.wrappers import modules_of


def eager(model: nn.Module) -> AbstractContextManager[None]:
    """Returns a context in which what is compiled of a model runs eagerly.

    That is a module compiled in place (`module.compile()`), `torch.compile(module)`, a compiled
    `forward`, and the decoding steps that transformers compiles in `generate`.  The stance of
    torch's compiler holds for the whole process, so it is changed only where a part is compiled.
    """
    return _held(("eager", id(model)), lambda: _eagerly(model))


@contextmanager
def _eagerly(model: nn.Module) -> Iterator[None]:
    modules = modules_of(model)
    kinds = {type(module) for module in modules}
    generating = {kind for kind in kinds if hasattr(kind, "get_compiled_call")}
    with ExitStack() as stack:
        if any(map(_is_made_by_torch, [kind.forward for kind in kinds])) or any(
            map(_is_compiled, modules)
        ):
            stance = _held("stance", lambda: torch.compiler.set_stance("force_eager"))
            stack.enter_context(stance)
        for module in modules:
            if type(module) in generating:
                decoding = _held(("decoding", id(module)), lambda m=module: _decoding_eagerly(m))
                stack.enter_context(decoding)
        yield


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled in place, or its own `forward` is (`torch.compile(module)`)."""
    own = vars(module)  # a lookup by getattr would take most of the time of a run's preparation
    in_place = own.get("_compiled_call_impl") is not None
    return in_place or ("forward" in own and _is_made_by_torch(own["forward"]))


def _is_made_by_torch(function: Any) -> bool:
    """Whether a function is a compiled one, or wraps one."""
    made = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return made and not getattr(function, "_torchdynamo_disable", False)


@contextmanager
def _decoding_eagerly(module: nn.Module) -> Iterator[None]:
    """Makes `generate` call the model where it would call a compiled one."""
    vars(module)["get_compiled_call"] = MethodType(_uncompiled, module)
    try:
        yield
    finally:
        del vars(module)["get_compiled_call"]


def _uncompiled(module: nn.Module, *_: Any, **__: Any) -> Callable[..., Any]:
    return module.__call__


_HELD: dict[Hashable, tuple[list[None], ExitStack]] = {}
_LOCK = RLock()


@contextmanager
def _held(key: Hashable, make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Holds a context that several blocks share; whichever of them ends last closes it.

    Blocks of hooks may end in another order than they began, also on two wrappers of one model.
    """
    with _LOCK:
        if key not in _HELD:
            stack = ExitStack()
            stack.enter_context(make())
            _HELD[key] = [], stack
        _HELD[key][0].append(None)
    try:
        yield
    finally:
        with _LOCK:
            holders, stack = _HELD[key]
            holders.pop()
            if not holders:
                del _HELD[key]
                stack.close()
