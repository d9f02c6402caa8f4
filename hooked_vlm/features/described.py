"""Descriptions of places, by which stored features are recognised as those of the same place.

A place may be a function of the user's.  What it returns depends on its code, and on every value
that the code reads: constants, defaults, variables of the functions around it, and globals.
"""

import dataclasses
import dis
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooked_vlm.errors import DataError


_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis))
_BY_REPR = (*_PLAIN, Enum, PurePath, torch.dtype, torch.device)
_LASTING = FunctionType | type | ModuleType
_SLOTS = MemberDescriptorType | GetSetDescriptorType
_PATHS = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_OWN = str(Path(__file__).parents[1]) + os.sep


def described(place: Any, known: Mapping[int, str]) -> str:
    """Returns a name of a place and a digest of all that it depends on.

    `known` has names of objects by their `id`.  Raises `DataError` for a function that reads a
    value of which no exact description can be made.
    """
    made = hashlib.blake2b("\n".join(_parts(place, dict(known))).encode(), digest_size=16)
    name = getattr(place, "__qualname__", None) or str(place)
    label = type(place).__name__ if " at 0x" in name else name[:60]
    return f"{label} {made.hexdigest()}"


def _parts(value: Any, known: dict[int, str]) -> Iterator[str]:
    """Yields the description of a value in parts."""
    if isinstance(value, _BY_REPR):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in known:
        yield known[id(value)]
        return
    known[id(value)] = f"number {len(known)}"  # before its parts, which may hold it
    yield type(value).__qualname__
    yield from _parts_of_object(value, known)
    if not isinstance(value, _LASTING):  # another object may get its id
        del known[id(value)]


def _parts_of_object(value: Any, known: dict[int, str]) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}"
        yield _digest(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape} {_digest(value.tobytes())}"
    elif isinstance(value, Image.Image):
        yield f"{value.mode} {value.size} {_digest(value.tobytes())}"
    elif isinstance(value, re.Pattern):
        yield from _all([value.pattern, value.flags], known)
    else:
        yield from _parts_of_collection(value, known)


def _parts_of_collection(value: Any, known: dict[int, str]) -> Iterator[str]:
    """Yields what a collection holds; subclasses may hold more, so they are none."""
    kind = type(value)
    if kind in (list, tuple) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        yield from _all(value, known)
    elif isinstance(value, set | frozenset):  # in no order of their own
        yield from sorted("\n".join(_parts(x, dict(known))) for x in value)
    elif isinstance(value, dict):
        yield from _all([x for pair in value.items() for x in pair], known)
    else:
        yield from _parts_of_code(value, known)


def _parts_of_code(value: Any, known: dict[int, str]) -> Iterator[str]:
    if isinstance(value, ModuleType):
        yield _module(value)
    elif isinstance(value, CodeType):
        yield from _code(value, known)
    elif isinstance(value, FunctionType):
        yield from _function(value, known)
    elif isinstance(value, type):
        yield from _class(value, known)
    elif isinstance(value, MethodType | BuiltinFunctionType):
        yield value.__qualname__
        yield from _all([value.__self__, getattr(value, "__func__", None)], known)
    elif isinstance(value, partial):
        yield from _all([value.func, value.args, value.keywords], known)
    elif isinstance(value, staticmethod | classmethod):
        yield from _parts(value.__func__, known)
    elif isinstance(value, property):
        yield from _parts(value.fget, known)
    elif isinstance(value, _SLOTS):
        yield value.__name__
    else:
        yield from _instance(value, known)


def _all(values: Any, known: dict[int, str]) -> Iterator[str]:
    yield f"{len(values)} of"
    for value in values:
        yield from _parts(value, known)


def _function(function: FunctionType, known: dict[int, str]) -> Iterator[str]:
    """Yields a function's name, and unless it is installed, its code and what that reads."""
    yield f"{function.__module__}.{function.__qualname__}"
    if _is_installed(function.__code__.co_filename):
        return
    yield from _parts(function.__code__, known)
    yield from _all([function.__defaults__, function.__kwdefaults__], known)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            yield f"{name} empty"
            continue
        yield from _read(name, found, function, known)
    for name in sorted(_globals(function.__code__)):
        if name in function.__globals__:
            yield from _read(name, function.__globals__[name], function, known)


def _read(name: str, value: Any, function: FunctionType, known: dict[int, str]) -> Iterator[str]:
    yield name
    try:
        yield from _parts(value, known)
    except _UnknownKindError as error:
        raise DataError(
            f"the function {function.__qualname__} reads {name}, of type {type(value).__name__}, "
            f"and {error}"
        ) from None


def _code(code: CodeType, known: dict[int, str]) -> Iterator[str]:
    yield code.co_code.hex()
    yield from _all([code.co_names, code.co_varnames, code.co_freevars, code.co_consts], known)
    yield f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_posonlyargcount} {code.co_flags}"


def _globals(code: CodeType) -> set[str]:
    """Returns the names of the globals that code reads, also in functions inside it."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*map(_globals, inner))


def _class(kind: type, known: dict[int, str]) -> Iterator[str]:
    """Yields a class's name, and unless it is installed, what its author wrote in it."""
    yield f"{kind.__module__}.{kind.__qualname__}"
    if _is_of_others(kind):
        return
    for name, value in sorted(vars(kind).items()):
        is_made = name.startswith("_abc_") or (name.startswith("__") and name.endswith("__"))
        if name == "__call__" or not is_made:
            yield name
            yield from _parts(value, known)
    yield from _all(kind.__bases__, known)


def _instance(value: Any, known: dict[int, str]) -> Iterator[str]:
    kind = type(value)
    in_c = any(base.__module__ == "builtins" for base in kind.__mro__[:-1])
    if dataclasses.is_dataclass(value):
        state = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif not in_c and not isinstance(value, torch.nn.Module) and not _is_of_others(kind):
        state = getattr(value, "__dict__", None)
    else:  # part of its state may be outside Python
        wrapped = getattr(value, "__wrapped__", None)
        state = None if wrapped is None else {"__wrapped__": wrapped}
    if state is None:
        raise _UnknownKindError("its values cannot be compared exactly")
    yield from _all([kind, state], known)


class _UnknownKindError(DataError):
    """A value of a kind that is not known."""


def _module(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    if file is None or _is_installed(file):
        return module.__name__
    return f"{module.__name__} {_digest(Path(file).read_bytes())}"


def _is_of_others(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return kind.__module__ == "builtins" or _is_installed(getattr(module, "__file__", None))


def _is_installed(file: str | None) -> bool:
    """Whether code is of an installed package, which is not changed from run to run."""
    return file is not None and file.startswith(("<frozen", _OWN, *_PATHS))


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
