"""The commands that run experiments: `run`, `merge`, `demo` and `reproduce`."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hooked_vlm.cli.app import FAILED, SIGNALLED, USER_ERROR, app, importing, show
from hooked_vlm.cli.parameters import (
    AUTO,
    AllowMixed,
    Backgrounds,
    BatchSize,
    Card,
    Command,
    ConfigFile,
    Cutouts,
    Data,
    Device,
    DryRun,
    Dtype,
    ExecutorName,
    Experiment,
    Fresh,
    Jobs,
    Json,
    Limit,
    Model,
    Models,
    Options,
    OtherWords,
    Out,
    Pairs,
    Part,
    Seed,
    Setting,
)
from hooked_vlm.disk.files import lacking
from hooked_vlm.errors import DataError, counted
from hooked_vlm.report.children import run_commands, words_of
from hooked_vlm.report.progress import (
    REPORTED,
    Listener,
    bars_on,
    listener_of,
    quiet,
    told,
)


if TYPE_CHECKING:
    from hooked_vlm.report.engines import Engine
    from hooked_vlm.report.job import Job, Report

INTERRUPTED = SIGNALLED + signal.SIGINT


@app.command(cls=Command)
def run(
    experiment: Experiment,
    model: Model,
    out: Out,
    setting: Setting = None,
    pairs: Pairs = 50,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    cutouts: Cutouts = None,
    backgrounds: Backgrounds = None,
    data: Data = None,
    other_words: OtherWords = False,
    options: Options = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    fresh: Fresh = False,
    part: Part = None,
    executor: ExecutorName = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    card: Card = "H200",
    json: Json = False,
) -> None:
    """Run an experiment or a suite on a model and write its report.

    A folder that has results of this model keeps them: the report shows them all.
    """
    importing()
    from hooked_vlm.experiments.options import Config, from_words
    from hooked_vlm.report.job import Job

    job = Job(
        experiment=experiment,
        model=model,
        out=out,
        config=Config(
            pairs=pairs,
            seed=seed,
            batch_size=batch_size,
            cutouts=cutouts,
            backgrounds=backgrounds,
            data=data,
            other_words=other_words,
        ),
        setting=setting,
        options=from_words(options or []),
        device=device,
        dtype=dtype,
        fresh=fresh,
        limit=limit,
    )
    if dry_run:
        _print_plans([job], card, json)
        return
    _one_after_the_other([job], part, executor, json)


@app.command(cls=Command)
def merge(
    out: Annotated[Path, typer.Argument(help="The --out of the runs with --part.")],
    device: Device = "auto",
    allow_mixed: AllowMixed = False,
    json: Json = False,
) -> None:
    """Write the report of parts that `run … --part I/N` computed."""
    importing()
    from hooked_vlm.report import merge as merging

    done = []
    for folder in merging.folders_with_parts(out):
        listener = Listener(Console(stderr=True), folder.name)
        with quiet(), listener:
            done.append(merging.merge(folder, listener, device=device, allow_mixed=allow_mixed))
        if not json:
            print(f"report: {done[-1].page}")
    if json:
        show("", [made.summary for made in done], as_json=True)


@app.command(cls=Command)
def demo(
    out: Out = Path("demo"),
    pairs: Pairs = 50,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    limit: Limit = None,
    fresh: Fresh = False,
    jobs: Jobs = 0,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Run the dual-mechanisms suite on every shipped model and write one report."""
    importing()
    from hooked_vlm import zoo
    from hooked_vlm.experiments.options import Config
    from hooked_vlm.report.job import Job

    common = Config(pairs=pairs, seed=seed, batch_size=batch_size)
    how = {"config": common, "device": device, "fresh": fresh, "limit": limit}
    made = [Job("dual-mechanisms", name, out / name, **how) for name in zoo.available()]
    title = "The dual mechanisms of spatial reasoning, on the shipped models"
    _side_by_side(made, out, title, jobs, json)


@app.command(cls=Command)
def reproduce(
    out: Out,
    model: Models = None,
    pairs: Pairs = 50,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    cutouts: Cutouts = None,
    backgrounds: Backgrounds = None,
    data: Data = None,
    options: Options = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    limit: Limit = None,
    fresh: Fresh = False,
    jobs: Jobs = 0,
    part: Part = None,
    executor: ExecutorName = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    card: Card = "H200",
    json: Json = False,
) -> None:
    """Run every experiment on every setting, in float32. Run it again to resume."""
    importing()
    from hooked_vlm.experiments.options import Config, from_words
    from hooked_vlm.report.reproduce import jobs as jobs_of

    common = Config(
        pairs=pairs,
        seed=seed,
        batch_size=batch_size,
        cutouts=cutouts,
        backgrounds=backgrounds,
        data=data,
    )
    made = jobs_of(
        out,
        model or (),
        config=common,
        options=from_words(options or []),
        device=device,
        dtype=dtype,
        fresh=fresh,
        limit=limit,
    )
    if dry_run:
        _print_plans(made, card, json)
        return
    if jobs != 0 and (part is not None or executor is not None):
        raise DataError("--jobs was given with --part or --executor; expected one of the three.")
    if jobs == AUTO:
        executor = "processes"
    if part is not None or executor is not None:
        _one_after_the_other(made, part, executor, json)
        return
    title = "The dual mechanisms of spatial reasoning, and what is open"
    _side_by_side(made, out, title, jobs, json)


def _print_plans(made: Sequence["Job"], card: str, as_json: bool) -> None:
    """Checks jobs, and prints what each would take."""
    from hooked_vlm.report.planned import plan_job

    with quiet():
        plans = [plan_job(job, card) for job in made]
    text = "\n\n".join(map(str, plans))
    show(f"{text}\nThe arguments are correct. Nothing was run.", plans, as_json)


def _side_by_side(made: Sequence["Job"], out: Path, title: str, jobs: int, as_json: bool) -> None:
    """Runs jobs, in parallel processes where that is faster, and writes their index page."""
    from hooked_vlm.report import index
    from hooked_vlm.report import job as runner
    from hooked_vlm.report.devices import device_of

    for job in made:  # check all jobs before the first one runs
        runner.check(job)
    if jobs in (0, AUTO):
        jobs = min(len(made), os.cpu_count() or 1) if device_of(made[0].device) == "cpu" else 1
    if jobs > 1 and len(made) > 1:
        _run_apart(made, jobs)
        done = [runner.read(job) for job in made]
    else:
        done = [_run(job) for job in made]
    reports = {
        str(job.out.relative_to(out)): (one.results, one.provenance)
        for job, one in zip(made, done, strict=True)
    }
    page = index.write_index(reports, out, title=title)
    summary = {"report": str(page), "reports": [one.summary for one in done]}
    show(f"report: {page}", summary, as_json)


def _run_apart(made: Sequence["Job"], jobs: int) -> None:
    """Runs each job in its own process, with an equal share of the CPU's cores."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, REPORTED: "1"}
    commands = [[sys.executable, "-m", "hooked_vlm", *words_of(job)] for job in made]
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        bars = stack.enter_context(bars_on(console))
        shown = [stack.enter_context(Listener(console, job.model, bars)) for job in made]
        ended = run_commands(
            commands, jobs, environment, lambda index, line: told(shown[index], line, console)
        )
    if ended.signal is not None:
        print(
            f"hooked-vlm: ended by {signal.Signals(ended.signal).name}, with the runs of "
            f"{', '.join(job.model for job in made)}. Run the same command again to resume.",
            file=sys.stderr,
        )
        sys.exit(SIGNALLED + ended.signal)
    failed = {job.model: status for job, status in zip(made, ended.statuses, strict=True) if status}
    if failed:
        print(
            f"hooked-vlm: the run failed for {', '.join(failed)}. See the messages above.",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR if {*failed.values()} == {USER_ERROR} else FAILED)


def _one_after_the_other(
    made: Sequence["Job"], part: str | None, executor: str | None, as_json: bool
) -> None:
    """Runs jobs whole, a share of each, or each with the processes of an executor."""
    from hooked_vlm.report import engines, shares
    from hooked_vlm.report import job as runner
    from hooked_vlm.report.parts import Share

    if part is not None and executor is not None:
        raise DataError("--part and --executor were both given; expected one of them.")
    if part is not None or executor is not None or len(made) > 1:
        for job in made:  # check all jobs before the first one runs
            runner.check(job)
    if part is not None:
        share = Share.read(part)
        for job in made:
            listener = listener_of(Console(stderr=True), f"{job.model}, part {part}")
            with _said_when_ended(job, listener):
                done = shares.run_share(job, listener, share)
            said = (
                f"part {part} of {job.model}: {counted(done.computed, 'unit')} computed, "
                f"{done.read} read, {len(done.missing)} left to other parts. When all parts are "
                f"done: hooked-vlm merge {job.out}"
            )
            show(said, {"part": part, "model": job.model, **vars(done)}, as_json)
        return
    done = []
    for job in made:
        if executor is None:
            done.append(_run(job))
        else:
            with engines.engine_of(executor, job.out) as engine:
                if engine.said:
                    print(f"hooked-vlm: {engine.said}", file=sys.stderr)
                done.append(_run(job, engine))
        if not as_json:
            print(f"report: {done[-1].page}")
    if as_json:
        summaries = [report.summary for report in done]
        show("", summaries[0] if len(made) == 1 else summaries, as_json)


def _run(job: "Job", engine: "Engine | None" = None) -> "Report":
    from hooked_vlm.report import job as runner

    runner.check(job)
    listener = listener_of(Console(stderr=True), job.model)
    with _said_when_ended(job, listener):
        return runner.run(job, listener, **({} if engine is None else engine.how))


@contextlib.contextmanager
def _said_when_ended(job: "Job", listener: Listener) -> Iterator[None]:
    """Shows a job's progress; prints what is kept of it when it is interrupted."""
    kept = f"experiments on {job.model}; results and finished units are kept in {job.out}"
    try:
        with quiet(), listener:
            yield
    except KeyboardInterrupt:
        print(
            f"hooked-vlm: interrupted after {listener.finished} of {listener.of or 'the'} {kept}. "
            "Run the same command again to resume.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    except (OSError, MemoryError, RuntimeError) as error:
        missing = lacking(error)
        if missing is None:
            raise
        print(
            f"hooked-vlm: {missing[0]}, after {listener.finished} of {listener.of or 'the'} "
            f"{kept}. {missing[1]}, and run the command again to resume.",
            file=sys.stderr,
        )
        sys.exit(FAILED)
