"""The command line: `hooked-vlm run`, `demo`, `reproduce`, `merge`, `plan`, `check`, `list` …

Only this file prints results and exits.  It converts arguments to a `Job`, shows the job's
progress, and prints every `HookedVLMError` as one line with exit status 2.  torch and
transformers take seconds to import, so each command imports them only when it runs, and
`--help` answers at once.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hooked_vlm.disk.files import lacking
from hooked_vlm.errors import DataError, HookedVLMError, counted
from hooked_vlm.report.children import run_commands, words_of
from hooked_vlm.report.command_options import (
    AUTO,
    AllowMixed,
    Backgrounds,
    BatchSize,
    Command,
    Cutouts,
    Data,
    Device,
    Dtype,
    EveryLayer,
    ExecutorName,
    Fresh,
    Jobs,
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
from hooked_vlm.report.progress import Listener, quiet
from hooked_vlm.report.view_command import view


if TYPE_CHECKING:
    from hooked_vlm.report.engines import Engine
    from hooked_vlm.report.job import Job, Report

FAILED, USER_ERROR, SIGNALLED = 1, 2, 128  # a signal's number is added to the last
INTERRUPTED = SIGNALLED + signal.SIGINT

app = typer.Typer(
    name="hooked-vlm",
    help="Interpretability experiments on vision-language models, from a model to a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(cls=Command)
def run(
    experiment: Annotated[str, typer.Argument(help="A suite or one experiment (see `list`).")],
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
    fresh: Fresh = False,
    part: Part = None,
    executor: ExecutorName = None,
) -> None:
    """Run an experiment or a suite on a model and write its report."""
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
    )
    _one_after_the_other([job], part, executor)


@app.command(cls=Command)
def merge(
    out: Annotated[Path, typer.Argument(help="The --out of the runs with --part.")],
    device: Device = "auto",
    allow_mixed: AllowMixed = False,
) -> None:
    """Write the report of parts that `run … --part I/N` computed."""
    from hooked_vlm.report import merge as merging

    for folder in merging.folders_with_parts(out):
        listener = Listener(Console(stderr=True), folder.name)
        with quiet(), listener:
            made = merging.merge(folder, listener, device=device, allow_mixed=allow_mixed)
        print(f"report: {made.page}")


@app.command(cls=Command)
def demo(
    out: Out = Path("demo"),
    pairs: Pairs = 50,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    fresh: Fresh = False,
    jobs: Jobs = 0,
) -> None:
    """Run the dual-mechanisms suite on every shipped model and write one report."""
    from hooked_vlm import zoo
    from hooked_vlm.experiments.options import Config
    from hooked_vlm.report.job import Job

    config = Config(pairs=pairs, seed=seed, batch_size=batch_size)
    made = [
        Job("dual-mechanisms", name, out / name, config=config, device=device, fresh=fresh)
        for name in zoo.available()
    ]
    _side_by_side(made, out, "The dual mechanisms of spatial reasoning, on two small models", jobs)


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
    fresh: Fresh = False,
    jobs: Jobs = 0,
    part: Part = None,
    executor: ExecutorName = None,
) -> None:
    """Run every experiment on every setting, in float32. Run it again to resume."""
    from hooked_vlm.experiments.options import Config, from_words
    from hooked_vlm.report.reproduce import jobs as jobs_of

    config = Config(
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
        config=config,
        options=from_words(options or []),
        device=device,
        dtype=dtype,
        fresh=fresh,
    )
    if jobs != 0 and (part is not None or executor is not None):
        raise DataError("--jobs was given with --part or --executor; expected one of the three.")
    if jobs == AUTO:
        executor = "processes"
    if part is not None or executor is not None:
        _one_after_the_other(made, part, executor)
        return
    _side_by_side(made, out, "The dual mechanisms of spatial reasoning, and what is open", jobs)


@app.command(cls=Command)
def sites(
    model: Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")],
) -> None:
    """Print the sites of a model, with their shapes."""
    from hooked_vlm.model.vlm import HookedVLM

    with quiet():
        print(HookedVLM.from_pretrained(model).describe())


@app.command(cls=Command)
def check(
    model: Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")],
    every_layer: EveryLayer = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Check hooks, grids, generation and sweeps on a model. Exit status 1 if a check fails."""
    from hooked_vlm.checks.checkup import check_model
    from hooked_vlm.checks.laws import NO
    from hooked_vlm.model.vlm import HookedVLM
    from hooked_vlm.report.job import device_of, dtype_of

    chosen = {"dtype": dtype_of(dtype), "device": device_of(device)}
    with quiet():
        wrapped = HookedVLM.from_pretrained(model, **chosen)
        broken = 0
        for finding in check_model(wrapped, every_layer):
            print(f"{finding.law:<18} {finding.verdict:<4} {finding.note}".rstrip())
            broken += finding.verdict == NO
    if broken:
        print(f"{broken} check{'s' if broken > 1 else ''} failed on {model}.")
        raise typer.Exit(1)


@app.command(cls=Command)
def plan(
    experiment: Annotated[str, typer.Argument(help="A suite or one experiment (see `list`).")],
    model: Model,
    setting: Setting = None,
    pairs: Pairs = 50,
    batch_size: BatchSize = 16,
    data: Data = None,
    options: Options = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    card: Annotated[str, typer.Option(help="Such as H200, A100-80GB or L4.")] = "H200",
    workers: Annotated[int, typer.Option(min=1, help="Cards that share the parts.")] = 1,
    utilisation: Annotated[float, typer.Option(help="Assumed share of the card's rate.")] = 0.3,
) -> None:
    """Predict parts, operations, memory and hours of a run. Reads no weights; nothing runs."""
    from hooked_vlm.experiments.options import Config, from_words
    from hooked_vlm.report.planned import plan_run

    config, own = Config(pairs=pairs, batch_size=batch_size, data=data), from_words(options or [])
    how = {"dtype": dtype, "card": card, "workers": workers, "utilisation": utilisation}
    with quiet():
        print(plan_run(experiment, model, config=config, setting=setting, options=own, **how))


app.command(cls=Command)(view)


@app.command("list", cls=Command)
def list_() -> None:
    """List suites, experiments, shipped models, and what other packages add."""
    from hooked_vlm.report.listing import listing

    print(listing())


def main() -> None:
    """Runs the command line; prints a `HookedVLMError` as one line on stderr, with status 2.

    Where memory, the disk or a permission is lacking, prints one line and exits with status 1.
    """
    try:
        app()
    except HookedVLMError as error:
        print(f"hooked-vlm: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except (OSError, MemoryError, RuntimeError) as error:
        missing = lacking(error)
        if missing is None:
            raise
        print(f"hooked-vlm: {missing[0]}. {missing[1]}.", file=sys.stderr)
        sys.exit(FAILED)


def _side_by_side(made: Sequence["Job"], out: Path, title: str, jobs: int) -> None:
    """Runs jobs, in parallel processes where that is faster, and writes their index page."""
    from hooked_vlm.report import job as runner
    from hooked_vlm.report import page

    for job in made:  # check all jobs before the first one runs
        runner.check(job)
    if jobs in (0, AUTO):
        apart = runner.device_of(made[0].device) == "cpu" and (os.cpu_count() or 1) >= len(made)
        jobs = len(made) if apart else 1
    if jobs > 1 and len(made) > 1:
        _run_apart(made, jobs)
        done = [runner.read(job) for job in made]
    else:
        done = [_run(job) for job in made]
    reports = {
        str(job.out.relative_to(out)): (one.results, one.provenance)
        for job, one in zip(made, done, strict=True)
    }
    print(f"report: {page.write_index(reports, out, title=title)}")


def _run_apart(made: Sequence["Job"], jobs: int) -> None:
    """Runs each job in its own process, with an equal share of the CPU's cores."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    commands = [[sys.executable, "-m", "hooked_vlm.cli", *words_of(job)] for job in made]
    ended = run_commands(commands, jobs, environment)
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


def _one_after_the_other(made: Sequence["Job"], part: str | None, executor: str | None) -> None:
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
            listener = Listener(Console(stderr=True), f"{job.model}, part {part}")
            with _said_when_ended(job, listener):
                done = shares.run_share(job, listener, share)
            print(
                f"part {part} of {job.model}: {counted(done.computed, 'unit')} computed, "
                f"{done.read} read, {len(done.missing)} left to other parts. When all parts are "
                f"done: hooked-vlm merge {job.out}"
            )
        return
    for job in made:
        if executor is None:
            print(f"report: {_run(job).page}")
            continue
        with engines.engine_of(executor, job.out) as engine:
            if engine.said:
                print(f"hooked-vlm: {engine.said}", file=sys.stderr)
            print(f"report: {_run(job, engine).page}")


def _run(job: "Job", engine: "Engine | None" = None) -> "Report":
    from hooked_vlm.report import job as runner

    runner.check(job)
    listener = Listener(Console(stderr=True), job.model)
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


if __name__ == "__main__":
    main()
