"""Has units of work computed by other processes, through any executor.

An executor is anything with `submit(function, *arguments)` whose results have `done()` and
`result()`: those of `concurrent.futures`, Dask's `Client.get_executor()`, mpi4py's, submitit's.
It is given `compute` and a `Task`, a small description that can be pickled.  A worker loads a
model once, finds the task's loop by running the experiment up to it, and returns the bytes of the
units.  Earlier units are read from the folder of parts where the worker has it, and are computed
again where it has not.

A worker whose key differs from the task's has another version, another model or another kind of
device: it refuses the task.  A worker raises nothing: executors show an error of another process as
pages of traceback, lose its class, or cannot pickle it.  It returns what it has computed and, in
words, what failed.
"""

import os
import platform
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.kinds import is_whole
from hooked_vlm.disk.files import lacking
from hooked_vlm.engine.shared import shared_runs
from hooked_vlm.errors import (
    CannotRunError,
    DataError,
    HookedVLMError,
    RegionError,
    ScoringError,
)
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.loop import Loop, UnfinishedError, silent, working_by
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report.basis import Basis, everything, key_of
from hooked_vlm.report.parts import Parts, unit_of


_PAUSE_S = 0.2
"""Seconds between two looks at results that no other way tells of."""


@runtime_checkable
class Executor(Protocol):
    """What runs functions elsewhere."""

    def submit(self, fn: Any, /, *args: Any) -> Any:
        """Returns what has `done()` and `result()`."""
        ...


def require_executor(executor: Any, tasks: Any, threads: Any = None) -> None:
    """Raises `DataError` for what runs no functions, and for numbers below 1."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise DataError(
            f"executor={shown(executor)} was given; expected an object with submit(function, "
            "*arguments), such as concurrent.futures.ProcessPoolExecutor()."
        )
    for name, given in (("tasks", tasks), ("threads", threads)):
        if given is not None and not (is_whole(given) and int(given) >= 1):
            raise DataError(
                f"{name}={shown(given)} was given; expected a whole number from 1, or None."
            )


@dataclass(frozen=True, kw_only=True)
class Task:
    """Units of one loop of one experiment, to be computed by a worker."""

    model: str
    dtype: str
    device: str
    experiment: str
    config: Config
    depends_on: dict[str, Any]
    """What the numbers depend on: see `basis.everything`."""
    folder: Path
    """The folder of parts, which the worker may have or not."""
    allow_mixed: bool = False
    """Whether a worker with another version or kind of device may compute."""
    threads: int = field(default_factory=torch.get_num_threads)
    """The number of threads, of which the last bits of sums depend."""
    loop: str = ""
    units: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """What failed in a worker: texts alone, because not every error can be pickled."""

    unit: str
    """The unit that failed; empty: the worker could not begin."""
    kind: str
    """The name of the error's class."""
    said: str
    where: str
    """The machine and the process."""
    is_ours: bool
    """Whether it is a `HookedVLMError`, whose message says what to do."""
    lacks: tuple[str, str] | None
    """See `files.lacking`."""
    trace: str


@dataclass(frozen=True)
class Outcome:
    """The `packed` value of each unit of a task that was computed, and what failed after them."""

    units: dict[str, bytes]
    failed: Failed | None = None


class _InWorkerError(Exception):
    """The traceback of an error in a worker, as the cause of the error that tells of it."""


ON_THE_MODEL = {error.__name__: error for error in (CannotRunError, RegionError, ScoringError)}
"""Errors that an experiment raises on some models: `job.finish` takes them from a worker too."""
KEPT = "Finished units are kept"


def _error_of(failed: Failed, task: Task) -> Exception:
    """Returns the error of this process for what failed in a worker."""
    if failed.kind in ON_THE_MODEL:
        return ON_THE_MODEL[failed.kind](failed.said)
    what = f"Unit '{task.loop}: {failed.unit}'" if failed.unit else f"A task of loop '{task.loop}'"
    said = failed.said.strip().partition("\n")[0][:160].rstrip(".")
    remedy = "If this is no passing fault, run without --executor to see the whole error"
    if failed.lacks is not None:
        said, remedy = failed.lacks
    elif failed.is_ours:
        remedy = "Correct this"
    else:
        said = f"{failed.kind}: {said}"
    error = DataError(
        f"{what} of {task.experiment} failed on {failed.where}: {said}. {KEPT}. {remedy}, and run "
        "the same command again to resume."
    )
    error.__cause__ = _InWorkerError(failed.trace)
    return error


def _outcome(future: Any, task: Task) -> Outcome:
    """Returns what a worker returned; raises `DataError` where the executor returns nothing."""
    try:
        found = future.result()
    except BrokenExecutor as error:
        raise DataError(
            f"A worker process ended before its work was done ({str(error)[:120]}). {KEPT}; run "
            "the same command again to resume, with fewer processes if memory ended."
        ) from None
    except (Exception, CancelledError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        raise DataError(
            f"The executor lost a task of loop '{task.loop}' of {task.experiment}, with "
            f"{len(task.units)} of its units from {task.units[0]!r}: {type(error).__name__}: "
            f"{_shortened(lines)}. {KEPT}; run the same command again to resume, and see the "
            "workers' logs: their memory, time limit and version."
        ) from error
    if not isinstance(found, Outcome):
        raise DataError(
            f"A worker returned {shown(found)}; expected an Outcome. Give all processes the same "
            "version of hooked_vlm."
        )
    return found


def _shortened(lines: Sequence[str]) -> str:
    """Returns the lines of an executor's error in one: what it says first, and the last."""
    said = " ".join(lines[:2])[:90]
    return f"{said} … {lines[-1][:40]}" if len(lines) > 2 else said


def offered(
    executor: Executor, task: Task, at_once: int | None, loop: Loop, names: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """Yields the units of a loop as an executor's workers return them.

    Each task has one unit, or as many as divide all among `at_once` tasks.  Raises `DataError`,
    which says what failed and where, after it has yielded what was computed until then; errors
    of `ON_THE_MODEL` as a unit raised them.
    """
    size = 1 if at_once is None else -(-len(names) // at_once)
    tasks = [
        Task(**{**vars(task), "loop": loop.name, "units": tuple(names[i : i + size])})
        for i in range(0, len(names), size)
    ]
    futures = [executor.submit(compute, own) for own in tasks]
    waiting = {id(future): (future, own) for future, own in zip(futures, tasks, strict=True)}
    error: Exception | None = None
    try:
        for future in _in_order_of_ending(futures):
            units, error = _taken(*waiting.pop(id(future)))
            yield from units.items()
            if error is not None:
                break
        if error is not None:
            # What others have done until now is kept; what they are doing is not waited for.
            for future, own in waiting.values():
                if future.done():
                    yield from _taken(future, own)[0].items()
            raise error
    finally:
        _cancel(futures)


def _taken(future: Any, task: Task) -> tuple[dict[str, bytes], Exception | None]:
    """Returns the units of a task that has ended, and its error if it failed."""
    try:
        outcome = _outcome(future, task)
    except DataError as lost:
        return {}, lost
    error = None if outcome.failed is None else _error_of(outcome.failed, task)
    return outcome.units, error


def _cancel(futures: Sequence[Any]) -> None:
    for future in futures:
        if not future.done() and hasattr(future, "cancel"):
            future.cancel()


def _in_order_of_ending(futures: Sequence[Any]) -> Iterator[Any]:
    if all(isinstance(future, Future) for future in futures):
        yield from as_completed(futures)
        return
    waiting = list(futures)
    while waiting:
        done = [future for future in waiting if future.done()]
        yield from done
        waiting = [future for future in waiting if future not in done]
        if waiting and not done:
            time.sleep(_PAUSE_S)


# --- in the worker --------------------------------------------------------------------------


class _ReachedError(BaseException):
    """Ends an experiment at the loop of a task; no `except` of an experiment takes it."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.name)
        self.loop = loop


class _UpTo:
    """Computes loops before that of a task, and ends the experiment there."""

    def __init__(self, name: str, parts: Parts) -> None:
        self.name, self.parts = name, parts

    def values(self, loop: Loop, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the values of an earlier loop."""
        if loop.name == self.name:
            raise _ReachedError(loop)
        elsewhere = loop.part and not f"{self.name}/".startswith(f"{loop.part}/")
        if loop.last or elsewhere:  # the task's loop does not need it
            raise UnfinishedError([loop.name])
        return self.parts.values(loop, on_progress)


_MODELS: dict[tuple[str, str, str], tuple[HookedVLM, Basis]] = {}
"""The model of this process: one, because a card may hold no second."""
_LOOPS: dict[tuple[str, str], Loop] = {}
"""The loop that was reached last, with what its units need."""
_LOCK = threading.Lock()
"""A process computes one task at a time, whatever number of threads its executor has."""


def compute(task: Task) -> Outcome:
    """Returns the `packed` value of each unit of a task, until one fails.

    A process that would compute other bits than the one that made the task fails before the first:
    another version of a package, other weights, another kind of device.
    """
    done: dict[str, bytes] = {}
    unit = ""
    with _LOCK:
        try:
            model = _model_for(task)
            with shared_runs(model):
                loop = _reached(task, model)
                for unit in task.units:
                    done[unit] = unit_of(loop, unit, silent)
        except Exception as error:  # noqa: BLE001 (told to the process that made the task)
            return Outcome(done, _failed(error, unit))
    return Outcome(done)


def _failed(error: Exception, unit: str) -> Failed:
    where = f"{platform.node() or 'a worker'} (process {os.getpid()})"
    names = [kind.__name__ for kind in type(error).__mro__]
    kind = next((name for name in names if name in ON_THE_MODEL), names[0])
    is_ours, lacks = isinstance(error, HookedVLMError), lacking(error)
    return Failed(unit, kind, str(error), where, is_ours, lacks, traceback.format_exc())


def _model_for(task: Task) -> HookedVLM:
    """Returns the model of a task; raises `DataError` where units would have other bits."""
    torch.set_num_threads(task.threads)
    model, basis = _model_of(task)
    own = everything(task.experiment, task.config, basis)
    if key_of(own) != key_of(task.depends_on) and not task.allow_mixed:
        raise DataError(
            f"it refuses the task, for it has {differences(own, task.depends_on)[:120]}. Give all "
            "processes the same environment"
        )
    return model


def _model_of(task: Task) -> tuple[HookedVLM, Basis]:
    key = (task.model, task.dtype, task.device)
    if key not in _MODELS:
        _MODELS.clear()
        _LOOPS.clear()
        dtype = task.dtype if task.dtype == "auto" else getattr(torch, task.dtype)
        model = HookedVLM.from_pretrained(task.model, dtype=dtype, device=task.device)
        _MODELS[key] = model, Basis.of(model.hf_model, task.model, task.device)
    return _MODELS[key]


def _reached(task: Task, model: HookedVLM) -> Loop:
    key = (key_of(task.depends_on), task.loop)
    if key not in _LOOPS:
        _LOOPS.clear()
        way = _UpTo(task.loop, Parts([task.folder], write=task.folder.is_dir()))
        try:
            with working_by(way):
                registry.select(task.experiment).run(model, task.config, silent)
        except _ReachedError as reached:
            _LOOPS[key] = reached.loop
        except UnfinishedError:
            pass
        if key not in _LOOPS:
            raise DataError(f"{task.experiment} has no loop {task.loop!r} in this process.")
    return _LOOPS[key]


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Returns in words what differs between two results of `basis.everything`.

    >>> differences(
    ...     {"source": "a", "basis": {"device": "cpu"}},
    ...     {"source": "a", "basis": {"device": "cuda"}},
    ... )
    'device cpu and cuda'
    """
    found = []
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(differences(a, b))
        else:
            found.append(f"{name} {str(a)[:20]} and {str(b)[:20]}")
    return ", ".join(found)
