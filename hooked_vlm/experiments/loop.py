"""The one loop of all experiments: units of work, computed in turn or taken from where they are.

A unit is one batch of one direction (or whatever an experiment computes in one go).  It depends
on the model, the configuration and the data, and on earlier units only through what these
returned: no generator of random numbers and no cache goes from one unit to the next.  So it may
be computed by another process, or read from a file, and is the same.

`working_by(way)` sets another way to compute the units than in turn: see `report.parts`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from hooked_vlm.errors import HookedVLMError, counted
from hooked_vlm.experiments.options import OnProgress


Item = TypeVar("Item")
Value = TypeVar("Value")


class UnfinishedError(HookedVLMError):
    """An experiment some of whose units are left to other processes."""

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing = tuple(missing)
        """The names of the units that are missing."""
        shown = ", ".join(missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        super().__init__(
            f"{counted(len(missing), 'unit')} of work missing: {shown}{more}. Run the other parts."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """The units of one loop."""

    name: str
    """Its name, the only one of its kind in the experiment: `"whole/pairs"`."""
    units: Mapping[str, Any]
    """What each unit is about, by its name: a batch of questions, for instance."""
    score: Callable[[Any, OnProgress], Any]
    """`score(item, on_progress)` computes a unit: arrays, tensors, texts and numbers, in dicts
    and lists."""
    steps: int
    """What a unit counts in the progress."""
    last: bool
    """Whether no later loop of the experiment needs these units."""
    part: str = ""
    """The beginning of its name that is that of an independent part; empty: it is in none."""


@runtime_checkable
class Way(Protocol):
    """Computes the units of a loop."""

    def values(self, loop: Loop, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the value of each unit, by its name, in their order."""
        ...


def silent(done: int, total: int) -> None:
    """Takes progress and shows none."""


class InTurn:
    """Computes units one after the other, in this process."""

    def values(self, loop: Loop, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the value of each unit, by its name, in their order."""
        return {
            name: loop.score(item, told)
            for name, item, told in following(loop.units, on_progress, loop.steps)
        }


def following(
    units: Mapping[str, Any], on_progress: OnProgress, steps: int
) -> Iterator[tuple[str, Any, OnProgress]]:
    """Yields each unit's name and item, and the callback for its own progress."""
    total = steps * len(units)
    on_progress(0, total)
    for i, (name, item) in enumerate(units.items()):
        before = i * steps

        def told(done: int, _: int, before: int = before) -> None:
            on_progress(before + done, total)

        yield name, item, told
        told(steps, steps)


_WAY: ContextVar[Way | None] = ContextVar("way", default=None)
_SCOPE: ContextVar[tuple[str, ...]] = ContextVar("scope", default=())
_PART: ContextVar[tuple[str, ...]] = ContextVar("part", default=())
"""The scope of the innermost independent part."""


@contextmanager
def working_by(way: Way) -> Iterator[None]:
    """Lets loops in a `with` block have their units computed by another way than in turn."""
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Puts a name before those of the loops in a `with` block, where an experiment runs others."""
    token = _SCOPE.set((*_SCOPE.get(), name))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def over(
    name: str,
    units: Mapping[str, Item],
    score: Callable[[Item, OnProgress], Value],
    on_progress: OnProgress = silent,
    *,
    steps: int = 1,
    last: bool = False,
) -> dict[str, Value]:
    """Returns `score(item, on_progress)` of every unit, by its name.

    A unit counts as `steps` steps of the progress; `score` may report steps of its own unit.
    `last` says that no later loop needs these units, so that a process that computes a part of
    them may end here: it raises `UnfinishedError`.

    >>> over("squares", {"one": 1, "two": 2}, lambda item, _: item * item)
    {'one': 1, 'two': 4}
    """
    whole = "/".join((*_SCOPE.get(), name))
    part = "/".join(_PART.get())
    loop = Loop(name=whole, units=units, score=score, steps=steps, last=last, part=part)
    return (_WAY.get() or InTurn()).values(loop, on_progress)


def once(name: str, make: Callable[[], Value]) -> Value:
    """Returns `make()`, as a unit of its own: what later units need, such as the chosen pairs.

    >>> once("chosen", lambda: [["red", "blue"]])
    [['red', 'blue']]
    """
    return over(name, {"whole": None}, lambda _, __: make())["whole"]


def over_batches(
    name: str,
    items: Mapping[str, Sequence[Any]],
    size: int,
    score: Callable[[str, list[Any], OnProgress], Value],
    on_progress: OnProgress = silent,
    *,
    steps: int = 1,
    last: bool = False,
) -> dict[str, list[Value]]:
    """Returns `score(direction, batch, on_progress)` of every batch, by direction.

    A batch has at most `size` items.  The other arguments are those of `over`.

    >>> over_batches("sums", {"left": [1, 2, 3]}, 2, lambda _, batch, __: sum(batch))
    {'left': [3, 3]}
    """
    batches = {
        f"{direction} {i}": (direction, list(own[start : start + size]))
        for direction, own in items.items()
        for i, start in enumerate(range(0, len(own), size))
    }
    found = over(
        name, batches, lambda unit, told: score(*unit, told), on_progress, steps=steps, last=last
    )
    scores: dict[str, list[Value]] = {direction: [] for direction in items}
    for unit, value in found.items():
        scores[batches[unit][0]].append(value)
    return scores


class Independent:
    """Parts of an experiment none of which needs another: see `independent`."""

    def __init__(self) -> None:
        self.missing: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Runs a part under its name; one that is unfinished does not keep others from running."""
        try:
            with scope(name):
                token = _PART.set(_SCOPE.get())
                try:
                    yield
                finally:
                    _PART.reset(token)
        except UnfinishedError as error:
            self.missing += error.missing


@contextmanager
def independent() -> Iterator[Independent]:
    """Yields what runs parts that need nothing of each other, in blocks `with parts.part(name):`.

    Raises `UnfinishedError` after the `with` block if a part did.
    """
    parts = Independent()
    yield parts
    if parts.missing:
        raise UnfinishedError(parts.missing)


def part_of(on_progress: OnProgress, index: int, of: int) -> OnProgress:
    """Returns the progress callback of one of several parts, each counted as 100 steps."""

    def told(done: int, total: int) -> None:
        on_progress(100 * index + round(100 * done / max(total, 1)), 100 * of)

    return told
