"""Compares two finished runs on one page: what differs, verdicts, numbers and figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_vlm.disk.files import writable_folder, write_file
from hooked_vlm.errors import DataError, counted
from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import drawings
from hooked_vlm.report.folder import RECORD, gathered, record_in
from hooked_vlm.report.look import to_png
from hooked_vlm.report.markup import interval, table_of, template
from hooked_vlm.report.page import facts_of, shown
from hooked_vlm.report.provenance import Provenance
from hooked_vlm.report.rebuild import folders_of_runs


PAGE, NUMBERS = "compare.html", "compared.csv"
MEASURED = ("value", "low", "high", "n", "null", "p", "p_holm")
"""The columns of a result's table that are measured; the others say what the number is of."""
ROWS = 40
"""The most rows of a table on the page; the file has them all."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two runs."""

    letter: str
    folder: Path
    record: Provenance
    results: Mapping[str, Result]

    @classmethod
    def read(cls, letter: str, folder: Path) -> "Side":
        """Returns the run in a folder; raises `DataError` for none, and for those of several."""
        if not (folder / RECORD).exists():
            several = folders_of_runs(folder)
            raise DataError(
                f"'{folder}' has runs of {counted(len(several), 'model')}; expected the folder of "
                f"one. Give one of: {', '.join(str(one) for one in several)[:200]}."
            )
        record = record_in(folder)
        found = gathered(folder, record)
        return cls(letter, folder, record, {result.key: result for result in found.results})

    @property
    def name(self) -> str:
        """Its name on the page."""
        return f"{self.letter}: {self.record.title}"


@dataclass(frozen=True)
class Compared:
    """The page of two runs."""

    page: Path
    summary: dict[str, Any]
    """What `--json` prints."""


def compare(first: Path, second: Path, out: Path) -> Compared:
    """Writes `compare.html` and `compared.csv` about two runs into the folder `out`.

    Numbers are matched by everything in their row that is not measured.  Raises `DataError` where
    a folder has no finished run, or those of several models.
    """
    sides = (Side.read("A", first), Side.read("B", second))
    writable_folder(out)
    keys = list(dict.fromkeys(key for side in sides for key in side.results))
    tables = {
        key: matched(*(side.results[key].table for side in sides))
        for key in keys
        if all(key in side.results for side in sides)
    }
    rows = [_row(key, sides, tables.get(key)) for key in keys]
    page = template("compare.html.j2").render(
        title=f"{sides[0].record.title} and {sides[1].record.title}, compared",
        sides=sides,
        facts=[facts_of(side.record) for side in sides],
        differences=differences_of(sides[0].record, sides[1].record),
        rows=rows,
        numbers=NUMBERS,
    )
    whole = [table.assign(result=key)[["result", *table]] for key, table in tables.items()]
    csv = pd.concat(whole, ignore_index=True) if whole else pd.DataFrame()
    write_file(out / NUMBERS, csv.to_csv(index=False))
    write_file(out / PAGE, page)
    return Compared(
        out / PAGE,
        {
            "report": str(out / PAGE),
            "numbers": str(out / NUMBERS),
            "in both": list(tables),
            "in one": [key for key in keys if key not in tables],
            "compared": len(csv),
            "intervals apart": int(csv["apart"].sum()) if len(csv) else 0,
        },
    )


def matched(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows that two tables have in common, with the values of both.

    `difference` is the second value minus the first, and `apart` says whether the 95 % intervals
    have no point in common.  It is no test of the difference.

    >>> one = pd.DataFrame({"axis": ["left"], "value": [0.2], "low": [0.1], "high": [0.3]})
    >>> row = matched(one, one.assign(value=0.5, low=0.4, high=0.6)).iloc[0]
    >>> round(float(row["difference"]), 2), bool(row["apart"])
    (0.3, True)
    """
    names = [name for name in first if name in second and name not in MEASURED]
    if first.empty or second.empty or "value" not in first or "value" not in second:
        return pd.DataFrame()
    tables = []
    for letter, table in (("A", first), ("B", second)):
        labels = table[names].astype("string").fillna("")
        # Rows with equal labels are matched in their order.
        labels["#"] = labels.groupby(names).cumcount() if names else range(len(table))
        own = table.reindex(columns=["value", "low", "high"])
        tables.append(pd.concat([labels, own.add_suffix(f" {letter}")], axis=1))
    both = tables[0].merge(tables[1], on=[*names, "#"], sort=False).drop(columns="#")
    both["difference"] = both["value B"] - both["value A"]
    both["apart"] = (both["low B"] > both["high A"]) | (both["low A"] > both["high B"])
    return both


def differences_of(first: Provenance, second: Provenance) -> list[tuple[str, str, str]]:
    """Returns what differs in two records: its name and both values, without times and memory."""
    found = []
    one, other = (
        {
            "model": record.model,
            "weights": record.model_sha256[:16],
            **{name: getattr(record, name) for name in ("experiment", "dtype", "device")},
            "hooked_vlm": f"{record.hooked_vlm} {record.git_commit or ''}".strip(),
            **record.config,
            **record.packages,
        }
        for record in (first, second)
    )
    for name in dict.fromkeys([*one, *other]):
        values = (str(one.get(name, "–")), str(other.get(name, "–")))
        if values[0] != values[1]:
            found.append((name, *values))
    return found


def _row(key: str, sides: tuple[Side, Side], table: pd.DataFrame | None) -> dict[str, Any]:
    """Returns what the template needs of one experiment on one setting."""
    cells = []
    for side in sides:
        result = side.results.get(key)
        figures = [] if result is None else [d for d in drawings(result) if d.headline]
        cells.append({"result": result, "figures": [shown(d, to_png(d.figure)) for d in figures]})
    found = next(cell["result"] for cell in cells if cell["result"] is not None)
    return {"result": found, "cells": cells, **_numbers(table)}


def _numbers(table: pd.DataFrame | None) -> dict[str, Any]:
    """Returns the table of the largest differences, and how many rows there are and are apart."""
    if table is None or table.empty:
        return {"table": "", "n": 0, "apart": 0}
    size = table["difference"].abs()
    if "quantity" in table:  # log odds are larger than probabilities
        size = size / size.groupby(table["quantity"]).transform("max").replace(0, 1)
    largest = size.sort_values(ascending=False, kind="stable").index[:ROWS]
    some = table.loc[largest].copy()
    some["apart"] = some["apart"].map({True: "apart", False: ""})
    for letter in "AB":
        bounds = zip(some.pop(f"low {letter}"), some.pop(f"high {letter}"), strict=True)
        text = [interval(low, high) for low, high in bounds]
        some.insert(list(some.columns).index(f"value {letter}") + 1, f"95 % {letter}", text)
    caption = (
        f"The {len(some)} largest differences of {len(table)} numbers, each relative to the "
        "largest of its quantity. apart: the 95 % intervals have no point in common; this is no "
        "test of the difference."
    )
    return {"table": table_of(some, caption), "n": len(table), "apart": int(table["apart"].sum())}
