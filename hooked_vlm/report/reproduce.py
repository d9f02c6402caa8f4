"""Every experiment on every setting, for one model or several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hooked_vlm import zoo
from hooked_vlm.report.folder import folder_name
from hooked_vlm.report.job import Job, Report, check, run
from hooked_vlm.report.listener import SILENT, Listener
from hooked_vlm.report.workers import Executor


def jobs(out: Path, models: Sequence[str] = (), **how: Any) -> list[Job]:
    """Returns a job for each model, by default each shipped one, in a folder of its own.

    `how` are fields of `Job`, such as `config` and `device`.
    """
    how = {"dtype": "float32", **how}
    return [
        Job("reproduce", name, out / folder_name(name), **how)
        for name in dict.fromkeys(models or zoo.available())
    ]


def reproduce(
    out: Path,
    models: Sequence[str] = (),
    *,
    executor: Executor | None = None,
    tasks: int | None = None,
    threads: int | None = None,
    listener: Listener = SILENT,
    **how: Any,
) -> list[Report]:
    """Runs all experiments on all settings, one model after the other, and returns the reports.

    `executor`, `tasks` and `threads` are those of `job.run`, `how` fields of `Job`.  Raises
    `DataError` for wrong arguments before a model is loaded.
    """
    made = jobs(out, models, **how)
    for job in made:
        check(job)
    given = {"executor": executor, "tasks": tasks, "threads": threads}
    return [run(job, listener, **given) for job in made]
