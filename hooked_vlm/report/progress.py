"""Shows the progress of jobs: a bar for each on a terminal and in a notebook, otherwise lines.

Only one process writes bars: several would overwrite each other's.  The processes that it starts
report their progress as lines of JSON (`Reporter`), which it reads and shows (`told`).
"""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hooked_vlm.errors import counted


REPORTED = "HOOKED_VLM_PROGRESS"
"""Set in the environment of a process whose progress another process shows."""


class Listener(contextlib.AbstractContextManager):
    """Shows the progress of a job: one bar on a terminal and in a notebook, otherwise lines.

    A notebook needs ipywidgets for bars.  Lines come about every ten seconds.  With `bars`, the
    job's bar is one of them; the caller starts and stops them.
    """

    def __init__(self, console: Console, model: str, bars: Progress | None = None) -> None:
        self.finished, self.of = 0, 0
        self._console, self._model = console, model
        self._draws = _draws_on(console)
        self._start = self._said = 0.0
        self._name = model
        self._task: TaskID | None = None
        self._is_alone = bars is None
        self._bars = bars or bars_on(console)

    def __enter__(self) -> "Listener":
        self.wait("loading" if self._is_alone else "starting")
        if self._is_alone:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._is_alone:
            self._bars.stop()

    def wait(self, why: str) -> None:
        """Shows what the job waits for, such as `"loading"`."""
        name = f"{self._model}: {why}"
        if self._task is None:
            self._task = self._bars.add_task(name, total=None)
        else:
            self._bars.update(self._task, description=name)
        self._say(name)

    def begin(self, step: Any, place: int, of: int) -> None:
        """Shows that a `registry.Step` begins."""
        self.begin_named(f"{place}/{of} {step.experiment.id} {step.name}", of)

    def begin_named(self, name: str, of: int) -> None:
        """Shows that an experiment begins, one of `of`."""
        self.of = of
        self.show(f"{self._model} {name}")

    def show(self, name: str) -> None:
        """Shows a name with a bar at its beginning, or a line where there are no bars."""
        self._name = name
        self._start = self._said = time.monotonic()
        if self._task is None:
            self._task = self._bars.add_task(name, total=None)
        else:
            self._bars.reset(self._task, total=None, description=name)
        self._say(name)

    def step(self, done: int, total: int) -> None:
        """Shows that `done` of `total` units of the experiment are done."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if done == 0:  # preparation (such as drawing pairs) is no measure of the time left
            self._start = self._said = now
        if now - self._said > 10 and done:
            spent = now - self._start
            left = spent * (total - done) / done
            self._said = now
            self._say(f"{self._name}: {done / total:.0%} after {spent:.0f} s, {left:.0f} s left")

    def end(self, seconds: float, reused: bool) -> None:
        """Shows that the experiment is done."""
        self.finished += 1
        line = f"{self._name}: " + ("reused from an earlier run" if reused else f"{seconds:.1f} s")
        if self._draws:  # above the bars
            self._console.print(line, markup=False, highlight=False)
        self._say(line)

    def _say(self, line: str) -> None:
        if not self._draws:
            print(line, file=sys.stderr, flush=True)


def _draws_on(console: Console) -> bool:
    """Returns whether a console draws bars: a terminal does, and a notebook with ipywidgets."""
    in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    return console.is_terminal or in_notebook


@contextlib.contextmanager
def progress_bar(name: str, *, stderr: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yields an `on_progress` function that shows the progress of one call.

    It is a bar on a terminal and, with ipywidgets, in a notebook; otherwise a line about every ten
    seconds.  A call whose total changes begins a new bar.

    >>> with progress_bar("sweep") as step:  # such as sweep.run(model, metric, on_progress=step)
    ...     step(1, 2)
    """
    with _Stages(Console(stderr=stderr), name) as shown:
        yield shown.step


class _Stages(Listener):
    """Bars of one name, one for each total, which stay when they are full."""

    _total = 0

    def __enter__(self) -> "_Stages":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, done: int, total: int) -> None:
        if total != self._total:
            self._total, self._task = total, None
            self.show(f"{self._model}, {counted(total, 'step')}")
        super().step(done, total)


class Reporter(Listener):
    """Writes each event as one line of JSON to stderr, for the process that shows the progress."""

    _told_s = 0.0

    def step(self, done: int, total: int) -> None:
        """Reports progress, at most five times a second."""
        now = time.monotonic()
        if now - self._told_s > 0.2 or done in (0, total):
            self._told_s = now
            self._tell("step", done, total)

    def begin_named(self, name: str, of: int) -> None:
        """Reports that an experiment begins."""
        self.of = of
        self._tell("begin_named", name, of)

    def wait(self, why: str) -> None:
        """Reports what the job waits for."""
        self._tell("wait", why)

    def end(self, seconds: float, reused: bool) -> None:
        """Reports that an experiment is done."""
        self.finished += 1
        self._tell("end", seconds, reused)

    def _tell(self, *event: object) -> None:
        print(json.dumps({REPORTED: event}), file=sys.stderr, flush=True)


def listener_of(console: Console, model: str) -> Listener:
    """Returns what shows a job's progress, or reports it to the process that started this one."""
    kind = Reporter if os.environ.get(REPORTED) else Listener
    return kind(console, model)


def told(listener: Listener, line: str, console: Console) -> None:
    """Shows a line of a process's stderr: an event of its `Reporter`, or a message."""
    if not line.strip():  # before rich 14, a bar that ends leaves one where there is no terminal
        return
    try:
        name, *values = json.loads(line)[REPORTED]
    except (ValueError, TypeError, KeyError):
        console.print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
        return
    if name in ("wait", "begin_named", "step", "end"):
        getattr(listener, name)(*values)


def bars_on(console: Console) -> Progress:
    """Returns bars, one for each job; where the console cannot draw them, they show nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not _draws_on(console),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Restricts stderr to progress and to warnings of one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def say_loading(model: str) -> None:
    """Writes a line on stderr before a model is loaded, which takes minutes for large ones."""
    print(f"hooked-vlm: loading {model} …", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
