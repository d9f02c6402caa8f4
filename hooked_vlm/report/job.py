"""Runs experiments on a model, writes them into a folder, and resumes interrupted runs.

The order of steps matters.  Errors in the arguments (an unknown experiment, a folder without
write permission, a missing device) are raised before the model is loaded, because loading is
slow.  The model is loaded before the first experiment.  Each unit of work (a batch of one
direction) is written to disk before the next one starts, and so is each finished experiment, so an
interruption loses at most one unit (see `parts`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.kinds import is_filled
from hooked_vlm.disk.files import remove_leftovers, writable_folder
from hooked_vlm.engine.shared import shared_runs
from hooked_vlm.errors import CannotRunError, DataError, RegionError, ScoringError, counted
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.loop import UnfinishedError, working_by
from hooked_vlm.experiments.options import FOLDERS, Config, check_options, limited, specialise
from hooked_vlm.experiments.registry import Step
from hooked_vlm.experiments.result import Result
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report.basis import Basis, data_files, everything, key_of, run_key
from hooked_vlm.report.devices import device_of, dtype_of
from hooked_vlm.report.folder import arguments_of, record_in, write_gathered
from hooked_vlm.report.listener import SILENT, Listener
from hooked_vlm.report.page import FIGURES, PAGE
from hooked_vlm.report.parts import PARTS, Parts, Share, folder_of, opened
from hooked_vlm.report.provenance import Provenance, Stopwatch, describe_run, source_commit
from hooked_vlm.report.results import RESULTS, load_result, save_result
from hooked_vlm.report.workers import Executor, Task, offered, require_executor
from hooked_vlm.stimuli.settings import OWN, is_own


@dataclass(frozen=True)
class Job:
    """An experiment or suite, its model and options, and the output folder."""

    experiment: str
    """The name of a suite or of one experiment."""
    model: str
    """A shipped model, a local folder or a hub name."""
    out: Path
    _: KW_ONLY
    config: Config = field(default_factory=Config)
    setting: str | None = None
    """The setting, where the suite does not fix it; None: each experiment's default."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of single experiments, as text: `{"alphas": "0,4,8"}`."""
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    """Whether to ignore results of an earlier run and compute them again."""
    limit: int | None = None
    """The most pairs, questions and pictures of each direction or axis, for a try."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """The results of a job, the record of its run, and the report page."""

    results: Sequence[Result]
    """Those of the job; the page has those of earlier runs in the folder too."""
    provenance: Provenance
    page: Path

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        record = self.provenance
        return {
            "report": str(self.page),
            "model": record.model,
            "experiment": record.experiment,
            "results": [
                {
                    "id": result.id,
                    "name": result.name,
                    "setting": result.setting,
                    "verdict": result.verdict,
                    "seconds": record.seconds.get(f"{result.name} on {result.setting}"),
                    "reused": f"{result.name} on {result.setting}" in record.reused,
                    "folder": str(self.page.parent / RESULTS / result.key),
                }
                for result in self.results
            ],
        }


def check(job: Job, *, writes: bool = True) -> list[Step]:
    """Returns a job's steps; raises `DataError` for wrong arguments, without loading a model.

    Unless it `writes`, the output folder is neither made nor tried.
    """
    steps = steps_of(job)
    if not is_filled(job.model):
        raise DataError("--model is empty. Give a shipped model, a local folder or a hub name.")
    if not isinstance(job.out, Path):
        raise DataError(f"out={shown(job.out)} was given; expected a pathlib.Path of a folder.")
    check_options([step.experiment.config for step in steps], job.options)
    for folder in [getattr(job.config, name) for name in FOLDERS]:
        if folder is not None and not folder.is_dir():
            raise DataError(f"There is no folder '{folder}'. Give a folder that exists.")
    read: list[Path] = []
    for step in steps:
        config = own(job, step)
        registry.check_own(step.experiment, config)
        config.check()
        data_files(config)  # opens every picture
        read += config.files().values()
    for name in FOLDERS:
        folder = getattr(job.config, name)
        if folder is not None and not any(path.is_relative_to(folder) for path in read):
            settings = ", ".join(dict.fromkeys(step.setting for step in steps))
            raise DataError(
                f"--{name} '{folder}' was given, and nothing of it is read by {job.experiment} on "
                f"{settings[:100]}. Leave it out, or give a --setting that uses it."
            )
    dtype_of(job.dtype)
    device_of(job.device)
    if writes:
        writable_folder(job.out)
    return steps


def steps_of(job: Job) -> list[Step]:
    """Returns the steps of a job."""
    return registry.steps(job.experiment, setting_of(job))


def setting_of(job: Job) -> str | None:
    """Returns the setting of a job; a folder with a table of own data selects the setting own."""
    if job.setting is None and registry.takes_own(job.experiment) and is_own(job.config.data):
        return OWN
    return job.setting


def own(job: Job, step: Step) -> Config:
    """Returns the configuration that a step of a job runs with."""
    config = specialise(step.experiment.config, job.config, job.options, step.setting)
    return limited(config, job.limit)


@dataclass(frozen=True, eq=False, kw_only=True)
class Loaded:
    """A job whose model is loaded."""

    job: Job
    steps: Sequence[Step]
    model: Any
    """A `HookedVLM`."""
    basis: Basis
    device: str

    @classmethod
    def of(cls, job: Job) -> "Loaded":
        """Loads a job's model, after `check` has verified the arguments."""
        steps = check(job)
        device = device_of(job.device)
        model = HookedVLM.from_pretrained(job.model, dtype=dtype_of(job.dtype), device=device)
        basis = Basis.of(model.hf_model, job.model, device)
        for written in (job.out, job.out / RESULTS, job.out / FIGURES):
            remove_leftovers(written)
        return cls(job=job, steps=steps, model=model, basis=basis, device=device)

    def work(
        self,
        step: Step,
        *,
        share: Share | None = None,
        executor: Executor | None = None,
        tasks: int | None = None,
        threads: int | None = None,
    ) -> "Work":
        """Returns what computes a step's units: in this process, its share, or by an executor."""
        config = own(self.job, step)
        about = everything(step.experiment.name, config, self.basis)
        folder = folder_of(self.job.out, step.key, key_of(about))
        offer = None
        if executor is not None:
            task = Task(
                model=self.job.model,
                dtype=self.job.dtype,
                device=torch.device(self.device).type,
                experiment=step.experiment.name,
                config=config,
                depends_on=about,
                folder=folder.resolve(),
                threads=threads or torch.get_num_threads(),
            )
            offer = partial(offered, executor, task, tasks)
        return Work(key_of(about), Parts([folder], share=share, offer=offer), about)


@dataclass(frozen=True, eq=False)
class Work:
    """How a step's units are come by, and the key of its result."""

    key: str
    parts: Parts
    about: Mapping[str, Any]
    """See `basis.everything`."""
    elsewhere: str = ""
    """How the processes that computed its units differ from this one, in words."""


def run(
    job: Job,
    listener: Listener = SILENT,
    *,
    executor: Executor | None = None,
    tasks: int | None = None,
    threads: int | None = None,
) -> Report:
    """Runs a job, writes its report and returns it.

    `executor` has the units of work computed by other processes: any of `concurrent.futures`,
    or another with `submit` (see `workers`).  Each task is one unit, or as many as divide those of
    a loop among `tasks`, for executors whose tasks start slowly.  Workers use `threads` threads,
    by default as many as this process.

    Raises `HookedVLMError` for wrong arguments before the model is loaded.  After a later
    error, or a `KeyboardInterrupt`, finished experiments remain in `job.out/results` and finished
    units in `job.out/parts`, and the same job reads them from there.
    """
    require_executor(executor, tasks, threads)
    loaded = Loaded.of(job)
    how = {"executor": executor, "tasks": tasks, "threads": threads}
    return finish(loaded, listener, partial(loaded.work, **how))


def finish(loaded: Loaded, listener: Listener, work_of: Callable[[Step], Work]) -> Report:
    """Runs a loaded job's steps, or reads their results, and writes the report.

    Raises `DataError` where units are missing that `work_of` does not compute.
    """
    job, steps, folder = loaded.job, loaded.steps, loaded.job.out / RESULTS
    results, seconds, reused, errors, missing = [], {}, [], [], []
    elsewhere = {}
    # 1. Run each step, or read its result from an earlier run with the same key.
    with Stopwatch() as watch, shared_runs(loaded.model):
        made = _run_facts(loaded, watch)
        for place, step in enumerate(steps, start=1):
            listener.begin(step, place, len(steps))
            work = work_of(step)
            if work.elsewhere:
                elsewhere[step.name] = work.elsewhere
            saved = None if job.fresh else load_result(folder, step.key, work.key)
            if saved is None:
                start = time.perf_counter()
                try:
                    found = computed(loaded, step, work, listener)
                except UnfinishedError as error:
                    missing += [f"{step.name}: {unit}" for unit in error.missing]
                    continue
                except (CannotRunError, RegionError, ScoringError) as error:
                    # In a suite, the other experiments may still run on this model.  A mistake
                    # of the user's is not among these errors, so it is never stored.
                    if len(steps) == 1:
                        raise
                    found = _not_run(step, error)
                    errors.append(error)
                result = replace(found, setting=step.setting)
                # Units that were read took their time in an earlier run, or another process.
                took = time.perf_counter() - start + work.parts.seconds
                _save(result, loaded, step, work.key, took, made)
                work.parts.remove()
            else:
                result, took = saved.result, saved.seconds
                reused.append(step.name)
            results.append(result)
            seconds[step.name] = took
            listener.end(took, saved is not None)
    if missing:
        raise DataError(
            f"{counted(len(missing), 'unit')} of work missing in '{job.out / PARTS}': "
            f"{'; '.join(missing[:3])}{' …' if len(missing) > 3 else ''}. Run the other parts, or "
            "one of them again."
        )
    if len(errors) == len(steps):
        raise errors[0]
    # 2. Write the record and the report.
    # The setting is the user's; None: each experiment's own.
    how = {"device": loaded.device, "dtype": job.dtype, "setting": job.setting}
    provenance = describe_run(
        loaded.model.hf_model,
        job.model,
        watch,
        model_sha256=loaded.basis.model_sha256,
        model_files=loaded.basis.model_files,
        experiment=job.experiment,
        config={**asdict(job.config), **job.options, **how, **_limit_of(job)},
        seed=job.config.seed,
        seconds=seconds,
        reused=reused,
        elsewhere=elsewhere,
        extensions={
            use: origin
            for step in steps
            for use, origin in registry.origins(
                step.experiment.name, (step.setting, *own(job, step).used_settings)
            ).items()
        },
    )
    page = write_gathered(job.out, provenance, {result.key: result for result in results})
    return Report(results=results, provenance=provenance, page=page)


def _save(
    result: Result, loaded: Loaded, step: Step, key: str, seconds: float, made: Mapping[str, Any]
) -> None:
    config = own(loaded.job, step)
    save_result(
        result,
        loaded.job.out / RESULTS,
        key,
        seconds=seconds,
        made={**made, "seed": config.seed},
        arguments=arguments_of(loaded.job, step.experiment.name, config),
    )


def _limit_of(job: Job) -> dict[str, int]:
    return {} if job.limit is None else {"limit": job.limit}


def _run_facts(loaded: Loaded, watch: Stopwatch) -> dict[str, Any]:
    """Returns what is kept beside each result of the run that computes it."""
    return {
        "model": loaded.job.model,
        "model_sha256": loaded.basis.model_sha256,
        "dtype": loaded.basis.dtype,
        "device": loaded.device,
        "hooked_vlm": loaded.basis.packages["hooked-vlm"],
        "git_commit": source_commit(),
        "started": watch.started.isoformat(timespec="seconds"),
    }


def computed(loaded: Loaded, step: Step, work: Work, listener: Listener) -> Result:
    """Returns the result of a step, whose units are computed or read."""
    if not work.parts.read_only:
        opened(work.parts.folders[0], work.about, anew=loaded.job.fresh)
    with working_by(work.parts):
        return step.experiment.run(loaded.model, own(loaded.job, step), listener.step)


def _not_run(step: Step, error: Exception) -> Result:
    """Returns the result of an experiment that cannot run on the model, with the reason."""
    experiment = step.experiment
    return Result(
        id=experiment.id,
        name=experiment.name,
        title=experiment.title,
        claim=experiment.claim,
        section=experiment.section,
        table=pd.DataFrame(),
        verdict=f"Could not be run on this model. {error}",
    )


def read(job: Job) -> Report:
    """Returns the report of a finished job from its folder.

    Raises `DataError` when the job is not finished, or when the folder has another job.
    """
    provenance = record_in(job.out)
    basis = Basis(
        model_sha256=provenance.model_sha256,
        model_files=provenance.model_files,
        attention=provenance.attention,
        dtype=provenance.dtype,
        device=torch.device(device_of(job.device)).type,
        packages={**provenance.packages, "hooked-vlm": provenance.hooked_vlm},
    )
    results = []
    for step in check(job):
        key = run_key(step.experiment.name, own(job, step), basis)
        saved = load_result(job.out / RESULTS, step.key, key)
        if saved is None:
            raise DataError(
                f"{step.name} in '{job.out}' is missing, or is of another run. Run the job again."
            )
        results.append(saved.result)
    return Report(results=results, provenance=provenance, page=job.out / PAGE)
