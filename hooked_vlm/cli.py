"""The command line: `hooked-vlm run`, `demo`, `reproduce`, `sites`, `check` and `list`.

Only this file prints results and exits.  It converts arguments to a `Job`, shows the job's
progress, and prints every `HookedVLMError` as one line with exit status 2.  torch and
transformers take seconds to import, so each command imports them only when it runs, and
`--help` answers at once.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from hooked_vlm.errors import DataError, HookedVLMError
from hooked_vlm.report.children import run_commands
from hooked_vlm.report.progress import Listener, quiet


if TYPE_CHECKING:
    from hooked_vlm.report.job import Job, Report

FAILED, USER_ERROR, SIGNALLED = 1, 2, 128  # a signal's number is added to the last
INTERRUPTED = SIGNALLED + signal.SIGINT
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(
    name="hooked-vlm",
    help="Interpretability experiments on vision-language models, from a model to a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command that refuses an empty text: as a path it would be the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for parameter in order:
            value = given.get(parameter.name or "")
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and not text.strip():
                    name = parameter.opts[0] if parameter.opts[0][0] == "-" else parameter.name
                    raise DataError(
                        f"{name} was given {text[:20]!r}, an empty text. Give it a value, or leave "
                        "it out where it has a default."
                    )
        return super().parse_args(ctx, args)


Model = Annotated[
    str, typer.Option(help="A shipped model (see `list`), a local folder or a hub name.")
]
Out = Annotated[Path, typer.Option(help="Folder for the report; created if missing.")]
Pairs = Annotated[int, typer.Option(help="Image pairs per direction.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward pass.")]
Setting = Annotated[
    str | None,
    typer.Option(
        help="Stimuli: squares, shapes, objects, or one of them with -photos. Default: the "
        "experiment's own; your own pictures where --data has them."
    ),
]
Cutouts = Annotated[
    Path | None, typer.Option(help="Folder with your own cut-outs of objects, <name>.png.")
]
Backgrounds = Annotated[
    Path | None, typer.Option(help="Folder with your own photographs for the -photos settings.")
]
Data = Annotated[
    Path | None, typer.Option(help="Your own pictures and items.csv; or What'sUp, COCO-spatial.")
]
OtherWords = Annotated[bool, typer.Option("--other-words", help="Ask in a second phrasing.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="Option of an experiment, NAME=VALUE; may be repeated."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16")]
Jobs = Annotated[
    int,
    typer.Option(
        min=0, help="Models to run at the same time. 0: all, if each has a CPU core; else one."
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Ignore results of an earlier run and compute them again.")
]


@app.command(cls=_Command)
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
    report = _run(job)
    print(f"report: {report.page}")


@app.command(cls=_Command)
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


@app.command(cls=_Command)
def reproduce(
    out: Out,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model to run; may be repeated. Default: every shipped model."),
    ] = None,
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
) -> None:
    """Run every experiment on every setting, in float32. Run it again to resume."""
    from hooked_vlm import zoo
    from hooked_vlm.experiments.options import Config, from_words
    from hooked_vlm.report import job as runner
    from hooked_vlm.report.job import Job

    config = Config(
        pairs=pairs,
        seed=seed,
        batch_size=batch_size,
        cutouts=cutouts,
        backgrounds=backgrounds,
        data=data,
    )
    made = [
        Job(
            "reproduce",
            name,
            out / runner.folder_name(name),
            config=config,
            options=from_words(options or []),
            device=device,
            dtype=dtype,
            fresh=fresh,
        )
        for name in dict.fromkeys(model or zoo.available())
    ]
    _side_by_side(made, out, "The dual mechanisms of spatial reasoning, and what is open", jobs)


@app.command(cls=_Command)
def sites(
    model: Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")],
) -> None:
    """Print the sites of a model, with their shapes."""
    from hooked_vlm.model.vlm import HookedVLM

    with quiet():
        print(HookedVLM.from_pretrained(model).describe())


@app.command(cls=_Command)
def check(
    model: Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")],
    every_layer: Annotated[
        bool,
        typer.Option("--every-layer", help="Check all layers instead of three."),
    ] = False,
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


@app.command("list", cls=_Command)
def list_() -> None:
    """List the suites, the experiments and the shipped models."""
    from hooked_vlm import zoo
    from hooked_vlm.experiments.registry import EXPERIMENTS, SUITES

    print("suites")
    for name, members in SUITES.items():
        print(f"  {name:<18} {', '.join(members)}")
    print("experiments")
    for name, experiment in EXPERIMENTS.items():
        print(f"  {experiment.id:<3} {name:<22} paper, {experiment.section}: {experiment.title}")
        print(f"      {experiment.claim}")
    print("shipped models")
    for name in zoo.available():
        print(f"  {name}")


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
        lacking = _lacking(error)
        if lacking is None:
            raise
        print(f"hooked-vlm: {lacking[0]}. {lacking[1]}.", file=sys.stderr)
        sys.exit(FAILED)


def _lacking(error: Exception) -> tuple[str, str] | None:
    """Returns what the machine lacks and the remedy, or None for another error."""
    text = str(error).lower()
    memory = "out of memory" in text or "can't allocate memory" in text
    if isinstance(error, MemoryError) or memory:
        return "Out of memory", "Give a smaller --batch-size, or --dtype bfloat16"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "The disk is full", "Free space on it"
    if isinstance(error, OSError) and error.filename is not None:
        what = f"'{str(error.filename)[-200:]}' cannot be read or written: {error.strerror}"
        return what, "Correct the folder or its permissions"
    return None


def _side_by_side(made: Sequence["Job"], out: Path, title: str, jobs: int) -> None:
    """Runs jobs, in parallel processes where that is faster, and writes their index page."""
    from hooked_vlm.report import job as runner
    from hooked_vlm.report import page

    for job in made:  # check all jobs before the first one runs
        runner.check(job)
    if not jobs:
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
    commands = [[sys.executable, "-m", "hooked_vlm.cli", *_words(job)] for job in made]
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


def _words(job: "Job") -> list[str]:
    """Returns the command line that runs a job."""
    words = ["run", job.experiment, "--model", job.model, "--out", str(job.out)]
    words += ["--device", job.device, "--dtype", job.dtype, *(["--fresh"] * job.fresh)]
    words += ["--setting", job.setting] if job.setting else []
    defaults = type(job.config)()
    for field in fields(job.config):
        value = getattr(job.config, field.name)
        if field.name != "setting" and value != getattr(defaults, field.name):
            words += [f"--{field.name.replace('_', '-')}"]
            words += [] if value is True else [str(value)]
    for name, value in job.options.items():
        words += ["--set", f"{name}={value}"]
    return words


def _run(job: "Job") -> "Report":
    from hooked_vlm.report import job as runner

    runner.check(job)
    listener = Listener(Console(stderr=True), job.model)
    try:
        with quiet(), listener:
            return runner.run(job, listener)
    except KeyboardInterrupt:
        print(
            f"hooked-vlm: interrupted after {listener.finished} of {listener.of or 'the'} "
            f"experiments on {job.model}; their results are in {job.out / runner.RESULTS}. "
            "Run the same command again to resume.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    except (OSError, MemoryError, RuntimeError) as error:
        lacking = _lacking(error)
        if lacking is None:
            raise
        print(
            f"hooked-vlm: {lacking[0]}, after {listener.finished} of {listener.of or 'the'} "
            f"experiments on {job.model}; their results are kept in {job.out / runner.RESULTS}. "
            f"{lacking[1]}, and run the command again to resume.",
            file=sys.stderr,
        )
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
