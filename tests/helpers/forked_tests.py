"""Runs tests in forked processes, on a copy of the project: what `tests/mutants.py` is made of."""

import contextlib
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


MEMORY = 32 * 2**30
"""Bytes of address space that one process may take."""

Known = dict[str, dict[str, Any]]
"""By test: the seconds that it took, and the lines of each module that it ran."""


class Chosen:
    """Lets pytest run the named tests in their order, and notes the first that fails."""

    def __init__(self, names: Sequence[str], noticed: Path) -> None:
        self.order = {name: number for number, name in enumerate(names)}
        self.noticed = noticed

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order),
            key=lambda item: self.order[item.nodeid],
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.noticed.exists():
            self.noticed.write_text(report.nodeid)


class Traced:
    """Notes for each test how long it takes and which lines of the package it runs."""

    def __init__(self, package: Path, out: Path) -> None:
        self.package, self.out = f"{package}{os.sep}", out
        self.known: Known = {}
        self.failed: set[str] = set()

    def pytest_runtest_protocol(self, item: Any) -> None:
        # Models that tests share are made anew, so that each test runs what it rests on.
        for name, module in list(sys.modules.items()):
            if name.startswith("helpers."):
                for value in vars(module).values():
                    if isinstance(value, functools._lru_cache_wrapper):
                        value.cache_clear()
        self.lines: dict[str, set[int]] = {}
        self.began = time.monotonic()
        sys.settrace(self._on_call)
        threading.settrace(self._on_call)

    def _on_call(self, frame: Any, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(self.package):
            return None
        lines = self.lines.setdefault(file.removeprefix(self.package), set())

        def on_line(frame: Any, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return on_line

        return on_line(frame, event, argument)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        self.known[nodeid] = {
            "seconds": round(time.monotonic() - self.began, 2),
            "lines": {file: sorted(lines) for file, lines in self.lines.items()},
        }

    def pytest_sessionfinish(self) -> None:
        kept = {name: told for name, told in self.known.items() if name not in self.failed}
        self.out.write_text(json.dumps(kept))


def run_tests(work: Path, files: Sequence[str], plugins: Sequence[Any], *options: str) -> int:
    """Runs pytest in this process, in the copy; returns its exit status."""
    common = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
    place = [f"--rootdir={work}", "-c", str(work / "pyproject.toml"), f"--basetemp={work / 'tmp'}"]
    return int(pytest.main([*files, *common, *place, *options], plugins=[*plugins]))


def in_child(work: Path, run: Callable[[], int], limit: float) -> int | None:
    """Returns the status of `run` in a forked process; None when it took longer than `limit` s."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(work)
            output = os.open(work / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            sys.path[:0] = [str(work)]
            os.environ["PYTHONPATH"] = str(work)  # for tests that start an interpreter
            status = run()
        except BaseException:  # noqa: BLE001 - whatever it is, the parent goes on
            os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            os._exit(status)
    until = time.monotonic() + limit
    try:
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
