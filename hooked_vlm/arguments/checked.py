"""Compares the arguments of a public function with its annotations, before the function begins.

Without this a wrong type fails late, somewhere inside, with an error of Python's or torch's that
does not name the argument.  beartype, which the tests use, checks the same annotations, but with
messages of thousands of characters.

Types are taken loosely where code commonly is: any sequence is one (also an array), numpy's
numbers are numbers, and a whole number is a number.  A bool is not, and a text is no sequence.
Arrays are compared with their jaxtyping dtype and axes; an axis has one size in all arguments.
It is bound in a context of `call`, in place of which the tests' import hook would open one for each
function below: hence `no_type_check`.
"""

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
    no_type_check,
)

import numpy as np
import torch
from jaxtyping import jaxtyped
from torch import Tensor

from hooked_vlm.arguments.kinds import Kind, has_values, is_bool, is_number, is_path, is_whole
from hooked_vlm.errors import HookedVLMError, did_you_mean


F = TypeVar("F", bound=Callable[..., Any])

_MOST_ITEMS = 1000
"""Items of a sequence that are looked at; more would cost time where nothing else does."""


def checked(
    error: type[HookedVLMError],
    *,
    but: Collection[str] = (),
    only_names: bool = False,
    missing: str = "",
) -> Callable[[F], F]:
    """Returns a decorator that raises `error` for arguments that do not fit their annotations.

    So it does for a misspelt and for a missing argument.  A class is decorated for its
    `__init__`.  `but` are the arguments that the function checks itself; with `only_names` it
    checks all of them.  `missing` is what to do where an argument is missing.  Not for what runs
    inside loops: a call takes some microseconds more.

    >>> from hooked_vlm.errors import DataError
    >>> @checked(DataError)
    ... def mean(values: Sequence[float]) -> float:
    ...     return sum(values) / len(values)
    >>> mean([1, "2"])
    Traceback (most recent call last):
        ...
    hooked_vlm.errors.DataError: mean was given values=[1, '2']; expected a sequence of numbers.
    >>> mean(valeus=[1.0])
    Traceback (most recent call last):
        ...
    hooked_vlm.errors.DataError: mean takes no argument 'valeus'. Did you mean 'values'?
    """

    def decorate(function: Any) -> Any:
        if isinstance(function, type):
            kind: Any = function
            kind.__init__ = _wrapped(kind.__init__, error, plan)
            return kind
        return _wrapped(function, error, plan)

    def plan(function: Callable[..., Any]) -> "_Plan":
        return _Plan(function, but, only_names, missing)

    return decorate


@no_type_check
def _wrapped(
    function: Callable[..., Any],
    error: type[HookedVLMError],
    planned: Callable[[Callable[..., Any]], "_Plan"],
) -> Callable[..., Any]:
    plan: list[_Plan] = []  # made at the first call: annotations may name classes defined later

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not plan:
            plan.append(planned(function))
        if plan[0].has_arrays:
            with jaxtyped("context"):
                wrong = plan[0].wrong(args, kwargs)
        else:
            wrong = plan[0].wrong(args, kwargs)
        if wrong:
            raise error(wrong)
        return function(*args, **kwargs)

    return call


def require(
    owner: str, values: Mapping[str, Any], hints: Mapping[str, Any], error: type[HookedVLMError]
) -> None:
    """Raises `error` for a value that does not fit its annotation: what `checked` cannot see."""
    for name, hint in hints.items():
        kind = kind_of(hint)
        if kind is not None and not kind.accepts(values[name]):
            raise error(f"{owner} was given {name}={shown(values[name])}; expected {kind.words}.")


@no_type_check
class _Plan:
    """What a function takes, read from its signature once."""

    def __init__(
        self, function: Callable[..., Any], but: Collection[str], only_names: bool, missing: str
    ) -> None:
        parameters = inspect.signature(function).parameters.values()
        hints = {} if only_names else get_type_hints(function, include_extras=True)
        hints = {n: hint for n, hint in hints.items() if n != "return" and n not in but}
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        *_, owner, self.name = f".{function.__qualname__}".split(".")
        if self.name == "__init__":
            self.name = owner
        self.missing = f" {missing}" if missing else ""
        self.has_arrays = any(map(_has_array, hints.values()))
        self.places = [p.name for p in parameters if p.kind in by_place]
        self.known = {p.name for p in parameters if p.kind not in stars}
        self.needed = [p for p in parameters if p.name in self.known and p.default is p.empty]
        self.more_places = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.more_names = any(p.kind is p.VAR_KEYWORD for p in parameters)
        found = {n: kind_of(hint) for n, hint in hints.items()}
        self.kinds = {n: kind for n, kind in found.items() if kind is not None}
        starred = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
        self.places_after = self.kinds.get(starred)

    def wrong(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Returns what is wrong with a call, or an empty text."""
        for place, value in zip(self.places, args, strict=False):
            kind = self.kinds.get(place)
            if kind is not None and not kind.accepts(value):
                return self._unfit(place, value, kind)
        for value in args[len(self.places) :]:
            if not self.more_places:
                said = f"{self.name} takes {len(self.places)} arguments by place, not {len(args)}."
                return said + self.missing
            if self.places_after is not None and not self.places_after.accepts(value):
                return self._unfit("", value, self.places_after)
        for name, value in kwargs.items():
            if name not in self.known and not self.more_names:
                names = [known for known in self.known if known != "self"]
                return f"{self.name} takes no argument {name[:80]!r}.{did_you_mean(name, names)}"
            kind = self.kinds.get(name)
            if kind is not None and not kind.accepts(value):
                return self._unfit(name, value, kind)
        given = self.places[: len(args)]
        missing = [p.name for p in self.needed if p.name not in kwargs and p.name not in given]
        if missing:
            return f"{self.name} needs {', '.join(missing)}, which was not given.{self.missing}"
        return ""

    def _unfit(self, name: str, value: Any, kind: Kind) -> str:
        given = f"{name}={shown(value)}" if name else shown(value)
        with jaxtyped("context"):  # without the axes of other arguments
            alone = " whose axes agree with the other arguments'" if kind.accepts(value) else ""
        near = did_you_mean(value, kind.names) if isinstance(value, str) else ""
        return f"{self.name} was given {given}; expected {kind.words}{alone}.{near}"


def shown(value: Any) -> str:
    """Returns a value in at most about 80 characters: arrays by their shape, objects by type.

    >>> shown("a"), shown(np.zeros(3)), shown({"a": 1})
    ("'a'", 'an array of float64 of shape (3,)', "{'a': 1}")
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        kind = "sparse " if value.layout != torch.strided else "meta " if value.is_meta else ""
        return f"a {kind}tensor of {dtype} of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    if isinstance(value, Mapping | list | tuple) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)} items"
    plain = str | bytes | int | float | complex | np.generic | list | tuple | set | dict | None
    says_itself = type(value).__module__.startswith("hooked_vlm") and (
        type(value).__str__ is not object.__str__
    )
    if isinstance(value, plain) or says_itself:
        text = str(value) if says_itself else repr(value)
        return text if len(text) <= 80 else f"{text[:79]}…"
    name = getattr(value, "__name__", None)
    kind = type(value).__name__
    return f"the {kind} {name}" if isinstance(name, str) else f"an object of type {kind}"


# --- annotations ------------------------------------------------------------------------------


_OPTIONAL: Any = Annotated[int, ""]
_UNIONS = (types.UnionType, get_origin(_OPTIONAL | None))


def kind_of(hint: Any) -> Kind | None:
    """Returns what an annotation accepts; None: anything."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Annotated:
        return _annotated(inner[0], [part for part in inner[1:] if isinstance(part, Kind)])
    if origin in _UNIONS:
        return _any_of([kind_of(part) for part in inner])
    if origin is Literal:
        return Kind(lambda v: v in inner, " or ".join(map(repr, inner)))
    if hasattr(hint, "dim_str"):
        return _array(hint)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return _exactly([kind_of(part) for part in inner])
    if isinstance(origin, type):
        return _generic(origin, inner)
    if isinstance(hint, type) and not is_typeddict(hint):
        return _instance(hint)
    return kind_of(hint.__bound__) if getattr(hint, "__bound__", None) else None


def _is_scalar(value: Any) -> bool:
    """Whether a value is an array without an axis, which cannot be read item by item."""
    return isinstance(value, np.ndarray | Tensor) and value.ndim == 0


def is_sequence(value: Any) -> bool:
    """Whether a value has numbered items; arrays without an axis have none."""
    if isinstance(value, str | bytes | Mapping) or _is_scalar(value):
        return False
    return isinstance(value, Sequence | np.ndarray | Tensor) or (
        hasattr(value, "__len__") and hasattr(value, "__getitem__")
    )


def is_listed(value: Any) -> bool:
    """Whether a value can be read item by item; texts, mappings and arrays are single values."""
    single = isinstance(value, str | bytes | Mapping | Tensor | np.ndarray)
    return hasattr(value, "__iter__") and not single and not isinstance(value, type)


_PLAIN: dict[Any, Kind | None] = {
    Any: None,
    object: None,
    None: Kind(lambda v: v is None, "None"),
    type(None): Kind(lambda v: v is None, "None"),
    bool: Kind(is_bool, "True or False"),
    int: Kind(is_whole, "a whole number"),
    float: Kind(is_number, "a number"),
    str: Kind(lambda v: isinstance(v, str), "a text"),
    Path: Kind(is_path, "a path (a text that is not empty, or a Path)"),
}


@no_type_check
def _annotated(base: Any, parts: list[Kind]) -> Kind | None:
    plain = kind_of(base)
    every = [*([plain] if plain is not None else []), *parts]
    if not every:
        return None
    last = every[-1]
    return Kind(lambda v: all(part.accepts(v) for part in every), last.words, last.names)


@no_type_check
def _any_of(parts: list[Kind | None]) -> Kind | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    words = [part.words for part in known]
    if "a number" in words:  # of `float | int`
        words = [word for word in words if word != "a whole number"]
    names = tuple(name for part in known for name in part.names)
    joined = " or ".join(dict.fromkeys(words))
    return Kind(lambda v: any(part.accepts(v) for part in known), joined, names)


def _has_array(hint: Any) -> bool:
    return hasattr(hint, "dim_str") or any(map(_has_array, get_args(hint)))


@no_type_check
def _array(hint: Any) -> Kind:
    """Returns an array's kind; its axes are compared with those that `wrong` met before."""
    axes = " ".join(hint.dim_str.split())
    word = "tensor" if hint.array_type is Tensor else "array"
    of = {"Float": "floats", "Int": "integers", "Bool": "bools", "UInt8": "bytes"}
    numbers = f" of {of[hint.dtype.__name__]}" if hint.dtype.__name__ in of else ""

    def accepts(value: Any) -> bool:
        return isinstance(value, hint) and has_values(value)

    return Kind(accepts, f"a {word} [{axes}]{numbers}".replace("a array", "an array"))


@no_type_check
def _exactly(parts: list[Kind | None]) -> Kind:
    words = [part.words if part is not None else "anything" for part in parts]
    same = len(set(words)) == 1
    listed = f"{len(parts)} of: {words[0]}" if same else f"({', '.join(words)})"

    def accepts(value: Any) -> bool:
        return (
            is_sequence(value)
            and len(value) == len(parts)
            and all(part is None or part.accepts(v) for part, v in zip(parts, value, strict=True))
        )

    return Kind(accepts, listed)


def _generic(origin: type, inner: tuple[Any, ...]) -> Kind | None:
    """Returns the kind of a mapping, a sequence, a function or another generic class."""
    if issubclass(origin, Mapping):
        return _mapping([kind_of(part) for part in inner])
    if origin is Callable:
        return Kind(callable, "a function")
    if origin is Iterable:
        item = kind_of(inner[0]) if inner else None
        return _items(lambda v: hasattr(v, "__iter__"), item)
    if issubclass(origin, Sequence):
        return _items(is_sequence, kind_of(inner[0]) if inner else None)
    return _instance(origin)


@no_type_check
def _mapping(parts: list[Kind | None]) -> Kind:
    keys, values = parts or (None, None)

    def accepts(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            (keys is None or keys.accepts(k)) and (values is None or values.accepts(v))
            for k, v in value.items()
        )

    names = f" from {_plural(keys)}" if keys is not None else ""
    to = f" to {_plural(values)}" if values is not None else ""
    return Kind(accepts, f"a mapping{names}{to}")


@no_type_check
def _items(has_items: Callable[[Any], bool], item: Kind | None) -> Kind:
    def accepts(value: Any) -> bool:
        if isinstance(value, str | bytes) or not has_items(value) or _is_scalar(value):
            return False
        if item is None or not hasattr(value, "__len__"):  # an iterator is read once
            return True
        if isinstance(value, np.ndarray | Tensor):
            value = value.tolist()
        some = value if len(value) <= _MOST_ITEMS else list(value)[:_MOST_ITEMS]
        return all(item.accepts(each) for each in some)

    return Kind(accepts, f"a sequence of {_plural(item)}" if item is not None else "a sequence")


def _plural(kind: Kind) -> str:
    known = {
        "a text": "texts",
        "a number": "numbers",
        "a whole number": "whole numbers",
        "a finite number": "finite numbers",
    }
    return known.get(kind.words, kind.words)


def _instance(kind: type) -> Kind | None:
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return None  # cannot be compared
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    return Kind(lambda v: isinstance(v, kind), f"{article} {kind.__name__}")
