"""Makes the report of a job from parts that several processes computed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.registry import Step
from hooked_vlm.report.basis import everything, key_of
from hooked_vlm.report.job import Loaded, Report, Work, finish, own
from hooked_vlm.report.listener import Listener
from hooked_vlm.report.parts import ABOUT, PARTS, Parts
from hooked_vlm.report.shares import remembered_job
from hooked_vlm.report.workers import differences


SAME = ("format", "experiment", "options", "data")
"""What parts of one experiment have alike; others are of another run."""


def merge(
    out: Path, listener: Listener, *, device: str = "auto", allow_mixed: bool = False
) -> Report:
    """Returns the report of the parts in a folder, which `run_share` computed.

    The model is loaded on `device`, which may be of another kind than that of the parts: no unit
    is computed.  Raises `DataError` where units are missing, and, without `allow_mixed`, where
    parts were computed with several versions, devices or attention implementations, or with
    another version than this one.
    """
    job = replace(remembered_job(out), device=device)
    loaded = Loaded.of(job)
    return finish(loaded, listener, partial(_work, loaded, allow_mixed))


def _work(loaded: Loaded, allow_mixed: bool, step: Step) -> Work:
    """Returns how a step's units are read."""
    mine = everything(step.experiment.name, own(loaded.job, step), loaded.basis)
    every = _parts_of(loaded.job.out, step)
    found = {folder: about for folder, about in every.items() if _is_same(about, mine)}
    if every and not found:
        apart = differences(next(iter(every.values())), mine)
        raise DataError(
            f"Parts of {step.name} in '{loaded.job.out}' are of other data, options or weights "
            f"than those there are now: {apart[:120]}. Restore them, or compute the parts again."
        )
    if not found:
        return Work(key_of(mine), Parts([], read_only=True), mine)
    abouts = list(found.values())
    # A step that needs no unit is computed here: the kind of device is no difference.
    here = {**mine, "basis": {**mine["basis"], "device": abouts[0]["basis"]["device"]}}
    apart = [said for about in abouts if (said := differences(about, here))]
    if apart and not allow_mixed:
        raise DataError(
            f"Parts of {step.name} in '{loaded.job.out}' were computed differently: "
            f"{'; '.join(apart)[:160]}. Compute all parts with one version on one kind of device "
            f"and remove the others' folders {step.key}-… in {PARTS}, or give --allow-mixed."
        )
    keys = [key_of(about) for about in abouts]
    key = keys[0] if len(keys) == 1 else key_of({"mixed": keys})
    there = dict.fromkeys(said for about in abouts if (said := differences(about, mine)))
    return Work(key, Parts(list(found), read_only=True), mine, elsewhere="; ".join(there))


def _is_same(about: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    is_same = all(about.get(name) == mine[name] for name in SAME)
    return is_same and about["basis"]["model_sha256"] == mine["basis"]["model_sha256"]


def _parts_of(out: Path, step: Step) -> dict[Path, dict[str, Any]]:
    """Returns the folders of a step's parts, and what each depends on."""
    found = {}
    for folder in sorted((out / PARTS).glob(f"{step.key}-*")):
        if not re.fullmatch(f"{re.escape(step.key)}-[0-9a-f]{{16}}", folder.name):
            continue
        try:
            about = json.loads((folder / ABOUT).read_text())
            about["basis"]["model_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[folder] = about
    return found


def folders_with_parts(out: Path) -> Sequence[Path]:
    """Returns the folder itself, or those in it that have parts of a job (one for each model).

    Raises `DataError` where there are none.
    """
    if (out / PARTS).is_dir():
        return [out]
    found = sorted(path.parent for path in out.glob(f"*/{PARTS}"))
    if not found:
        raise DataError(
            f"There are no parts in '{out}'. Give the --out of hooked-vlm run … --part I/N."
        )
    return found
