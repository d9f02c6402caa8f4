"""Errors of workers, and the engines' threads and files: no model is loaded here."""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hooked_vlm.errors import CannotRunError, DataError
from hooked_vlm.experiments.loop import Loop
from hooked_vlm.experiments.options import Config
from hooked_vlm.report import workers
from hooked_vlm.report.engines import LOGS, engine_of
from hooked_vlm.report.parts import Parts, unit_of
from hooked_vlm.report.values import seconds_of
from hooked_vlm.report.workers import Failed, Outcome, Task, offered


UNITS = ("left 0", "left 1", "left 2", "left 3")
LOOP = Loop(name="sweep", units=dict.fromkeys(UNITS), score=lambda *_: None, steps=1, last=True)
TASK = Task(
    model="m",
    dtype="auto",
    device="cpu",
    experiment="strip-swap",
    config=Config(),
    depends_on={},
    folder=Path("nowhere"),
)


class Now:
    """An executor that runs tasks where they are submitted."""

    def submit(self, fn: Any, /, *args: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def failed(kind: str, said: str, lacks: tuple[str, str] | None = None) -> Failed:
    ours = kind.endswith("Error") and kind != "TypeError"
    return Failed("left 1", kind, said, "node7 (process 12)", ours, lacks, "Traceback …")


def lost(task: Task) -> Outcome:
    raise RuntimeError("Job failed:\n  File a.py\n  File b.py\nKilled by the scheduler\n")


WHERE = "Unit 'sweep: left 1' of strip-swap failed on node7 (process 12): "
RESUME = ", and run the same command again to resume."
ENDS: dict[str, tuple[Callable[[Task], Any], type[Exception], str]] = {
    "an error of ours": (
        lambda _: Outcome({}, failed("DataError", "No such file 'a'.")),
        DataError,
        f"{WHERE}No such file 'a'. Finished units are kept. Correct this{RESUME}",
    ),
    "another error, of many lines": (
        lambda _: Outcome({}, failed("TypeError", "bad\nand more")),
        DataError,
        f"{WHERE}TypeError: bad. Finished units are kept. If this is no passing fault, run without "
        f"--executor to see the whole error{RESUME}",
    ),
    "no memory": (
        lambda _: Outcome({}, failed("X", "CUDA out of memory", ("Out of memory", "Give less"))),
        DataError,
        f"{WHERE}Out of memory. Finished units are kept. Give less{RESUME}",
    ),
    "a model that it cannot run on": (
        lambda _: Outcome({}, failed("CannotRunError", "It answers nothing right.")),
        CannotRunError,
        "It answers nothing right.",
    ),
    "a worker that is gone": (
        lost,
        DataError,
        "The executor lost a task of loop 'sweep' of strip-swap, with 1 of its units from "
        "'left 1': RuntimeError: Job failed: File a.py … Killed by the scheduler. Finished units "
        "are kept; run the same command again to resume, and see the workers' logs",
    ),
    "a worker of an older version": (
        lambda _: {"left 1": b""},
        DataError,
        "A worker returned {'left 1': b''}; expected an Outcome. Give all processes the same",
    ),
}


@pytest.mark.parametrize(("end", "kind", "said"), ENDS.values(), ids=ENDS)
def test_what_failed_is_said_in_one_line_and_the_rest_is_kept(
    end: Callable[[Task], Any],
    kind: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(task: Task) -> Any:
        (unit,) = task.units
        return end(task) if unit == "left 1" else Outcome({unit: unit.encode()})

    monkeypatch.setattr(workers, "compute", compute)
    kept = {}
    with pytest.raises(kind) as e:
        for name, data in offered(Now(), TASK, None, LOOP, UNITS):
            kept[name] = data
    assert type(e.value) is kind
    assert str(e.value).startswith(said)
    assert "\n" not in str(e.value)
    assert set(kept) == {*UNITS} - {"left 1"}


def test_units_of_a_task_before_the_one_that_fails_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def computed(loop: Loop, name: str, _: Any) -> bytes:
        if name == "left 2":
            raise CannotRunError("Not here.")
        return name.encode()

    monkeypatch.setattr(workers, "_model_for", lambda _: None)
    monkeypatch.setattr(workers, "shared_runs", nullcontext)
    monkeypatch.setattr(workers, "_reached", lambda *_: LOOP)
    monkeypatch.setattr(workers, "unit_of", computed)
    kept = []
    with pytest.raises(CannotRunError, match=r"^Not here\.$"):
        for unit in offered(Now(), TASK, 1, LOOP, UNITS):
            kept.append(unit)
    assert kept == [("left 0", b"left 0"), ("left 1", b"left 1")]


@pytest.mark.parametrize(("n", "each"), [(1, 8), (2, 4), (3, 2), (16, 1)])
def test_processes_divide_the_threads_and_say_so(
    n: int, each: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with engine_of(f"processes:{n}", tmp_path) as engine:
        assert engine.threads == each
        assert f"{each} thread" in engine.said
        assert ("OMP_NUM_THREADS=1" in engine.said) == (n > 1)


@pytest.mark.parametrize("fails", [False, True])
def test_no_pickle_of_slurm_jobs_is_left(
    fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class AutoExecutor:
        def __init__(self, folder: Path, cluster: str | None) -> None:
            folder.mkdir(parents=True)
            (folder / "1_submitted.pkl").touch()
            (folder / "1_0_log.err").write_text("Killed")

        def update_parameters(self, **_: Any) -> None: ...

        def submit(self, fn: Any, /, *args: Any) -> Any: ...

    module: Any = ModuleType("submitit")
    module.AutoExecutor = AutoExecutor
    monkeypatch.setitem(sys.modules, "submitit", module)
    try:
        with engine_of("slurm:partition=gpu,jobs=2", tmp_path) as engine:
            assert engine.tasks == 2
            if fails:
                raise DataError("A unit failed.")
    except DataError:
        pass
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(left) == ([LOGS, f"{LOGS}/1_0_log.err"] if fails else [])


def test_units_that_are_read_bring_the_seconds_of_their_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([7.0 * i for i in range(20)])
    monkeypatch.setattr("hooked_vlm.report.parts.time.perf_counter", lambda: next(clock))
    assert seconds_of(unit_of(LOOP, "left 0", lambda *_: None)) == 7
    first = Parts([tmp_path])
    first.values(LOOP, lambda *_: None)
    again = Parts([tmp_path])
    again.values(LOOP, lambda *_: None)
    assert (first.seconds, again.seconds) == (0, 28)
