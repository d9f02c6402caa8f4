"""The command line: `hooked-vlm run`, `demo`, `sites` and `list`.

The only file that prints and exits.  It turns words into a `Job`, shows how far the job
is, and turns every error that is the user's to mend into one line and exit status 2.
torch and transformers take seconds to import, so each command imports what it needs when
it runs, and `--help` answers at once.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hooked_vlm.errors import HookedVLMError


if TYPE_CHECKING:
    from hooked_vlm.experiments.registry import Experiment
    from hooked_vlm.runner import Job, Report

USER_ERROR, INTERRUPTED = 2, 130

app = typer.Typer(
    name="hooked-vlm",
    help="Interpretability experiments on vision-language models, from a model to a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option(help="A shipped model (see `list`), a local folder or a hub name.")
]
Out = Annotated[Path, typer.Option(help="Folder for the report; made if it is not there.")]
Pairs = Annotated[int, typer.Option(help="Image pairs per direction.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward pass.")]
Setting = Annotated[
    str, typer.Option(help="Stimuli: squares, shapes, objects, or one of them with -photos.")
]
Cutouts = Annotated[
    Path | None, typer.Option(help="Your own cut-outs for objects: a folder of <name>.png.")
]
Backgrounds = Annotated[
    Path | None, typer.Option(help="Your own photographs for the -photos settings: a folder.")
]
Data = Annotated[Path | None, typer.Option(help="The folder of What'sUp or COCO-spatial.")]
OtherWords = Annotated[bool, typer.Option("--other-words", help="Ask in a second phrasing.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="An experiment's own option, NAME=VALUE; may be repeated."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compute again what an earlier run left.")]


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="A suite or one experiment (see `list`).")],
    model: Model,
    out: Out,
    setting: Setting = "squares",
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
    from hooked_vlm.experiments.registry import Config
    from hooked_vlm.runner import Job

    job = Job(
        experiment=experiment,
        model=model,
        out=out,
        config=Config(
            pairs=pairs,
            seed=seed,
            batch_size=batch_size,
            setting=setting,
            cutouts=cutouts,
            backgrounds=backgrounds,
            data=data,
            other_words=other_words,
        ),
        options=_options(options or []),
        device=device,
        dtype=dtype,
        fresh=fresh,
    )
    report = _run(job)
    print(f"report: {report.page}")


@app.command()
def demo(
    out: Out = Path("demo"),
    pairs: Pairs = 50,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    fresh: Fresh = False,
) -> None:
    """Run the dual-mechanisms suite on every shipped model, side by side."""
    from hooked_vlm import report, runner, zoo
    from hooked_vlm.experiments.registry import Config

    config = Config(pairs=pairs, seed=seed, batch_size=batch_size)
    jobs = [
        runner.Job(
            experiment="dual-mechanisms",
            model=name,
            out=out / name,
            config=config,
            device=device,
            fresh=fresh,
        )
        for name in zoo.available()
    ]
    for job in jobs:  # all of them before the first one runs
        runner.check(job)
    done = {job.model: _run(job) for job in jobs}
    page = report.write_index(
        {name: (one.results, one.provenance) for name, one in done.items()},
        out,
        title="The dual mechanisms of spatial reasoning, on two small models",
    )
    print(f"report: {page}")


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")],
) -> None:
    """Print the sites of a model, with their shapes."""
    from hooked_vlm.model import HookedVLM

    with _quiet():
        print(HookedVLM.from_pretrained(model).describe())


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")],
    every_layer: Annotated[
        bool,
        typer.Option("--every-layer", help="Write at every layer, not at three."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Check hooks, grids and generation on a model: a `no` is a number not to be trusted."""
    from hooked_vlm.checkup import check_model
    from hooked_vlm.laws import NO
    from hooked_vlm.model import HookedVLM
    from hooked_vlm.runner import device_of, dtype_of

    with _quiet():
        wrapped = HookedVLM.from_pretrained(model, dtype=dtype_of(dtype), device=device_of(device))
        broken = 0
        for finding in check_model(wrapped, every_layer):
            print(f"{finding.law:<18} {finding.verdict:<4} {finding.note}".rstrip())
            broken += finding.verdict == NO
    if broken:
        print(f"{broken} laws do not hold on {model}.")
        raise typer.Exit(1)


@app.command("list")
def list_() -> None:
    """Print the suites, the experiments and the shipped models."""
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
    """Runs the command line; what the user can mend is one line on stderr and status 2."""
    try:
        app()
    except HookedVLMError as error:
        print(f"hooked-vlm: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _options(given: list[str]) -> dict[str, str]:
    from hooked_vlm.errors import DataError

    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise DataError(f"--set {text!r} is not NAME=VALUE, as in --set alphas=0,4,8.")
        options[name.strip().replace("-", "_")] = value
    return options


def _run(job: "Job") -> "Report":
    from hooked_vlm import runner

    runner.check(job)
    listener = Listener(Console(stderr=True), job.model)
    try:
        with _quiet(), listener:
            return runner.run(job, listener)
    except KeyboardInterrupt:
        print(
            f"hooked-vlm: interrupted after {listener.finished} of {listener.of or 'the'} "
            f"experiments on {job.model}; finished ones are in {job.out / runner.RESULTS}. "
            "Run the same command again to go on from there.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


class Listener(contextlib.AbstractContextManager):
    """Shows how a job gets on: bars on a terminal, a line now and then in a log."""

    def __init__(self, console: Console, model: str) -> None:
        self.finished, self.of = 0, 0
        self._console, self._model = console, model
        self._start = self._said = 0.0
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Listener":
        self._say(f"{self._model}: loading")
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, experiment: "Experiment", place: int, of: int) -> None:
        self.of = of
        self._name = f"{self._model} {place}/{of} {experiment.id} {experiment.name}"
        self._start = self._said = time.monotonic()
        self._task = self._bars.add_task(self._name, total=None)
        self._say(self._name)

    def step(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if done == 0:  # what came before (drawing pairs, say) tells nothing of what is left
            self._start = self._said = now
        if now - self._said > 10 and done:
            spent = now - self._start
            left = spent * (total - done) / done
            self._said = now
            self._say(f"{self._name}: {done / total:.0%} after {spent:.0f} s, {left:.0f} s left")

    def end(self, seconds: float, reused: bool) -> None:
        self.finished += 1
        how = "reused from an earlier run" if reused else f"{seconds:.1f} s"
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1, description=f"{self._name}: {how}")
        self._say(f"{self._name}: {how}")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves stderr to progress and warnings of one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
