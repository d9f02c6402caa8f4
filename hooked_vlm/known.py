"""What is found out once for a model, and kept as long as the model is."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor


_KNOWN: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def known(model: Any, question: Hashable, find_out: Callable[[], Any]) -> Any:
    """Returns the answer to a question about a model, found out the first time."""
    answers = _KNOWN.setdefault(model, {})
    if question not in answers:
        answers[question] = find_out()
    return answers[question]


def forget_known(model: Any) -> None:
    """Lets everything about a model be found out anew."""
    _KNOWN.pop(model, None)


def ways_of_attending(model: Any) -> Hashable:
    """Returns how each tower of a model computes attention, which may be changed at any time."""
    configs = [module.config for module in model.hf_model.modules() if hasattr(module, "config")]
    return tuple(getattr(config, "_attn_implementation", None) for config in configs)


def shapes_of(value: Any) -> Hashable:
    """Returns shapes and dtypes of the tensors in a value, and the kind of everything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return tuple(shapes_of(part) for part in value)
    if isinstance(value, Mapping):
        return tuple((key, shapes_of(part)) for key, part in sorted(value.items()))
    return value if isinstance(value, str | int | bool | None) else type(value).__name__
