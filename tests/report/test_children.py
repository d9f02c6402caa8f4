"""Commands in processes of their own: how they end, and that none outlives the one that ran them.

The processes are real.  A loop waits for what another process does, up to a limit that only a
failure reaches.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hooked_vlm.report import children
from hooked_vlm.report.children import run_commands


LIMIT_S = 60
PARENT = """
import signal
import sys
from types import SimpleNamespace
from hooked_vlm.cli import running

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)  # a run in the background passes on that it ignores some
running.words_of = lambda job: [job.model]
sys.executable = {child!r}  # in the place of a run of the command line
running._run_apart([SimpleNamespace(model={one!r}), SimpleNamespace(model={two!r})], 2)
"""
SHELL = """\
#!/bin/sh
exec '{python}' '{script}' "$@"
"""  # a first line that names a Python takes no path with a space
CHILD = """\
import os, signal, subprocess, sys, time

{ignoring}
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
path = sys.argv[-1]
with open(path + ".new", "w") as file:
    file.write(f"{{os.getpid()}} {{inner.pid}}")
os.rename(path + ".new", path)
time.sleep(600)
"""


def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that only waits for its status to be read does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # ended in the meantime, or a system without these files
        return not Path("/proc").exists()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen, list[int]]]]:
    """Starts a command line with two processes, each of which starts one more."""
    made: list[int] = []

    def start(ignoring: str = "") -> tuple[subprocess.Popen, list[int]]:
        child, script = tmp_path / "child", tmp_path / "child.py"
        script.write_text(CHILD.format(ignoring=ignoring))
        child.write_text(SHELL.format(python=sys.executable, script=script))
        child.chmod(0o755)
        one, two = tmp_path / "one", tmp_path / "two"
        code = PARENT.format(child=str(child), one=str(one), two=str(two))
        parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        made.append(parent.pid)
        until(lambda: parent.poll() is not None or (one.exists() and two.exists()))
        pids = [int(pid) for path in (one, two) for pid in path.read_text().split()]
        made.extend(pids)
        return parent, pids

    yield start
    for pid in made:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_h_a_signal_ends_the_runs_and_what_they_started(started: Callable, number: int) -> None:
    parent, pids = started()
    assert len(pids) == 4 and all(map(is_alive, pids))
    parent.send_signal(number)
    _, said = parent.communicate(timeout=LIMIT_S)
    until(lambda: not any(map(is_alive, pids)))
    assert parent.returncode == 128 + number
    (line,) = [line for line in said.splitlines() if line.startswith("hooked-vlm: ")]
    assert signal.Signals(number).name in line and line.endswith("to resume.")


def test_h_a_second_signal_ends_what_ignores_the_first(started: Callable) -> None:
    parent, pids = started("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    # Of two kinds, since two of one kind that come together count as one.
    parent.send_signal(signal.SIGTERM)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=LIMIT_S)
    until(lambda: not any(map(is_alive, pids)))
    assert parent.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_statuses_are_in_the_order_of_the_commands(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import os, sys
        with open(os.environ["LOG"], "a") as log:
            log.write(f"+{sys.argv[1]} -{sys.argv[1]} ")
        sys.exit(int(sys.argv[1]))
    """)
    log = tmp_path / "log"
    commands = [[sys.executable, "-c", code, str(status)] for status in (3, 0, 2)]
    ended = run_commands(commands, 1, {**os.environ, "LOG": str(log)})
    assert ended == children.Ended([3, 0, 2]) and log.read_text() == "+3 -3 +0 -0 +2 -2 "
    assert run_commands(commands, 3, {**os.environ, "LOG": str(log)}).statuses == [3, 0, 2]


def test_an_error_leaves_no_process_and_no_handler(tmp_path: Path) -> None:
    made: list[subprocess.Popen] = []

    class Noted(subprocess.Popen):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            made.append(self)

    before = [signal.getsignal(number) for number in children._SIGNALS]
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(subprocess, "Popen", Noted)
        run_commands([sleep, [str(tmp_path / "nothing")]], 2, os.environ)
    assert made[0].returncode == -signal.SIGTERM
    assert [signal.getsignal(number) for number in children._SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As `nohup` sets SIGHUP, for a run that goes on without a terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with children._signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
