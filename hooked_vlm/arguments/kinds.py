"""Annotations of arguments that take part of a type: a range of numbers, or what has methods.

>>> from hooked_vlm.arguments.checked import checked
>>> from hooked_vlm.errors import DataError
>>> @checked(DataError)
... def drawn(n: Count) -> int:
...     return n
>>> drawn(0)
Traceback (most recent call last):
    ...
hooked_vlm.errors.DataError: drawn was given n=0; expected a whole number of at least 1.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.errors import HookedVLMError


class Kind(NamedTuple):
    """What an argument may be, as a condition and in words."""

    accepts: Callable[[Any], bool]
    words: str
    names: tuple[str, ...] = ()
    """The texts that it accepts, where these are names."""


def is_bool(value: Any) -> bool:
    """Whether a value is a bool of Python's or numpy's."""
    return isinstance(value, bool | np.bool_)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number that torch and numpy can hold."""
    return isinstance(value, Integral) and not is_bool(value) and -(2**63) <= int(value) < 2**64


def is_number(value: Any) -> bool:
    """Whether a value is a number that torch and numpy compute with; fractions are none."""
    return isinstance(value, float | np.floating) or is_whole(value)


def has_values(value: Any) -> bool:
    """Whether a value is no tensor that is sparse or on the meta device."""
    return not isinstance(value, Tensor) or (value.layout == torch.strided and not value.is_meta)


def is_filled(text: Any) -> bool:
    """Whether a value is a text with more than blanks.

    `Path("")` is the current folder, so an empty text in place of a path would be read as one.
    """
    return isinstance(text, str) and bool(text.strip())


def is_path(value: Any) -> bool:
    """Whether a value is a path, or a text that names one."""
    return isinstance(value, Path) or is_filled(value)


def one_of(names: Iterable[str]) -> Kind:
    """Returns the kind of an argument that is one of some names."""
    known = tuple(names)
    return Kind(lambda name: name in known, f"one of {', '.join(known)}", known)


def _is_device(name: Any) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


Count: TypeAlias = Annotated[int, Kind(lambda n: n >= 1, "a whole number of at least 1")]
Seed: TypeAlias = Annotated[
    int, Kind(lambda n: 0 <= n < 2**64, "a whole number of at least 0 (and below 2**64)")
]
Whole: TypeAlias = Annotated[int, Kind(lambda n: n >= 0, "a whole number of at least 0")]
Name: TypeAlias = Annotated[str, Kind(is_filled, "a text that is not empty or blank")]
File: TypeAlias = Annotated[
    str | Path, Kind(is_path, "the path of a file (a text that is not empty, or a Path)")
]
Finite: TypeAlias = Annotated[float | int, Kind(math.isfinite, "a finite number")]
NotNegative: TypeAlias = Annotated[
    float | int, Kind(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
]
Share: TypeAlias = Annotated[float | int, Kind(lambda x: 0 < x < 1, "a number between 0 and 1")]
Model: TypeAlias = Annotated[
    Any, Kind(lambda model: hasattr(model, "hf_model") and hasattr(model, "sites"), "a HookedVLM")
]
Processor: TypeAlias = Annotated[
    Any,
    Kind(
        lambda p: p is None or callable(p) or hasattr(p, "tokenizer"),
        "a processor of transformers, or None",
    ),
]
Device: TypeAlias = Annotated[
    str | torch.device, Kind(_is_device, "cpu, cuda, cuda:1, mps or a torch device")
]
OptionalDevice: TypeAlias = Annotated[
    str | torch.device | None,
    Kind(lambda d: d is None or _is_device(d), "cpu, cuda, cuda:1, mps, a torch device or None"),
]


def device_and_dtype(
    where: Sequence[Any], device: Any, dtype: Any, error: type[HookedVLMError]
) -> tuple[Any, Any]:
    """Returns the device and the dtype among the arguments of a `to`, by place or by name."""
    for given in where:
        if isinstance(given, torch.dtype):
            dtype = given
        else:
            device = given
    right = device is None or (isinstance(device, str | torch.device) and _is_device(device))
    if not right or not isinstance(dtype, torch.dtype | None) or device is dtype is None:
        given = ", ".join(repr(each)[:40] for each in (device, dtype) if each is not None)
        raise error(
            f"to was given {given or 'nothing'}; expected a device (cpu, cuda, cuda:1, mps), a "
            "torch dtype, or both."
        )
    return device, dtype
