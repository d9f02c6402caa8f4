"""Runs the parts one after another, each in a process of its own.

Nothing here imports torch: a driver that hangs, or a card that is lost, ends a part and not this.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.files import read_json, write, write_json
from benchmarks.gpu.parts import Part
from benchmarks.gpu.rates import Rates, measured, predicted
from benchmarks.gpu.table import table


ROOT = Path(__file__).parents[2]
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
TINY_LIMIT = 120.0
"""Seconds of every part on small shapes, which a busy host is slow to prepare."""
COUNTING = Part("predictions", 120, "benchmarks.gpu.counted:run")
MACHINE = "machine"
"""The part whose rates predictions are made with again."""


class CannotStart(Exception):  # noqa: N818 - the text is all there is to say
    """Nothing can be measured; says why."""


@dataclass(frozen=True)
class Settings:
    """What results depend on."""

    device: str
    tiny: bool
    questions: int = 1


@dataclass
class Benchmark:
    """One run of the command."""

    out: Path
    settings: Settings
    parts: Sequence[Part]
    minutes: float
    counting: Part = COUNTING

    def run(self, numbers: Sequence[int], resume: bool = False) -> int:
        """Runs parts by number; returns the exit code: 1 if a correctness part failed.

        With `resume`, parts that have come to their end before are left as they are.  Raises
        `CannotStart` where the folder holds results of other settings, or predictions fail.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * self.minutes
        # Parts that were measured before predictions are measured again.
        keeps = resume and (self.out / "predictions.json").exists()
        done = self._earlier() if keeps else {}
        self.done: dict[int, dict[str, Any]] = done
        if not done:
            for name in ("results.json", "table.md", "predictions.json"):
                (self.out / name).unlink(missing_ok=True)
            self._predict()
        self._write()
        for number in numbers:
            if done.get(number, {}).get("status") != "done":
                done[number] = self._part(number)
                self._write()
            said = done[number]
            print(f"{number} {said['name']}: {said['status']}, {said['seconds']:.0f} s", flush=True)
        return int(any(_failed(part) for part in done.values()))

    def _limit(self, part: Part) -> float:
        """Returns the seconds of a part; small shapes take what the host takes."""
        return TINY_LIMIT if self.settings.tiny else part.limit

    def _earlier(self) -> dict[int, dict[str, Any]]:
        found = read_json(self.out / "results.json")
        if found is None:
            return {}
        if found["settings"] != asdict(self.settings):
            raise CannotStart(
                f"{self.out} holds results of {found['settings']}, and these settings are "
                f"{asdict(self.settings)}. Give another folder, or leave out --resume."
            )
        return {part["number"]: part for part in found["parts"]}

    def _predict(self) -> None:
        """Writes predictions.json, before anything is measured and without a GPU."""
        file = self.out / "counted.json"
        status, rows = self._process(self.counting, file, "counted.log", gpu=False)
        if status != "done":
            raise CannotStart(f"predictions: {status}; see {self.out / 'counted.log'}")
        rates = Rates()
        found = {"rates": asdict(rates), "predicted": predicted(rows, rates), "counted": rows}
        write_json(self.out / "predictions.json", found)

    def _part(self, number: int) -> dict[str, Any]:
        part = self.parts[number]
        found = {"number": number, "name": part.name, "correctness": part.correctness}
        left, limit = self.end - time.monotonic(), self._limit(part)
        if left < limit:
            status = f"skipped: its limit is {limit:.0f} s and {max(0, left):.0f} s are left"
            return {**found, "status": status, "seconds": 0.0, "rows": []}
        began = time.monotonic()
        file = self.out / f"part-{number}.json"
        status, rows = self._process(part, file, f"part-{number}.log", gpu=True)
        return {**found, "status": status, "seconds": time.monotonic() - began, "rows": rows}

    def _process(
        self, part: Part, file: Path, log: str, *, gpu: bool
    ) -> tuple[str, list[dict[str, Any]]]:
        """Runs a part within its limit; returns how it ended, and its rows up to there."""
        file.unlink(missing_ok=True)
        limit = self._limit(part)
        device = self.settings.device if gpu else "cpu"
        command = [sys.executable, "-m", "benchmarks.gpu.child", part.function]
        command += ["--file", str(file.absolute()), "--limit", str(limit), "--device", device]
        command += ["--questions", str(self.settings.questions)]
        command += ["--tiny"] * self.settings.tiny
        environment = dict(os.environ)
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (self.out / log).open("w") as opened:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=opened,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts (compilers) ends with it
            )
            try:
                code = process.wait(limit)
                status = "done" if code == 0 else f"failed with exit code {code}"
                status += _last_line(self.out / log) if code else ""
            except subprocess.TimeoutExpired:
                status = f"ended after its limit of {limit:.0f} s"
            finally:
                _end(process)
        found = read_json(file) or {"finished": False, "rows": []}
        if status == "done" and not found["finished"]:
            status = "failed: it wrote no results"
        return status, found["rows"]

    def _write(self) -> None:
        """Replaces results.json and table.md."""
        parts = [self.done[number] for number in sorted(self.done)]
        write_json(self.out / "results.json", {"settings": asdict(self.settings), "parts": parts})
        before = read_json(self.out / "predictions.json")
        again = None
        for part in parts:
            if part["name"] == MACHINE and part["rows"]:
                again = predicted(before["counted"], measured(part["rows"]))
        write(self.out / "table.md", table(before, again, parts, self.settings.tiny))


def _last_line(log: Path) -> str:
    """Returns what a process said last, which is its error."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""


def _failed(part: dict[str, Any]) -> bool:
    """Whether a correctness part ran and did not show what it is for."""
    if not part["correctness"] or part["status"].startswith("skipped"):
        return False
    shown = [row for row in part["rows"] if "correct" in row]
    return part["status"] != "done" or not shown or not all(row["correct"] for row in shown)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started, by SIGTERM and then by SIGKILL."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            break  # nobody is left in its group
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
