"""The command `hooked-vlm view`, which writes an interactive page."""

from pathlib import Path
from typing import Annotated

import typer

from hooked_vlm.cli.app import app, importing, show
from hooked_vlm.cli.parameters import Command, Device, Dtype, Json, ModelName
from hooked_vlm.report.progress import progress_bar, quiet


@app.command(cls=Command)
def view(
    model: ModelName,
    image: Annotated[
        Path | None, typer.Option(help="A picture. Default: three squares, and their question.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about --image.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="Another picture of the same size, whose activations patches write."),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="Answers to follow, such as red,blue. Default: the top four.")
    ] = None,
    panels: Annotated[
        str, typer.Option(help="Some of attention, lens, patches and probes.")
    ] = "attention,lens,patches,probes",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers whose attention is kept, such as 0,4,8. Default: all."),
    ] = None,
    slots: Annotated[
        str | None, typer.Option(help="Slots of lens, patches and probes, such as 0,4,8.")
    ] = None,
    limit_mb: Annotated[float, typer.Option(help="Largest size of the page's numbers.")] = 25.0,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("view.html"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Write an interactive page of what a model reads from a picture (one HTML file)."""
    importing()
    from hooked_vlm.report.viewing import Asked, write

    asked = Asked(
        image=image,
        question=question,
        source=source,
        answers=answers,
        panels=panels,
        layers=layers,
        slots=slots,
        limit_mb=limit_mb,
    )
    with quiet(), progress_bar(f"{model}: view", stderr=True) as step:
        line = write(model, asked, out, device, dtype, step)
    show(line, {"page": str(out)}, json)
