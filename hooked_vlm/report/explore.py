"""What a report's charts to explore show: each result's numbers over the slots, line by line."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import own
from hooked_vlm.report.look import DIRECTIONS, KINDS, Look, _class, _complete
from hooked_vlm.viewer.page import LIBRARY, LICENCES, asset, json_for_script


OF_ROWS = ("slot", "site", "value", "low", "high", "n", "null", "p", "p_holm", "probe")
"""Columns that do not say which line a number is of."""
DIGITS = 4


def charts_of(result: Result) -> list[dict[str, Any]]:
    """Returns a chart for each choice of a result's numbers over slots; none without slots.

    A chart's lines differ in their kind or, where a result has one kind, in their direction: so
    all are of one quantity, and of one unit.  All that else tells numbers apart is chosen, and is
    the chart's `label`.  `names` and `colors` are of its lines, `rows` have slot, name of the line,
    value and interval.  Claims about single probes are left out: the charts show what the claims
    are about.  So are lines with two values at one slot, of which none could be chosen.
    """
    table = result.table
    if "slot" not in table:
        return []
    table = table[table["slot"].notna() & table["value"].notna()]
    if "probe" in table:
        table = table[table["probe"].isna()]
    line = next((c for c in ("kind", "direction") if c in table and table[c].nunique() > 1), None)
    line = line or "quantity"
    table = table.assign(**{line: table[line].fillna("all").astype(str)})
    told = [c for c in table if c not in OF_ROWS and (c != line or c == "quantity")]
    told = [c for c in told if table[c].nunique(dropna=False) > 1]
    looks = _looks(table[line], line)
    charts = []
    for _, rows in table.groupby(told, sort=False, dropna=False) if told else [((), table)]:
        slots = rows.groupby(line)["slot"]
        if (slots.nunique() < slots.size()).any() or slots.size().max() < 2:
            continue  # two values at one slot, or single slots, which have no line
        label = " · ".join(rows[told].iloc[0].dropna().astype(str)) or str(rows["quantity"].iloc[0])
        shown = [look for name, look in looks.items() if name in set(rows[line])]
        charts.append(
            {
                "label": label,
                "names": [look.label for look in shown],
                "colors": [look.color for look in shown],
                "rows": list(_points(rows, line, looks)),
            }
        )
    return charts


def _looks(names: pd.Series, line: str) -> dict[str, Look]:
    """Returns labels and colours of lines, which are those of the figures."""
    if line == "kind":
        return _complete({**KINDS, **own.KINDS}, names)
    found = _complete({}, names)
    order = sorted(found, key=lambda name: [*DIRECTIONS, name].index(name))
    return {name: found[name] for name in order}


def _points(table: pd.DataFrame, line: str, looks: Mapping[str, Look]) -> Iterable[dict[str, Any]]:
    for row in table.to_dict("records"):
        bounds = {k: round(float(row[k]), DIGITS) for k in ("low", "high") if pd.notna(row.get(k))}
        yield {
            "slot": int(row["slot"]),
            "name": looks[row[line]].label,
            "value": round(float(row["value"]), DIGITS),
            **(bounds if len(bounds) == 2 else {}),
        }


def maps_of(result: Result) -> list[dict[str, Any]]:
    """Returns a result's maps over the grid at each layer, one for each axis; none without layers.

    `values` are probabilities by layer, class, row and column, `sites` are the layers' names.
    """
    maps = result.arrays.get("maps")
    if maps is None or maps.dims != ("axis", "layer", "class", "row", "col"):
        return []
    sites = result.config.get("sites") or [f"layer {layer}" for layer in maps["layer"].values]
    return [
        {
            "label": str(axis),
            "sites": list(sites),
            "classes": [_class(str(axis), index) for index in range(maps.sizes["class"])],
            "values": np.round(maps.sel(axis=axis).values.astype(float), DIGITS).tolist(),
        }
        for axis in maps["axis"].values
    ]


def scripts_for(found: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Returns what the page's template needs to draw `charts` and `maps` of each anchor.

    It is empty where no result has any: such a page has no scripts.
    """
    shown = {anchor: dict(own) for anchor, own in found.items() if any(own.values())}
    if not shown:
        return {}
    scripts = (*LIBRARY, "numbers.js", "charts.js", "explore.js")
    return {
        "data": json_for_script(shown),
        "scripts": [asset(name) for name in scripts],
        "licences": [asset(name) for name in LICENCES],
    }
