"""Shows the progress of a job: bars on a terminal and in a notebook, otherwise lines."""

import contextlib
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


class Listener(contextlib.AbstractContextManager):
    """Shows the progress of a job: bars on a terminal and in a notebook, otherwise lines.

    A notebook needs ipywidgets for bars.  Lines come about every ten seconds.
    """

    def __init__(self, console: Console, model: str) -> None:
        self.finished, self.of = 0, 0
        self._model = model
        self._draws = console.is_terminal or _draws_in_notebook(console)
        self._start = self._said = 0.0
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._draws,
        )

    def __enter__(self) -> "Listener":
        self._say(f"{self._model}: loading")
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, step: Any, place: int, of: int) -> None:
        """Shows that a `registry.Step` begins."""
        self.of = of
        self.show(f"{self._model} {place}/{of} {step.experiment.id} {step.name}")

    def show(self, name: str) -> None:
        """Shows a new bar, or a line where there are none."""
        self._name = name
        self._start = self._said = time.monotonic()
        self._task = self._bars.add_task(self._name, total=None)
        self._say(self._name)

    def step(self, done: int, total: int) -> None:
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
        self.finished += 1
        how = "reused from an earlier run" if reused else f"{seconds:.1f} s"
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1, description=f"{self._name}: {how}")
        self._say(f"{self._name}: {how}")

    def _say(self, line: str) -> None:
        if not self._draws:
            print(line, file=sys.stderr, flush=True)


def _draws_in_notebook(console: Console) -> bool:
    """Whether bars can be drawn in a notebook; without ipywidgets they would only be printed."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


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
    """Bars of one name, one for each total."""

    _total = 0

    def __enter__(self) -> "_Stages":
        self._bars.start()
        return self

    def step(self, done: int, total: int) -> None:
        if total != self._total:
            self._total = total
            self.show(f"{self._model}, {counted(total, 'unit')}")
        super().step(done, total)


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


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
