"""Facts measured once for each model, and cached for the model's lifetime."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from hooked_vlm.anatomy.wrappers import modules_of


_KNOWN: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def remember(model: Any, question: Hashable, find_out: Callable[[], Any]) -> Any:
    """Returns the answer to a question about a model, measured the first time."""
    answers = _KNOWN.setdefault(model, {})
    if question not in answers:
        answers[question] = find_out()
    return answers[question]


def answer(model: Any, question: Hashable) -> Any:
    """Returns the answer to a question about a model that was measured before, or None."""
    return _KNOWN.get(model, {}).get(question)


def is_known(model: Any, question: Hashable) -> bool:
    """Whether the answer to a question about a model was measured."""
    return question in _KNOWN.get(model, {})


def forget_known(model: Any) -> None:
    """Forgets everything measured about a model, so that it is measured again."""
    _KNOWN.pop(model, None)


def ways_of_attending(model: Any) -> Hashable:
    """Returns how each part of a model, or module, attends, which may be changed at any time.

    With it, the torch hooks that neither we nor transformers have put there: what was found out
    about a model without them says nothing about one with them.
    """
    modules = modules_of(getattr(model, "hf_model", model))
    # Looking for a config where there is none takes long, and parts share a few.
    owners = (m for m in modules if "config" in m.__dict__ or hasattr(type(m), "config"))
    configs = {id(config): config for config in (getattr(m, "config", None) for m in owners)}
    attending = tuple(getattr(c, "_attn_implementation", None) for c in configs.values())
    return attending, tuple(number for m in modules if _is_hooked(m) for number in foreign_hooks(m))


def has_foreign_hooks(module: Any) -> bool:
    """Whether a module, or a part of it, has torch hooks of others."""
    return any(True for m in modules_of(module) if _is_hooked(m) for _ in foreign_hooks(m))


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def foreign_hooks(module: Any) -> Iterator[int]:
    """Yields the numbers of a module's torch hooks that are neither ours nor transformers'."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for number, fn in hooks.items():
            while isinstance(fn, partial):
                fn = fn.func
            owner = str(getattr(fn, "__module__", "")).split(".")[0]
            if owner not in ("transformers", "hooked_vlm"):
                yield number


def arithmetic(device: torch.device) -> tuple[torch.dtype | None, str]:
    """Returns how numbers are computed on a device, beside their dtype: may change at any time."""
    kind = device.type
    autocast = None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses it where the newer setting was used
        precision = str(torch.backends.cuda.matmul.fp32_precision)
    return autocast, precision


def shapes_of(value: Any) -> Hashable:
    """Returns shapes and dtypes of the tensors in a value, and the kind of everything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return tuple(shapes_of(part) for part in value)
    if isinstance(value, Mapping):
        return tuple((key, shapes_of(part)) for key, part in sorted(value.items()))
    return value if isinstance(value, str | int | bool | None) else type(value).__name__


def content_of(value: Any) -> Hashable:
    """Returns what a value holds: of tensors and arrays a digest, with their shapes and dtypes."""
    value = dict(sorted(value.items())) if isinstance(value, Mapping) else value
    leaves, spec = pytree.tree_flatten(value)
    return str(spec), *map(_content_of_leaf, leaves)


def _content_of_leaf(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype, _digest(x)
    if isinstance(x, np.ndarray):  # `str` leaves out the middle of a long one
        held = repr(x.tolist()).encode() if x.dtype.hasobject else x.tobytes()
        return x.shape, str(x.dtype), _hash_of(held)
    return str(x)


def number_of(x: Tensor) -> float:
    """Returns a whole number that stands for what a tensor holds."""
    return float(int(_digest(x)[:12], 16))


_DIGESTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By tensor (of views: what they are views of), its state and the digests made in it."""
_NUMBERS = count()
SAMPLED = 64
"""Values of a tensor of the host that are looked at to notice what its version does not tell."""


def _digest(x: Tensor) -> str:
    """Returns a digest of a tensor's values, from an earlier call unless it was written to.

    A tensor on `meta` has no values: each is taken to hold others.
    """
    if x.is_inference():  # has no version
        return _hashed(x)
    whole = x if x._base is None else x._base
    state = (whole._version, _sample(whole))
    if whole not in _DIGESTS or _DIGESTS[whole][0] != state:
        _DIGESTS[whole] = (state, {})
    made = _DIGESTS[whole][1]
    part = (x.storage_offset(), tuple(x.shape), x.stride(), x.dtype)
    if part not in made:
        made[part] = f"meta {next(_NUMBERS)}" if x.is_meta else _hashed(x)
    return made[part]


def _sample(x: Tensor) -> bytes:
    """Returns some values of a tensor that numpy may share, which writes without a new version."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return b""
    flat = x.detach().view(-1)
    return flat[:: max(1, len(flat) // SAMPLED)].contiguous().view(torch.uint8).numpy().tobytes()


def _hashed(x: Tensor) -> str:
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _hash_of(raw.data)


def _hash_of(held: bytes | memoryview) -> str:
    return blake2b(held, digest_size=16).hexdigest()
