"""Finds a model inside modules that only pass calls on: compiled, adapted, parallel, sharded.

A wrapper may be outside of the whole model (`torch.compile(model)`, PEFT, `DataParallel`) or
around a part of it (a compiled, checkpointed or sharded block).  The anatomy is read as if
there were none, and its paths then lead through them to the modules inside.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from hooked_vlm.errors import UnsupportedModelError


Read = TypeVar("Read")

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch's compiled, checkpointed and sharded modules keep the module inside."""


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Returns every module once, in an order of its own: faster than `modules()`, for every run."""
    waiting, seen = [root], {root: None}
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in seen:
                seen[child] = None
                waiting.append(child)
    return list(seen)


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """Returns the module inside a wrapper of torch's that may be around a part of a model."""
    children = module._modules
    return next((children[name] for name in _INNER if children.get(name) is not None), None)


def bare(module: nn.Module) -> nn.Module:
    """Returns the layer to which an adapter's layer adds its own (PEFT's `base_layer`)."""
    while (inner := module._modules.get("base_layer")) is not None:
        module = inner
    return module


# --- around the whole model -----------------------------------------------------------------


def chain_of(given: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the given module, the modules inside it, and last the model that they wrap.

    Raises `UnsupportedModelError` for a wrapper with weights of its own (PEFT's prompt learning),
    which adds positions that no site and no grid knows, for a model on several devices by
    `DataParallel`, which runs copies, and for scripted modules, which run no hooks.
    """
    chain = [given]
    while (inner := _inside(chain[-1])) is not None:
        chain.append(inner)
    scripted = next((m for m in modules_of(given) if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise UnsupportedModelError(
            f"{type(given).__name__} contains a scripted or traced module "
            f"({type(scripted).__name__}), inside of which torch runs no hooks. Give the model "
            "that it was made from."
        )
    return tuple(chain)


def _inside(module: nn.Module) -> nn.Module | None:
    """Returns the module inside a wrapper of a whole model; None for a model."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        devices = module.device_ids or ()
        if len(devices) > 1:
            raise UnsupportedModelError(
                f"{type(module).__name__} runs copies of the model on {len(devices)} devices, and "
                f"hooks would act in each on a part of the batch. Give the model inside, "
                'wrapper.module, or load it with device_map="auto".'
            )
        return module.module
    # A model of transformers has these getters itself; a wrapper asks the module inside it.
    if hasattr(type(module), "get_input_embeddings") or not _passes_attributes_on(module):
        return None
    inner = wrapped_by(module)
    if inner is None:
        asked = [c for c in module.children() if hasattr(c, "get_input_embeddings")]
        inner = asked[0] if len(asked) == 1 else None
    if inner is not None:
        _require_no_more_weights(module, inner)
    return inner


def _passes_attributes_on(module: nn.Module) -> bool:
    return type(module).__getattr__ is not nn.Module.__getattr__


def _require_no_more_weights(module: nn.Module, inner: nn.Module) -> None:
    known = {id(parameter) for parameter in inner.parameters()}
    extra = [name for name, p in module.named_parameters() if id(p) not in known]
    if extra:
        raise UnsupportedModelError(
            f"{type(module).__name__} has weights ({extra[0][-50:]}) outside of the "
            f"{type(inner).__name__} that it wraps, as PEFT's prompt learning does: they add "
            "positions to the prompt that no site and no grid knows. Use an adapter inside the "
            "layers (LoRA), or give the model that it wraps."
        )


# --- around a part of the model -------------------------------------------------------------


def through_wrappers(read: Callable[[nn.Module], Read]) -> Callable[[nn.Module], Read]:
    """Decorates a function that reads an anatomy, to read it as if no part were wrapped."""

    @wraps(read)
    def reading(model: nn.Module) -> Read:
        with _without_wrappers(model) as any_wrapped:
            found = read(model)
        return _exact(found, model) if any_wrapped else found

    return reading


@contextmanager
def _without_wrappers(model: nn.Module) -> Iterator[bool]:
    """Puts the modules inside wrappers in the place of these, for the length of a `with` block."""
    taken = [
        (parent, name, child)
        for parent in modules_of(model)
        for name, child in parent._modules.items()
        if child is not None and wrapped_by(child) is not None
    ]
    try:
        for parent, name, child in taken:
            parent._modules[name] = _innermost(child)
        yield bool(taken)
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child


def _innermost(module: nn.Module) -> nn.Module:
    while (inner := wrapped_by(module)) is not None:
        module = inner
    return module


def _exact(value: Any, model: nn.Module) -> Any:
    """Returns a description whose paths lead to the modules inside wrappers."""
    if isinstance(value, str):
        return _exact_path(value, model)
    if isinstance(value, tuple):
        return tuple(_exact(item, model) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _exact(item, model) for name, item in named.items()})
    return value


def _exact_path(path: str, model: nn.Module) -> str:
    """Returns a path with the names by which wrappers keep modules; other words unchanged."""
    module, names = model, []
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return path
        module = child
        names.append(name)
        while (inner := wrapped_by(module)) is not None:
            names.append(next(n for n, m in module._modules.items() if m is inner))
            module = inner
    return ".".join(names)
