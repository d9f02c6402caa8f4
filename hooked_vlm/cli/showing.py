"""The commands that print what there is and what a run would take, and those on finished runs."""

from pathlib import Path
from typing import Annotated

import typer

from hooked_vlm.cli.app import FAILED, app, importing, show
from hooked_vlm.cli.parameters import (
    BatchSize,
    Card,
    Command,
    Data,
    Device,
    Dtype,
    EveryLayer,
    Experiment,
    Json,
    Limit,
    Model,
    ModelName,
    Options,
    Pairs,
    Setting,
)
from hooked_vlm.errors import counted
from hooked_vlm.report.progress import quiet, say_loading


Finished = Annotated[Path, typer.Argument(help="The --out of a finished run.")]


@app.command(cls=Command)
def sites(model: ModelName, json: Json = False) -> None:
    """Print the sites of a model, with their shapes."""
    importing()
    from hooked_vlm.model.vlm import HookedVLM

    with quiet():
        say_loading(model)
        wrapped = HookedVLM.from_pretrained(model)
        show(wrapped.describe(), [str(name) for name in wrapped.sites], json)


@app.command(cls=Command)
def check(
    model: ModelName,
    every_layer: EveryLayer = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Check hooks, grids, generation and sweeps on a model. Exit status 1 if a check fails."""
    importing()
    from hooked_vlm.checks.checkup import check_model
    from hooked_vlm.checks.laws import NO
    from hooked_vlm.model.vlm import HookedVLM
    from hooked_vlm.report.devices import device_of, dtype_of

    chosen = {"dtype": dtype_of(dtype), "device": device_of(device)}
    with quiet():
        say_loading(model)
        wrapped = HookedVLM.from_pretrained(model, **chosen)
        findings = []
        for finding in check_model(wrapped, every_layer):
            findings.append({name: getattr(finding, name) for name in ("law", "verdict", "note")})
            if not json:
                print(f"{finding.law:<18} {finding.verdict:<4} {finding.note}".rstrip())
    broken = sum(finding["verdict"] == NO for finding in findings)
    if json or broken:
        show(f"{counted(broken, 'check')} failed on {model}.", findings, json)
    if broken:
        raise typer.Exit(FAILED)


@app.command(cls=Command)
def plan(
    experiment: Experiment,
    model: Model,
    setting: Setting = None,
    pairs: Pairs = 50,
    batch_size: BatchSize = 16,
    data: Data = None,
    options: Options = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    card: Card = "H200",
    workers: Annotated[int, typer.Option(min=1, help="Cards that share the parts.")] = 1,
    utilisation: Annotated[float, typer.Option(help="Assumed share of the card's rate.")] = 0.3,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Predict parts, operations, memory and hours of a run. Reads no weights; nothing runs."""
    importing()
    from hooked_vlm.experiments.options import Config, from_words
    from hooked_vlm.report.planned import plan_run

    config, own = Config(pairs=pairs, batch_size=batch_size, data=data), from_words(options or [])
    how = {"dtype": dtype, "card": card, "workers": workers, "utilisation": utilisation}
    how = {**how, "setting": setting, "options": own, "limit": limit}
    with quiet():
        made = plan_run(experiment, model, config=config, **how)
    show(str(made), made, json)


@app.command("list", cls=Command)
def list_(json: Json = False) -> None:
    """List suites, experiments, shipped models, and what other packages add."""
    importing()
    from hooked_vlm.report.listing import as_data, listing

    show(listing(), as_data(), json)


@app.command(cls=Command)
def options(
    experiment: Annotated[str, typer.Argument(help="One experiment, by name or id (see `list`).")],
    json: Json = False,
) -> None:
    """List the options of an experiment, with their defaults and what they mean."""
    importing()
    from hooked_vlm.report.listing import options_of

    found = options_of(experiment)
    show(str(found), found, json)


@app.command(cls=Command)
def report(out: Finished, json: Json = False) -> None:
    """Write the report of a finished run again, from its results. Loads no model."""
    importing()
    from hooked_vlm.report.rebuild import rebuild

    with quiet():
        pages = rebuild(out)
    text = "\n".join(f"report: {page}" for page in pages)
    show(text, {"reports": [str(page) for page in pages]}, json)


@app.command(cls=Command)
def compare(
    first: Finished,
    second: Finished,
    out: Annotated[Path, typer.Option(help="Folder for the page; created if missing.")] = Path(
        "compared"
    ),
    json: Json = False,
) -> None:
    """Compare two finished runs on one page: what differs, verdicts, numbers and figures."""
    importing()
    from hooked_vlm.report.compare import compare as compared

    with quiet():
        made = compared(first, second, out)
    show(f"report: {made.page}", made.summary, json)
