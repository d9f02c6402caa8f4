"""The options of the command line that several commands have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hooked_vlm.errors import DataError, did_you_mean


class Command(TyperCommand):
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
        if (file := given.get("config")) is not None:
            ctx.default_map = defaults_in(Path(file), self.params, self.name or "")
        return super().parse_args(ctx, args)


def defaults_in(path: Path, parameters: Sequence[Any], command: str) -> dict[str, Any]:
    """Returns the arguments in a JSON file by the names of a command's parameters.

    Raises `DataError` for a file that cannot be read, and for an argument that there is not.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"--config '{path}' cannot be read as JSON ({str(error)[:120]}). Give a file such as "
            "OUT/results/behaviour-squares/config.json."
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"--config '{path}' is a JSON {type(found).__name__}; expected an object.")
    names = {_word(one): one.name for one in parameters if one.name not in ("config", "help")}
    defaults: dict[str, Any] = {}
    for word, value in found.items():
        if word not in names:
            raise DataError(
                f"--config '{path}' has {word[:40]!r}, which is no argument of {command}."
                f"{did_you_mean(word, list(names))} Arguments: {', '.join(names)}."
            )
        if value is None:  # as if it were not there
            continue
        if word == "set" and isinstance(value, dict):
            value = [f"{name}={text}" for name, text in value.items()]
        if isinstance(value, list):
            defaults[names[word]] = [str(each) for each in value]
        else:
            defaults[names[word]] = value if isinstance(value, bool) else str(value)
    return defaults


def _word(parameter: Any) -> str:
    """Returns the name of a parameter in a file: as on the command line, without dashes."""
    return max(parameter.opts, key=len).lstrip("-").replace("-", "_")


Experiment = Annotated[str, typer.Argument(help="A suite or one experiment (see `list`).")]
ModelName = Annotated[str, typer.Argument(help="A shipped model, a local folder or a hub name.")]
Model = Annotated[
    str, typer.Option(help="A shipped model (see `list`), a local folder or a hub name.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(help="Model to run; may be repeated. Default: every shipped model."),
]
Out = Annotated[Path, typer.Option(help="Folder for the report; created if missing.")]
Pairs = Annotated[int, typer.Option(help="Image pairs per direction.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward pass.")]
Setting = Annotated[
    str | None,
    typer.Option(
        help="Stimuli: squares, shapes, objects, or one of them with -photos or -scattered. "
        "Default: the experiment's own; your own pictures where --data has them."
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
AUTO = -1


def number_of_jobs(given: str | int) -> int:
    """Returns the number of `--jobs`; `AUTO` for "auto"."""
    if given in ("auto", AUTO):
        return AUTO
    if not str(given).isdecimal():
        raise typer.BadParameter(f"{str(given)[:20]!r} is no number from 0, and not auto")
    return int(given)


Jobs = Annotated[
    int,
    typer.Option(
        parser=number_of_jobs,
        metavar="N|auto",
        help="Models to run at the same time. 0: on a CPU as many as it has cores, else one. auto: "
        "one model at a time, its work spread over the visible cards.",
    ),
]
Part = Annotated[
    str | None,
    typer.Option(help="Compute the share I of N alone (I/N, I from 0); then run `merge`."),
]
ExecutorName = Annotated[
    str | None,
    typer.Option(
        "--executor",
        help="Have other processes compute: processes, dask://HOST:PORT, ray://HOST:PORT, "
        "slurm:partition=NAME.",
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Ignore results of an earlier run and compute them again.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="For a try: at most N pairs, questions and pictures of each direction or axis."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the arguments, print the plan, and run nothing."),
]
Card = Annotated[str, typer.Option(help="Such as H200, A100-80GB or L4.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")
]
AllowMixed = Annotated[
    bool, typer.Option("--allow-mixed", help="Merge parts of other versions or devices too.")
]
EveryLayer = Annotated[
    bool, typer.Option("--every-layer", help="Check all layers instead of three.")
]


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="JSON file with arguments, such as the config.json beside a result; those on the "
        "command line go first.",
    ),
]
