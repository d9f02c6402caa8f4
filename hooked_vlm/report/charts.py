"""Charts of tables of numbers with intervals: curves, dots, and the paper's figures by slot.

What an experiment varies along a scale (a slot, a strength, a layer) is drawn as curves;
what it compares (conditions, kinds, settings) as dots.  All take a tidy table with the
columns value, low and high.  Intervals are bands, chance is a dotted line, and slots are
the paper's: 0 is the projector's output merged into the text, l the output of layer l-1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hooked_vlm.errors import DataError
from hooked_vlm.report.look import (
    CLASSES,
    DIRECTIONS,
    KINDS,
    SCORES,
    SLOTS,
    STAGES,
    STYLE,
    Look,
    _complete,
    _direction,
    _in_order,
    _need,
)


def accuracy(table: pd.DataFrame, *, by: str = "direction", chance: float | None = None) -> Figure:
    """Draws accuracies with their intervals, one line of the figure per value of `by`.

    `table` has the columns `by`, quantity, value, low, high, n.  Quantities share a line
    and have their own marks: "accuracy", and beside it the control "shuffled", if there
    is one.  `chance` is drawn as a dotted line (paper, Table 1).
    """
    _need(table, by, "quantity", "value", "low", "high", "n")
    names = _in_order(table[by], DIRECTIONS if by == "direction" else CLASSES)
    looks = _complete(SCORES, table["quantity"])
    with mpl.rc_context(STYLE):
        height = 0.7 + 0.25 * len(looks) + 0.27 * len(names) * (1 + len(looks))
        figure = Figure(figsize=(6.6, height), layout="constrained")
        axes = figure.subplots()
        for line, (quantity, look) in enumerate(looks.items()):
            rows = table[table["quantity"] == quantity].set_index(by)
            shift = 0.8 * ((line + 0.5) / len(looks) - 0.5)
            _dots(
                axes, rows.loc[[name for name in names if name in rows.index]], names, shift, look
            )
        labels = [_direction(name) for name in names]
        axes.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.4, -0.6))
        axes.set(xlim=(0, 1.01), xlabel="accuracy, with its 95 % interval")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        if chance is not None:
            _chance(axes, chance)
        if len(looks) > 1:
            figure.legend(handles=_handles(looks), loc="outside upper left", ncols=2)
    return figure


def _dots(axes: Axes, rows: pd.DataFrame, names: list[str], shift: float, look: Look) -> None:
    y = np.array([names.index(str(name)) for name in rows.index]) + shift
    whiskers = {"capsize": 3.5, "lw": 1.6, "ms": 6.5, "clip_on": False}
    axes.errorbar(
        rows["value"], y, xerr=_whiskers(rows), fmt=look.marker, color=look.color, **whiskers
    )
    for place, row in zip(y, rows.itertuples(), strict=True):
        text = f"{row.value:.3f}  [{row.low:.2f}, {row.high:.2f}]   n = {row.n}"
        at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9}
        axes.annotate(text, (1.03, place), **at)


def final_token(table: pd.DataFrame) -> Figure:
    """Draws what a patched final token brings along, by slot (paper, Fig. 3).

    One panel per direction; the lines are the mean probabilities of the rows whose
    `quantity` is clean, ordering and attribute, the bands their intervals.
    """
    _need(table, "direction", "slot", "quantity", "value", "low", "high")
    return _by_slot(table, line="quantity", looks=STAGES, rows={"": table})


def swap(table: pd.DataFrame) -> Figure:
    """Draws the strip swap against the object swap, by slot (paper, Figs. 5-7).

    One column per direction, one line per `kind`.  The upper row is the probability of
    the swapped answer, the lower row that of the clean answer (quantities "swapped" and
    "clean"); either may be missing.
    """
    _need(table, "direction", "slot", "quantity", "kind", "value", "low", "high")
    wanted = {"swapped": "P(swapped answer)", "clean": "P(clean answer)"}
    found = {
        label: table[table["quantity"] == quantity]
        for quantity, label in wanted.items()
        if (table["quantity"] == quantity).any()
    }
    if not found:
        raise DataError(
            f"The table has the quantities {sorted(set(table['quantity']))}; this figure draws "
            f"{sorted(wanted)}. Select the rows before drawing."
        )
    return _by_slot(table, line="kind", looks=KINDS, rows=found)


def _by_slot(
    table: pd.DataFrame, *, line: str, looks: Mapping[str, Look], rows: Mapping[str, pd.DataFrame]
) -> Figure:
    """Panels: one column per direction, one row per entry of `rows`; lines over slots."""
    directions = _in_order(table["direction"], DIRECTIONS)
    looks = _complete(looks, pd.concat([part[line] for part in rows.values()]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 1.2 + 2.3 * len(rows)), layout="constrained")
        panels = figure.subplots(
            len(rows), len(directions), sharex=True, sharey=True, squeeze=False
        )
        for row, (label, part) in enumerate(rows.items()):
            for column, direction in enumerate(directions):
                panel = panels[row, column]
                here = part[part["direction"] == direction]
                for name, look in looks.items():
                    _line(panel, here[here[line] == name], look)
                _slot_axis(panel, table["slot"])
                if row == 0:
                    panel.set_title(_direction(direction))
            panels[row, 0].set_ylabel(label or "mean probability")
        figure.supxlabel(SLOTS, fontsize=10)
        figure.legend(handles=_handles(looks), loc="outside upper left", ncols=len(looks))
    return figure


def _handles(looks: Mapping[str, Look]) -> list[Line2D]:
    return [
        Line2D([], [], label=look.label, **{**_drawn(look), "ms": 6}) for look in looks.values()
    ]


def _drawn(look: Look) -> dict[str, Any]:
    line = {"color": look.color, "ls": look.dashes, "lw": look.width}
    return {**line, "marker": look.marker, "ms": 3.0 + 0.8 * look.width}


def _line(panel: Axes, rows: pd.DataFrame, look: Look) -> None:
    rows = rows.sort_values("slot")
    if rows.empty:
        return
    slots = rows["slot"].astype(int)
    panel.fill_between(slots, rows["low"], rows["high"], color=look.color, alpha=0.18, lw=0)
    panel.plot(slots, rows["value"], **_drawn(look))


def _slot_axis(panel: Axes, slots: pd.Series) -> None:
    panel.set(ylim=(-0.03, 1.03), yticks=(0, 0.25, 0.5, 0.75, 1))
    panel.set_xlim(-0.4, float(slots.max()) + 0.4)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=3))


def _chance(axes: Axes, chance: float) -> None:
    axes.axvline(chance, color="#555555", ls=":", lw=1.4)
    at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axes.annotate("chance", (chance, 1.0), xytext=(4, 0), fontsize=9, color="#555555", **at)


def _whiskers(table: pd.DataFrame) -> np.ndarray:
    value = table["value"].to_numpy(float)
    # Rounding may leave a bound on the wrong side of the value by one bit.
    below = np.maximum(value - table["low"].to_numpy(float), 0)
    above = np.maximum(table["high"].to_numpy(float) - value, 0)
    return np.stack([below, above])


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
MARKERS = "osv^DPX"
COLUMNS = 4
"""Panels side by side, unless told otherwise."""


def curves(
    table: pd.DataFrame,
    *,
    x: str,
    line: str,
    panel: str | None = None,
    x_label: str = "",
    y_label: str = "",
    looks: Mapping[str, Look] | None = None,
    chance: float | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
    columns: int = COLUMNS,
) -> Figure:
    """Draws `value` over `x`, one line with its band for each value of `line`.

    One panel for each value of `panel`, `columns` side by side.  `looks` gives names and colours
    to lines; others get their own.  `chance` is a dotted line, and `limits` those of the y axis
    (None: free).

    Raises `DataError` for a missing column or an empty table.
    """
    panels = _panels(table, panel, x, line)
    chosen = _looks(table[line], looks)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        width = max(6.4, 2.9 * columns)
        height = 0.6 + 2.4 * rows + _legend_height(chosen, width)
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (name, part) in zip(grid.flat, panels, strict=False):
            for key, look in chosen.items():
                _curve(axes, part[part[line].astype(str) == key].sort_values(x), x, look)
            if chance is not None:
                axes.axhline(chance, color="#555555", ls=":", lw=1.4)
            axes.set_title(name)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        first = grid[0, 0]
        if limits is not None:
            first.set_ylim(limits[0] - 0.02, limits[1] + 0.02)
        if pd.api.types.is_integer_dtype(table[x]):
            first.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.supxlabel(x_label or x, fontsize=10)
        figure.supylabel(y_label, fontsize=10)
        _legend(figure, chosen)
    return figure


def dots(
    table: pd.DataFrame,
    *,
    by: str,
    line: str,
    panel: str | None = None,
    x_label: str = "",
    looks: Mapping[str, Look] | None = None,
    chance: float | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> Figure:
    """Draws `value` with its interval: a row for each value of `by`, a mark for each `line`.

    One panel for each value of `panel`, side by side.  See `curves` for the rest.
    """
    panels = _panels(table, panel, by, line)
    chosen = _looks(table[line], looks)
    names = list(dict.fromkeys(table[by].astype(str)))
    with mpl.rc_context(STYLE):
        width = min(2.8 + 3.6 * len(panels), 11)
        height = 0.9 + len(names) * (0.2 + 0.14 * len(chosen)) + _legend_height(chosen, width)
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
        for axes, (name, part) in zip(grid.flat, panels, strict=True):
            for index, (key, look) in enumerate(chosen.items()):
                shift = 0.7 * ((index + 0.5) / len(chosen) - 0.5)
                rows = part[part[line].astype(str) == key]
                y = np.array([names.index(str(value)) for value in rows[by]]) + shift
                axes.errorbar(
                    rows["value"],
                    y,
                    xerr=_whiskers(rows),
                    fmt=look.marker,
                    color=look.color,
                    capsize=3,
                    lw=1.5,
                    ms=6,
                )
            if chance is not None:
                axes.axvline(chance, color="#555555", ls=":", lw=1.4)
            axes.set_title(name)
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
        first = grid[0, 0]
        first.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        if limits is not None:
            first.set_xlim(limits[0] - 0.02, limits[1] + 0.02)
        figure.supxlabel(x_label, fontsize=10)
        _legend(figure, chosen)
    return figure


def _curve(axes: Axes, rows: pd.DataFrame, x: str, look: Look) -> None:
    if rows.empty:
        return
    at = rows[x].to_numpy(float)
    how = {"color": look.color, "linestyle": look.dashes, "linewidth": look.width}
    axes.plot(at, rows["value"], marker=look.marker, ms=4.5, **how)
    low, high = rows["low"].to_numpy(float), rows["high"].to_numpy(float)
    axes.fill_between(at, low, high, color=look.color, alpha=0.18, lw=0)


def _panels(
    table: pd.DataFrame, panel: str | None, *columns: str
) -> Sequence[tuple[str, pd.DataFrame]]:
    needed = [*columns, *([panel] if panel else []), "value", "low", "high"]
    missing = [column for column in needed if column not in table]
    if missing:
        raise DataError(
            f"The table has the columns {list(table.columns)}; this figure also needs {missing}."
        )
    if table.empty:
        raise DataError("The table has no rows, so there is nothing to draw.")
    if panel is None:
        return [("", table)]
    return [(str(name), table[table[panel] == name]) for name in dict.fromkeys(table[panel])]


def _looks(found: pd.Series, looks: Mapping[str, Look] | None) -> dict[str, Look]:
    names = list(dict.fromkeys(found.astype(str)))
    known = dict(looks or {})
    ordered = [name for name in known if name in names] + [n for n in names if n not in known]
    spare = iter([(c, m) for c, m in zip(COLORS, MARKERS, strict=True)] * len(ordered))
    return {name: known.get(name) or Look(name, *next(spare)) for name in ordered}


def _legend_columns(looks: Mapping[str, Look], width: float) -> int:
    """Returns how many columns a legend has in a figure so many inches wide."""
    inches = 0.6 + 0.078 * max(len(look.label) for look in looks.values())
    return max(1, min(len(looks), int(width / inches)))


def _legend_height(looks: Mapping[str, Look], width: float) -> float:
    return 0.22 * -(-len(looks) // _legend_columns(looks, width))


def _legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    """Adds a legend above the panels."""
    if len(looks) < 2:
        return
    handles = [
        Line2D([], [], color=k.color, marker=k.marker, ls=k.dashes, lw=k.width, label=k.label)
        for k in looks.values()
    ]
    columns = _legend_columns(looks, figure.get_figwidth())
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)
