"""Executors by name: `processes`, `dask://HOST:PORT`, `ray://HOST:PORT`, `slurm:partition=gpu`.

Each but the first needs an optional package.  Any other executor can be given in Python: see
`report.job.run`.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_vlm.disk.files import temporary_name
from hooked_vlm.errors import DataError, MissingExtraError, counted
from hooked_vlm.report.workers import Executor


@dataclass(frozen=True)
class Engine:
    """An executor, and how it is used."""

    executor: Executor
    tasks: int | None = None
    """Into how many tasks the units of a loop are divided; None: one each."""
    threads: int | None = None
    """The threads of each worker; None: as many as this process has."""
    said: str = ""
    """What a user should know of it; empty: nothing."""

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of `job.run` with which it is used."""
        return {"executor": self.executor, "tasks": self.tasks, "threads": self.threads}


LOGS = "slurm-logs"
"""The folder, inside the output folder, with what SLURM jobs printed in a run that failed."""
FORMS = (
    "'processes' (one for each visible card) or 'processes:N', 'dask://HOST:PORT', "
    "'ray://HOST:PORT' or 'ray://' (a local one), 'slurm:partition=NAME,jobs=N'"
)


@contextlib.contextmanager
def engine_of(text: str, folder: Path) -> Iterator[Engine]:
    """Yields the engine of a text for the length of a `with` block; `folder` is for its logs.

    Raises `DataError` for another text than those of `FORMS`, and `MissingExtraError` where the
    package that it needs is not installed.
    """
    kind, _, rest = text.partition(":")
    made = {"processes": _processes, "dask": _dask, "ray": _ray, "slurm": _slurm}.get(kind)
    if made is None:
        raise DataError(f"--executor {text[:60]!r} was given; expected one of {FORMS}.")
    with made(rest, folder) as engine:
        yield engine


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"--executor {extra} needs the package {module}, which cannot be imported "
            f"({str(error)[:120]}). Install it: pip install 'hooked-vlm[{extra}]'."
        ) from None


def cards() -> list[str]:
    """Returns the names of the visible cards, as in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return [name for name in every if name.strip()][: torch.cuda.device_count()]


@contextlib.contextmanager
def _processes(rest: str, _: Path) -> Iterator[Engine]:
    if rest and not (rest.isdecimal() and 1 <= int(rest) <= 1024):
        raise DataError(
            f"--executor processes:{rest[:20]} was given; expected a number from 1 to 1024, as in "
            "processes:8."
        )
    visible = cards()
    n = int(rest) if rest else max(1, len(visible))
    # New processes and not copies of this one: a copy cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    each = max(1, threads // n)
    said = f"{counted(n, 'worker process', 'worker processes')}, {counted(each, 'thread')} each"
    if each != threads:
        said += (
            f"; this process has {threads}. The last bits of sums depend on the number of threads: "
            "with OMP_NUM_THREADS=1 they do not depend on the number of workers"
        )
    numbers: Any = context.Queue()
    for i in range(n):
        numbers.put(visible[i % len(visible)] if visible else "")
    pool = ProcessPoolExecutor(n, mp_context=context, initializer=_take_card, initargs=(numbers,))
    try:
        yield Engine(pool, threads=each, said=f"{said}.")
    finally:
        pool.shutdown(cancel_futures=True)


def _take_card(numbers: Any) -> None:
    """Lets a new process see one card alone, if there are any."""
    card = numbers.get()
    if card:
        os.environ["CUDA_VISIBLE_DEVICES"] = card


@contextlib.contextmanager
def _dask(rest: str, _: Path) -> Iterator[Engine]:
    distributed = _imported("distributed", "dask")
    address = rest.removeprefix("//")
    try:
        client = distributed.Client(f"tcp://{address}", timeout=10)
    except (OSError, ValueError, TimeoutError) as error:
        raise DataError(
            f"There is no Dask scheduler at {address[:60]!r} ({str(error)[:80]}). Start one (dask "
            "scheduler) and give its address, as in dask://127.0.0.1:8786."
        ) from None
    with client, client.get_executor(pure=False) as executor:
        yield Engine(executor)


class _Ray:
    """An executor of Ray's tasks."""

    def __init__(self, ray: Any, resources: Mapping[str, Any]) -> None:
        self.ray, self.resources = ray, resources

    def submit(self, fn: Any, /, *args: Any) -> Future:
        """Returns the future of a task."""
        return self.ray.remote(**self.resources)(fn).remote(*args).future()


@contextlib.contextmanager
def _ray(rest: str, _: Path) -> Iterator[Engine]:
    ray = _imported("ray", "ray")
    address = rest.removeprefix("//")
    try:
        ray.init(address=f"ray://{address}" if address else None, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Ray cannot be reached at {address[:60] or 'this machine'!r} ({str(error)[:80]}). "
            "Start it (ray start --head) and give its address, as in ray://127.0.0.1:10001."
        ) from None
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        yield Engine(_Ray(ray, {"num_gpus": gpus, "num_cpus": 1}))
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _slurm(rest: str, folder: Path) -> Iterator[Engine]:
    submitit = _imported("submitit", "slurm")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    wrong = [name for name, equals, value in pairs if not (name and equals and value)]
    if wrong:
        raise DataError(
            f"--executor slurm:{rest[:60]} was given; expected NAME=VALUE separated by commas, as "
            "in slurm:partition=gpu,gpus_per_node=1,jobs=8."
        )
    options: dict[str, Any] = {
        name: int(value) if value.isdecimal() else value for name, _, value in pairs
    }
    jobs, cluster = options.pop("jobs", 8), options.pop("cluster", None)
    if not isinstance(jobs, int) or jobs < 1:
        raise DataError(
            f"--executor slurm:{rest[:60]} was given; expected a number from 1 for jobs, as in "
            "jobs=8."
        )
    logs = temporary_name(folder / "slurm", "new")
    own = {"gpus_per_node", "cpus_per_task", "mem_gb", "nodes", "tasks_per_node", "timeout_min"}
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(
            **{name if name in own else f"slurm_{name}": value for name, value in options.items()}
        )
    except (ValueError, TypeError, NameError, RuntimeError) as error:
        raise DataError(
            f"--executor slurm:{rest[:60]} was given, and submitit refuses it: {str(error)[:120]}"
        ) from None
    try:
        yield Engine(executor, tasks=jobs)
    except BaseException:
        for log in [*logs.glob("*.out"), *logs.glob("*.err")]:
            (folder / LOGS).mkdir(exist_ok=True)
            shutil.copy(log, folder / LOGS)
        raise
    finally:
        # submitit writes its tasks as pickles, which others should not find there.
        shutil.rmtree(logs, ignore_errors=True)
