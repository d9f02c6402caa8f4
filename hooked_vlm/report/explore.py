"""What a report's charts to explore show: each result's numbers over the slots, line by line."""

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from hooked_vlm.experiments.result import Result
from hooked_vlm.viewer.page import LIBRARY, asset


GROUPED = ("direction", "axis", "gap", "quantity")
"""Columns whose values are chosen; lines of one chart differ in `kind` alone."""
DIGITS = 4


def charts_of(result: Result) -> list[dict[str, Any]]:
    """Returns a chart for each choice of a result's numbers over slots; none without slots.

    A chart has a `label`, and `rows` of slot, name of the line, value and interval.  Where numbers
    have no kind, the quantity names the line.  Claims about single probes are left out: the charts
    show what the claims are about.
    """
    table = result.table
    if "slot" not in table:
        return []
    table = table[table["slot"].notna() & table["value"].notna()]
    if "probe" in table:
        table = table[table["probe"].isna()]
    has_kinds = "kind" in table and table["kind"].notna().any()
    named = "kind" if has_kinds else "quantity"
    groups = [c for c in GROUPED if c in table and c != named and table[c].notna().any()]
    charts = []
    for _, own in table.groupby(groups, sort=False, dropna=False) if groups else [((), table)]:
        rows = list(_rows(own, named))
        if len({row["slot"] for row in rows}) > 1:  # a single slot has no line
            label = " · ".join(own[groups].iloc[0].dropna().astype(str))
            charts.append({"label": label or result.title, "rows": rows})
    return charts


def _rows(table: pd.DataFrame, named: str) -> Iterable[dict[str, Any]]:
    for row in table.drop_duplicates([named, "slot"]).to_dict("records"):
        bounds = {k: round(float(row[k]), DIGITS) for k in ("low", "high") if pd.notna(row.get(k))}
        yield {
            "slot": int(row["slot"]),
            "name": str(row[named]),
            "value": round(float(row["value"]), DIGITS),
            **(bounds if len(bounds) == 2 else {}),
        }


def scripts_for(charts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns what the page's template needs to draw charts, by the anchor of their result.

    It is empty where no result has any: such a page has no scripts.
    """
    shown = {anchor: own for anchor, own in charts.items() if own}
    if not shown:
        return {}
    return {
        "data": json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c"),
        "library": [asset(name) for name in LIBRARY],
        "scripts": [asset(name) for name in ("numbers.js", "charts.js", "explore.js")],
        "licences": [asset(name) for name in ("d3.LICENSE", "plot.LICENSE")],
    }
