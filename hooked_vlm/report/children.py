"""Runs commands in processes of their own, and ends them when a signal ends this process.

Without this, a signal to this process would leave the others running, and they would go on
writing into the folder of the next run.  Each command gets a session of its own, so that a signal
reaches the processes which it started too.  A terminal sends Ctrl-C to this process alone, which
sends it on like the other signals.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_GRACE_S = 20.0
"""Seconds that a command has to end after a signal, before it is killed."""
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Ended:
    """How the commands ended."""

    statuses: Sequence[int | None]
    """The exit status of each command; None for one that did not run to its end."""
    signal: int | None = None
    """The signal that ended this process's wait, if one came."""


def run_commands(
    commands: Sequence[Sequence[str]],
    at_once: int,
    environment: Mapping[str, str],
    on_line: Callable[[int, str], None] | None = None,
) -> Ended:
    """Runs commands, `at_once` of them at the same time, without their standard output.

    `on_line(index, line)` gets each line that a command writes to stderr; else it goes to this
    process's.

    After SIGINT, SIGTERM or SIGHUP, which are sent on to the commands, no further one is started.
    A command that does not end by itself is killed, after a second signal at once.
    """
    statuses: list[int | None] = [None] * len(commands)
    waiting = list(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    readers: list[threading.Thread] = []
    with _signals() as received:
        try:
            while (waiting or running) and not received:
                while waiting and len(running) < at_once and not received:
                    index, command = waiting.pop(0)
                    running[index] = subprocess.Popen(
                        command,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=None if on_line is None else subprocess.PIPE,
                        start_new_session=True,
                    )
                    if on_line is not None:
                        readers.append(_reading(running[index], index, on_line))
                time.sleep(_PAUSE_S)
                for index in [i for i, process in running.items() if process.poll() is not None]:
                    statuses[index] = running.pop(index).returncode
        finally:
            _end(running.values(), received)
            for reader in readers:  # what the commands wrote last
                reader.join(_GRACE_S)
    return Ended(statuses, received[0] if received else None)


def _reading(
    process: subprocess.Popen[bytes], index: int, on_line: Callable[[int, str], None]
) -> threading.Thread:
    """Starts to read what a command writes to stderr, and returns the thread that reads."""

    def read() -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                on_line(index, line.decode(errors="replace"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def words_of(job: Any) -> list[str]:
    """Returns the command line that runs a `job.Job`."""
    words = ["run", job.experiment, "--model", job.model, "--out", str(job.out)]
    words += ["--device", job.device, "--dtype", job.dtype, *(["--fresh"] * job.fresh)]
    words += ["--setting", job.setting] if job.setting else []
    words += ["--limit", str(job.limit)] if job.limit is not None else []
    defaults = type(job.config)()
    for field in fields(job.config):
        value = getattr(job.config, field.name)
        if field.name != "setting" and value != getattr(defaults, field.name):
            words += [f"--{field.name.replace('_', '-')}"]
            words += [] if value is True else [str(value)]
    for name, value in job.options.items():
        words += ["--set", f"{name}={value}"]
    return words


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the signals that come in the block, where they do not end this process.

    A handler that raised could do so between the start of a process and its entry in a list.
    """
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _end(processes: Collection[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """Ends processes and what they started: by the signal received, then by force."""
    for process in processes:
        _send(process, received[0] if received else signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(received) > 1:
            break
        time.sleep(_PAUSE_S)
    for process in processes:
        _send(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a process and to those that it started and that are still there."""
    if os.name != "posix":
        process.terminate()
        return
    # The group is there as long as one of its processes is.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
