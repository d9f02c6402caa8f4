"""Has units of work computed by other processes, through any executor.

An executor is anything with `submit(function, *arguments)` whose results have `done()` and
`result()`: those of `concurrent.futures`, Dask's `Client.get_executor()`, mpi4py's, submitit's.
It is given `compute` and a `Task`, a small description that can be pickled.  A worker loads a
model once, finds the task's loop by running the experiment up to it, and returns the bytes of the
units.  Earlier units are read from the folder of parts where the worker has it, and are computed
again where it has not.

A worker whose key differs from the task's has another version, another model or another kind of
device: it refuses the task.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.kinds import is_whole
from hooked_vlm.engine.shared import shared_runs
from hooked_vlm.errors import DataError
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.loop import Loop, UnfinishedError, silent, working_by
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report.basis import Basis, everything, key_of
from hooked_vlm.report.parts import Parts, identity
from hooked_vlm.report.values import packed


_PAUSE_S = 0.2
"""Seconds between two looks at results that no other way tells of."""


@runtime_checkable
class Executor(Protocol):
    """What runs functions elsewhere."""

    def submit(self, fn: Any, /, *args: Any) -> Any:
        """Returns what has `done()` and `result()`."""
        ...


def require_executor(executor: Any, tasks: Any) -> None:
    """Raises `DataError` for what runs no functions, and for a number of tasks below 1."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise DataError(
            f"executor={shown(executor)} was given; expected an object with submit(function, "
            "*arguments), such as concurrent.futures.ProcessPoolExecutor()."
        )
    if tasks is not None and not (is_whole(tasks) and int(tasks) >= 1):
        raise DataError(f"tasks={shown(tasks)} was given; expected a whole number from 1, or None.")


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


def offered(
    executor: Executor, task: Task, at_once: int | None, loop: Loop, names: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """Yields the units of a loop as an executor's workers return them.

    Each task has one unit, or as many as divide all among `at_once` tasks.  Raises what a unit
    raises, and `DataError` where workers end before their work.
    """
    size = 1 if at_once is None else -(-len(names) // at_once)
    tasks = [
        Task(**{**vars(task), "loop": loop.name, "units": tuple(names[i : i + size])})
        for i in range(0, len(names), size)
    ]
    futures = [executor.submit(compute, own) for own in tasks]
    try:
        for future in _in_order_of_ending(futures):
            yield from future.result().items()
    except BrokenExecutor as error:
        raise DataError(
            f"A worker process ended before its work was done ({str(error)[:120]}). Finished units "
            "are kept; run the same command again to resume, with fewer processes if memory ended."
        ) from None
    finally:
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


def compute(task: Task) -> dict[str, bytes]:
    """Returns the `packed` value of each unit of a task.

    Raises `DataError` where this process would compute other bits than the process that made the
    task: another version of a package, other weights, another kind of device.
    """
    with _LOCK:
        return _computed(task)


def _computed(task: Task) -> dict[str, bytes]:
    torch.set_num_threads(task.threads)
    model, basis = _model_of(task)
    own = everything(task.experiment, task.config, basis)
    if key_of(own) != key_of(task.depends_on) and not task.allow_mixed:
        raise DataError(
            f"A worker refuses units of {task.experiment}: {differences(task.depends_on, own)}. "
            "Give all processes the same environment, or allow mixed parts."
        )
    with shared_runs(model):
        loop = _reached(task, model)
        return {
            name: packed(loop.score(loop.units[name], silent), *identity(loop, name))
            for name in task.units
        }


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
