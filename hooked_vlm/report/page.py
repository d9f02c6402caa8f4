"""Writes the report: one HTML page, and the files with its figures and numbers.

For each experiment the page has the paper's claim, this model's result, the figure, the
numbers, and how they were computed.  It is a single HTML file with embedded pictures, so it
can be sent, archived and opened without a network.  Numbers over slots can be explored in charts
whose library is embedded; all else needs no script.  The same folder has the figures as files,
every number of every experiment as one tidy table, and the record of the run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_vlm import zoo
from hooked_vlm.disk.files import write_file
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.targets import targets
from hooked_vlm.report.explore import charts_of, maps_of, scripts_for
from hooked_vlm.report.figures import Drawing, drawings, headlines
from hooked_vlm.report.look import to_png, vector_files
from hooked_vlm.report.markup import data_url, small_png, table_of, template
from hooked_vlm.report.provenance import Provenance


PAGE = "report.html"
FIGURES = "figures"
PX_PER_INCH = 96  # on the page, so that the text of all figures has one size
LISTED = 100
"""At most so many failed cases are listed."""
COLUMNS = ("direction", "axis", "kind", "slot", "site", "quantity", "value", "low", "high", "n")


@dataclass(frozen=True)
class Tile:
    """A key number of a result."""

    value: str
    label: str


def write_report(
    results: Sequence[Result],
    provenance: Provenance,
    out: Path,
    *,
    made: Mapping[str, Mapping[str, Any]] | None = None,
    left_out: Sequence[str] = (),
) -> Path:
    """Writes the report of one model into the folder `out`; returns the page's path.

    It writes `report.html`, `figures/*` (each as PNG, SVG and PDF), `numbers.csv` (all tables, one
    row per number) and `provenance.json`.  Each file is replaced as a whole or not at all.

    `made` has the record of each result that an earlier run computed, by its key, and `left_out`
    the results in the folder that are not on the page.
    """
    sections = [_section(result, out, (made or {}).get(result.key)) for result in results]
    page = template("report.html.j2").render(
        title=f"{provenance.experiment} on {provenance.title}",
        provenance=provenance,
        facts=facts_of(provenance),
        summary=summary_of(results),
        sections=sections,
        explored=scripts_for(
            {each["result"].anchor: {k: each[k] for k in ("charts", "maps")} for each in sections}
        ),
        left_out=left_out,
        record=provenance.to_json(),
    )
    write_file(out / "numbers.csv", numbers(results, provenance.title).to_csv(index=False))
    write_file(out / "provenance.json", provenance.to_json())
    write_file(out / PAGE, page)  # last, so that a page implies complete files
    return out / PAGE


def summary_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns a row for each experiment: its question, what was found here, the paper's claim."""
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        row = rows.setdefault(result.name, {"result": result, "found": []})
        row["found"].append({"result": result, "numbers": numbers_in_words(result)})
    return list(rows.values())


def numbers_in_words(result: Result) -> str:
    """Returns a result's key numbers in one line."""
    return ", ".join(f"{tile.label}: {tile.value}" for tile in key_numbers([result]))


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


def _section(result: Result, out: Path, made: Mapping[str, Any] | None) -> dict[str, Any]:
    figures = []
    for drawing in drawings(result):
        png = to_png(drawing.figure)
        name = f"{result.anchor}-{drawing.name}"
        files = {"png": png, **vector_files(drawing.figure)}
        for ending, content in files.items():
            write_file(out / FIGURES / f"{name}.{ending}", content)
        links = [f"{FIGURES}/{name}.{ending}" for ending in files]
        figures.append({**shown(drawing, png), "files": links})
    return {
        "result": result,
        "is_of_paper": result.name in EXPERIMENTS,
        "figures": figures,
        "charts": charts_of(result),
        "maps": maps_of(result),
        "stimuli": _stimuli(result),
        "failed": _failed(result),
        "targets": targets(result.id, result.setting),
        "glance": table_of(_glance(result.table), "The highest value of each line and its slot."),
        "means": table_of(_means(result.table), "Means over probes; the claims are about them."),
        "table": table_of(
            result.table,
            "Every number of this result, as in numbers.csv. Intervals are 95 % intervals.",
        ),
        "n_rows": len(result.table),
        "config": json.dumps(result.config, default=str) if result.config else "",
        "made": made,
    }


def shown(drawing: Drawing, png: bytes) -> dict[str, Any]:
    """Returns what a template needs of a figure."""
    width = round(drawing.figure.get_figwidth() * PX_PER_INCH)
    return {"source": data_url(png), "caption": drawing.caption, "width": width}


def _stimuli(result: Result) -> list[dict[str, str]]:
    """Returns the pictures that neither a figure nor the failed cases show."""
    shown: set[str] = set()
    if "item_maps" in result.arrays:
        shown |= {str(item) for item in result.arrays["item_maps"]["item"].values}
    if result.cases is not None:
        shown |= set(result.cases.failing["case"])
    return _pictures(result, [name for name in result.images if name not in shown])


def _failed(result: Result) -> dict[str, Any] | None:
    """Returns the cases that failed: a sentence, their table, and pictures of the first."""
    if result.cases is None:
        return None
    failing, n = result.cases.failing, len(result.cases.table)
    said = f"{len(failing)} of {n} {result.cases.failed}"
    listed = failing.drop(columns="ok").iloc[:LISTED]
    short = f" The first {LISTED} are listed." if len(failing) > LISTED else ""
    return {
        "said": said,
        "table": table_of(listed, f"{said}.{short}"),
        "pictures": _pictures(result, [name for name in failing["case"] if name in result.images]),
    }


def _pictures(result: Result, names: Sequence[str]) -> list[dict[str, str]]:
    return [{"source": data_url(small_png(result.images[name])), "name": name} for name in names]


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


def facts_of(record: Provenance) -> dict[str, str]:
    """Returns the facts of a run that a page states, by name."""
    memory = f"{record.peak_memory_mib:,.0f} MiB"
    if record.peak_cuda_memory_mib is not None:
        memory += f", {record.peak_cuda_memory_mib:,.0f} MiB on the GPU"
    elsewhere = ", ".join(dict.fromkeys(record.elsewhere.values()))
    apart = f"; parts were computed elsewhere: {elsewhere} (there and here)" if elsewhere else ""
    is_shipped = record.model in zoo.available()
    return {
        "model": f"{record.model_class}, {record.n_parameters / 1e6:,.2f} M parameters",
        **({"shipped model": zoo.summary(record.model)} if is_shipped else {}),
        "weights": f"sha256 {record.model_sha256[:16]}…",
        "run": f"{record.dtype} on {record.device} ({record.device_name}), seed {record.seed}"
        + apart,
        "cost": f"{sum(record.seconds.values()):,.0f} s, peak memory {memory}",
        "software": f"hooked_vlm {record.hooked_vlm}, torch {record.packages['torch']}, "
        f"transformers {record.packages['transformers']}, Python {record.python}",
        "date": record.started.replace("T", " ").replace("+00:00", " UTC"),
    }
