"""The results in an output folder: of the run that ends, and of earlier ones of the same model.

A report is about one model in one dtype.  Results of another model or dtype in its folder are
named on the page and not shown.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hooked_vlm.errors import DataError, HookedVLMWarning, callers_level
from hooked_vlm.experiments.options import COMMON, OF_OWN_DATA, Config
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.experiments.result import Result
from hooked_vlm.report.page import write_report
from hooked_vlm.report.provenance import Provenance
from hooked_vlm.report.results import ABOUT, RESULTS, made_by, read_result
from hooked_vlm.stimuli.settings import SCATTERED, SETTINGS


RECORD = "provenance.json"
SAME = ("model_sha256", "dtype")
"""What the results of one report have alike."""


@dataclass(frozen=True)
class Gathered:
    """The results of a folder that belong on one page."""

    results: Sequence[Result]
    earlier: Mapping[str, Mapping[str, Any]]
    """Of each result that an earlier run computed, by its key: the record of that run."""
    left_out: Sequence[str]
    """The results of another model or dtype, in words."""


def record_in(out: Path) -> Provenance:
    """Returns the record of the last run in a folder; raises `DataError` where there is none."""
    file = out / RECORD
    if not file.exists():
        raise DataError(f"There is no finished run in '{out}'. Run the job first.")
    return Provenance.from_json(file.read_text())


def gathered(out: Path, record: Provenance, known: Mapping[str, Result] | None = None) -> Gathered:
    """Returns the results in a folder; those in `known`, by key, are not read again.

    Warns about damaged results, which are left out.
    """
    results, earlier, left_out = [], {}, []
    of_the_run = {step.replace(" on ", "-") for step in record.seconds}
    for path in sorted((out / RESULTS).glob(f"*/{ABOUT}")):
        folder = path.parent
        key = folder.name
        own = (known or {}).get(key)
        try:
            made = made_by(folder)
            same = all(made.get(name) == getattr(record, name) for name in SAME)
            # Older versions did not note who made a result; those of the record are its own.
            if own is None and not same and (made or key not in of_the_run):
                of = f"{made['model']}, {made['dtype']}" if made else "an older version"
                left_out.append(f"{key} (of {of})")
                continue
            results.append(own or read_result(folder))
        except DataError as error:
            warnings.warn(
                f"{error} It is left out of the report.",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )
            continue
        if made and made["started"] != record.started:
            earlier[key] = made
    return Gathered(_in_order(results, record), earlier, left_out)


def write_gathered(
    out: Path, record: Provenance, known: Mapping[str, Result] | None = None
) -> Path:
    """Writes the report of all results in a folder; returns the page's path."""
    found = gathered(out, record, known)
    return write_report(found.results, record, out, made=found.earlier, left_out=found.left_out)


def folder_name(model: str) -> str:
    """Returns the name of a model's folder among those of several models.

    It is the model's name, and for a folder its last part with a hash of its whole path, so that
    two checkpoints of one name get two folders.

    >>> folder_name("tiny-qwen2-vl"), folder_name("org/model")
    ('tiny-qwen2-vl', 'org--model')
    """
    path = Path(model)
    if not path.is_dir():
        return re.sub(r"[^\w.-]+", "--", model).strip(".-") or "model"
    whole = path.resolve()
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", whole.name).strip(".-") or "model"
    return f"{name}-{digest}"


def arguments_of(job: Any, name: str, config: Config) -> dict[str, Any]:
    """Returns the arguments that run an experiment of a `job.Job` again, for `--config`."""
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    common = {field: own.pop(field) for field in COMMON}
    for field in OF_OWN_DATA:
        if own[field] is False:
            del own[field]
    return {
        "experiment": name,
        "model": job.model,
        **{
            field: value
            for field, value in common.items()
            if value is not None and value is not False
        },
        "device": job.device,
        "dtype": job.dtype,
        "set": {field: _text(value) for field, value in own.items()},
    }


def _text(value: Any) -> str:
    """Returns the value of an option as `options.parse` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _in_order(results: Sequence[Result], record: Provenance) -> list[Result]:
    """Returns results in the order of the run, if all are of it; else in that of the list."""
    run = list(record.seconds)
    names = [f"{result.name} on {result.setting}" for result in results]
    if set(names) <= set(run):
        return sorted(results, key=lambda r: run.index(f"{r.name} on {r.setting}"))
    experiments, settings = list(EXPERIMENTS), [*SETTINGS, *SCATTERED]

    def place(result: Result) -> tuple[int, str, int, str]:
        experiment = [*experiments, result.name].index(result.name)
        setting = [*settings, result.setting].index(result.setting)
        return experiment, result.name, setting, result.setting

    return sorted(results, key=place)
