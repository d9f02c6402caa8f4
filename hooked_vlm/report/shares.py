"""Computes a share of a job's units in one of several processes, such as those of a SLURM array."""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hooked_vlm.disk.files import write_file
from hooked_vlm.engine.shared import shared_runs
from hooked_vlm.errors import CannotRunError, DataError, RegionError, ScoringError
from hooked_vlm.experiments.loop import UnfinishedError
from hooked_vlm.experiments.options import FOLDERS, Config
from hooked_vlm.report.job import Job, Loaded, check, computed
from hooked_vlm.report.listener import Listener
from hooked_vlm.report.parts import PARTS, Share
from hooked_vlm.report.results import RESULTS, load_result


JOB = "job.json"
"""The file, in the folder of parts, that says which job they are of."""


@dataclass(frozen=True)
class Done:
    """What a process did of its share."""

    computed: int
    read: int
    missing: Sequence[str]
    """The units that are left to other processes."""


def run_share(job: Job, listener: Listener, share: Share) -> Done:
    """Computes a share of a job's units; `merge` makes the report when all processes are done.

    Units of pairs and of probes, which all others need, are computed by the process that comes
    first.  Raises `DataError` as `run` does, and where the folder has parts of another job.
    """
    check(job)
    if job.fresh:
        raise DataError(
            "--fresh and --part were both given; a part would remove those of other processes. "
            "Give another --out to compute everything again."
        )
    remember_job(job)
    loaded = Loaded.of(job)
    made, read, missing = 0, 0, []
    with shared_runs(loaded.model):
        for place, step in enumerate(loaded.steps, start=1):
            listener.begin(step, place, len(loaded.steps))
            start = time.perf_counter()
            work = loaded.work(step, share=share)
            if load_result(job.out / RESULTS, step.key, work.key) is None:
                try:
                    computed(loaded, step, work, listener)
                except UnfinishedError as error:
                    missing += [f"{step.name}: {unit}" for unit in error.missing]
                except (CannotRunError, RegionError, ScoringError):
                    pass  # `merge` meets the same error, and reports it
            made, read = made + work.parts.computed, read + work.parts.read
            listener.end(time.perf_counter() - start, False)
    return Done(made, read, missing)


def remember_job(job: Job) -> None:
    """Writes a job into its folder of parts, for `merge`.

    The device is left out: each process of one machine may have a card of its own.

    Raises `DataError` where the folder has parts of another job.
    """
    path = job.out / PARTS / JOB
    text = json.dumps({**asdict(job), "out": None, "device": "auto"}, indent=2, default=str) + "\n"
    there = None
    with contextlib.suppress(FileNotFoundError):
        there = path.read_text()
    if there is not None and there != text:
        raise DataError(
            f"'{job.out}' has parts of another job ({path}). Give another --out, or remove "
            f"'{path.parent}'."
        )
    write_file(path, text)


def remembered_job(out: Path) -> Job:
    """Returns the job whose parts a folder has; raises `DataError` where there is none."""
    path = out / PARTS / JOB
    try:
        found = json.loads(path.read_text())
        config = found.pop("config")
        folders = {name: Path(config[name]) for name in FOLDERS if config[name] is not None}
        return Job(**{**found, "out": out, "config": Config(**{**config, **folders})})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"There are no parts of a job in '{out}' ({type(error).__name__}). Give the --out of "
            "hooked-vlm run … --part I/N."
        ) from None
