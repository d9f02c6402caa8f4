"""Runs tests in forked processes, on a copy of the project: what `tests/mutants.py` is made of."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


MEMORY = 32 * 2**30
"""Bytes of address space that one process may take."""

CUT = 71
"""Exit status of a process whose tests passed until their time was over."""


class Watched:
    """Notes the first test that fails, and ends a session that took its share of the processor."""

    def __init__(self, noticed: Path, cap: float) -> None:
        self.noticed, self.cap = noticed, cap
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.passed and report.when == "call"
        if report.failed and not self.noticed.exists():
            self.noticed.write_text(report.nodeid)

    def pytest_runtest_logfinish(self) -> None:
        # Processor time: what other processes do changes no verdict.
        if time.process_time() > self.cap and not self.noticed.exists():
            os._exit(CUT)


def run_tests(work: Path, files: Sequence[str], plugins: Sequence[Any], *options: str) -> int:
    """Runs pytest in this process, in the copy; returns its exit status."""
    common = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
    place = [f"--rootdir={work}", "-c", str(work / "pyproject.toml"), f"--basetemp={work / 'tmp'}"]
    return int(pytest.main([*files, *common, *place, *options], plugins=[*plugins]))


def in_child(work: Path, run: Callable[[], int], limit: int) -> int:
    """Returns the status of `run` in a forked process that may take `limit` s of the processor.

    The status of a process that a signal ended, also for too much time, is negative.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            import resource  # here, as Windows has none

            os.setsid()
            os.chdir(work)
            output = os.open(work / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            signal.alarm(20 * limit)  # for a process that waits
            sys.path[:0] = [str(work)]
            os.environ["PYTHONPATH"] = str(work)  # for tests that start an interpreter
            status = run()
        except BaseException:  # noqa: BLE001 - whatever it is, the parent goes on
            os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            os._exit(status)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        with contextlib.suppress(ProcessLookupError):  # what tests started
            os.killpg(child, signal.SIGKILL)
