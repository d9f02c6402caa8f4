"""Two general figures for tables of numbers with intervals: curves and dots.

What an experiment varies along a scale (a slot, a strength, a layer) is drawn as curves;
what it compares (conditions, kinds, settings) as dots.  Both take a tidy table with the
columns value, low and high, and draw every row of it.
"""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hooked_vlm.errors import DataError
from hooked_vlm.plots import STYLE, Look


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


def _whiskers(rows: pd.DataFrame) -> np.ndarray:
    value = rows["value"].to_numpy(float)
    below = np.maximum(value - rows["low"].to_numpy(float), 0)
    return np.stack([below, np.maximum(rows["high"].to_numpy(float) - value, 0)])


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
