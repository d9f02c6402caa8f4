"""Writes the report: one HTML page, and the files with its figures and numbers.

For each experiment the page has the paper's claim, this model's result, the figure, the
numbers, and how they were computed.  It is a single HTML file with embedded pictures, so it
can be sent, archived and opened without a network.  The same folder has the figures as files,
every number of every experiment as one tidy table, and the record of the run.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from hooked_vlm.disk.files import write_file
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.targets import targets
from hooked_vlm.report.figures import Drawing, drawings, headlines
from hooked_vlm.report.look import to_png
from hooked_vlm.report.provenance import Provenance


PAGE = "report.html"
FIGURES = "figures"
PX_PER_INCH = 88  # on the page, so that the text of all figures has one size
COLUMNS = ("direction", "axis", "kind", "slot", "site", "quantity", "value", "low", "high", "n")


@dataclass(frozen=True)
class Tile:
    """A key number at the top of the page."""

    value: str
    label: str


def write_report(results: Sequence[Result], provenance: Provenance, out: Path) -> Path:
    """Writes the report of one model into the folder `out`; returns the page's path.

    It writes `report.html`, `figures/*.png`, `numbers.csv` (all tables, one row per number)
    and `provenance.json`.  Each file is replaced as a whole or not at all.
    """
    sections = [_section(result, out) for result in results]
    page = _template("report.html.j2").render(
        title=f"{provenance.experiment} on {provenance.title}",
        provenance=provenance,
        facts=_facts(provenance),
        tiles=key_numbers(results),
        sections=sections,
        record=provenance.to_json(),
    )
    write_file(out / "numbers.csv", numbers(results, provenance.title).to_csv(index=False))
    write_file(out / "provenance.json", provenance.to_json())
    write_file(out / PAGE, page)  # last, so that a page implies complete files
    return out / PAGE


def write_index(
    reports: Mapping[str, tuple[Sequence[Result], Provenance]], out: Path, *, title: str
) -> Path:
    """Writes `out/index.html`, which shows the reports of several models side by side.

    `reports` maps each report's folder, relative to `out`, to its results and record.
    """
    models = [
        {
            "folder": folder,
            "provenance": provenance,
            "facts": _facts(provenance),
            "tiles": key_numbers(results),
        }
        for folder, (results, provenance) in reports.items()
    ]
    by_id: dict[str, dict[str, Any]] = {}
    for folder, (results, _) in reports.items():
        for result in results:
            row = by_id.setdefault(result.anchor, {"result": result, "cells": {}, "widest": 0})
            figures = [_shown(d, to_png(d.figure)) for d in drawings(result) if d.headline]
            row["widest"] = max(row["widest"], *(figure["width"] for figure in figures), 0)
            row["cells"][folder] = {"verdict": result.verdict, "figures": figures}
    page = _template("index.html.j2").render(
        title=title, models=models, rows=list(by_id.values()), page=PAGE
    )
    write_file(out / "index.html", page)
    return out / "index.html"


def numbers(results: Sequence[Result], model: str) -> pd.DataFrame:
    """Returns every number of every result as one tidy table, one row per number."""
    tables = [
        result.table.assign(
            model=model, experiment=result.id, name=result.name, setting=result.setting
        )
        for result in results
    ]
    if not tables:
        return pd.DataFrame(columns=["model", "experiment", "name", "setting", *COLUMNS])
    table = pd.concat(tables, ignore_index=True)
    first = ["model", "experiment", "name", "setting", *(c for c in COLUMNS if c in table)]
    table = table[[*first, *(c for c in table if c not in first)]]
    if "slot" in table:  # concatenation with a table without slots makes them floats
        table = table.assign(slot=table["slot"].astype("Int64"))
    return table


def key_numbers(results: Sequence[Result]) -> list[Tile]:
    """Returns the key numbers for the top of the page, each a range over directions or axes.

    For an experiment on several settings, they are those of the first setting.
    """
    tiles = []
    first = {result.id: result for result in reversed(results)}
    for result in reversed(first.values()):
        for where, label in () if result.table.empty else headlines(result):
            rows = result.table
            for column, wanted in where.items():
                rows = rows[rows[column].isna() if wanted is None else rows[column] == wanted]
            if len(rows):
                tiles.append(Tile(_range(rows), label))
    return tiles


def _range(rows: pd.DataFrame) -> str:
    if "direction" in rows and (rows["direction"] != "all").any():
        rows = rows[rows["direction"] != "all"]
    # Of slots the best one counts, as the labels say; over all else this is a range.
    groups = [column for column in ("direction", "axis", "gap", "kind") if column in rows]
    best = rows.groupby(groups, dropna=False)["value"].max() if groups else rows["value"]
    low, high = f"{best.min():.2f}", f"{best.max():.2f}"
    return low if low == high else f"{low}–{high}"


def _section(result: Result, out: Path) -> dict[str, Any]:
    figures = []
    for drawing in drawings(result):
        png = to_png(drawing.figure)
        name = f"{result.anchor}-{drawing.name}.png"
        write_file(out / FIGURES / name, png)
        figures.append(_shown(drawing, png))
    return {
        "result": result,
        "is_of_paper": result.name in EXPERIMENTS,
        "figures": figures,
        "stimuli": _stimuli(result),
        "targets": targets(result.id, result.setting),
        "glance": _table(_glance(result.table)),
        "means": _table(_means(result.table)),
        "table": _table(result.table),
        "n_rows": len(result.table),
        "config": json.dumps(result.config, default=str) if result.config else "",
    }


def _shown(drawing: Drawing, png: bytes) -> dict[str, Any]:
    width = round(drawing.figure.get_figwidth() * PX_PER_INCH)
    return {"source": _data(png), "caption": drawing.caption, "width": width}


def _stimuli(result: Result) -> list[dict[str, str]]:
    """Returns the pictures that no figure shows."""
    shown = (
        {str(item) for item in result.arrays["item_maps"]["item"].values}
        if ("item_maps" in result.arrays)
        else set()
    )
    return [
        {"source": _data(_picture(image)), "name": name}
        for name, image in result.images.items()
        if name not in shown
    ]


def _glance(table: pd.DataFrame) -> pd.DataFrame:
    """Returns for numbers over slots each line's highest value and its slot."""
    groups = [c for c in ("direction", "axis", "kind", "quantity") if c in table]
    if "slot" not in table or not groups:
        return table.iloc[:0]
    highest = table.groupby(groups, sort=False, dropna=False)["value"].idxmax()
    return table.loc[highest].rename(columns={"slot": "highest at slot"})


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the means over probes, without the claims about each probe by itself."""
    if "probe" not in table or {"slot", "layer", "gap", "alpha"} & set(table):
        return table.iloc[:0]  # these have too many means to be read as a table
    means = table[table["probe"].isna()]
    return means.dropna(axis="columns", how="all")


def _table(table: pd.DataFrame) -> str:
    """Returns the table as HTML, with each interval in one cell and three decimal places."""
    if table.empty:
        return ""
    shown = table.drop(columns=["low", "high"], errors="ignore").copy()
    if {"low", "high"} <= set(table.columns):
        bounds = zip(table["low"], table["high"], strict=True)
        place = list(shown.columns).index("value") + 1
        shown.insert(place, "95 % interval", [_interval(low, high) for low, high in bounds])
    head = "".join(
        f"<th scope=col{_kind(shown[name])}>{html.escape(str(name))}</th>" for name in shown
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(value) for value in row) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _interval(low: float, high: float) -> str:
    return "" if pd.isna(low) or pd.isna(high) else f"{_three(low)} to {_three(high)}"


def _three(value: float) -> str:
    """Returns a number with three decimal places, and zero without a sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def _kind(column: pd.Series) -> str:
    return " class=number" if pd.api.types.is_numeric_dtype(column) else ""


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return "<td></td>"
    if isinstance(value, float):
        return f"<td class=number>{_three(value)}</td>"
    kind = "" if isinstance(value, str) else " class=number"
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _facts(record: Provenance) -> dict[str, str]:
    memory = f"{record.peak_memory_mib:,.0f} MiB"
    if record.peak_cuda_memory_mib is not None:
        memory += f", {record.peak_cuda_memory_mib:,.0f} MiB on the GPU"
    elsewhere = ", ".join(dict.fromkeys(record.elsewhere.values()))
    apart = f"; parts were computed elsewhere: {elsewhere} (there and here)" if elsewhere else ""
    return {
        "model": f"{record.model_class}, {record.n_parameters / 1e6:,.2f} M parameters",
        "weights": f"sha256 {record.model_sha256[:16]}…",
        "run": f"{record.dtype} on {record.device} ({record.device_name}), seed {record.seed}"
        + apart,
        "cost": f"{sum(record.seconds.values()):,.0f} s, peak memory {memory}",
        "software": f"hooked_vlm {record.hooked_vlm}, torch {record.packages['torch']}, "
        f"transformers {record.packages['transformers']}, Python {record.python}",
        "date": record.started.replace("T", " ").replace("+00:00", " UTC"),
    }


def _picture(image: Image.Image, size: int = 336) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hooked_vlm", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
