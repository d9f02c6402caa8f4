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
    CONTROLS,
    DIRECTIONS,
    KINDS,
    SCORES,
    SLOTS,
    SMALL,
    STAGES,
    STYLE,
    WIDTH,
    Look,
    _complete,
    _direction,
    _in_order,
    _need,
    _wrapped,
)


def accuracy(table: pd.DataFrame, *, by: str = "direction", chance: float | None = None) -> Figure:
    """Draws accuracies with their intervals and numbers, one row per value of `by`.

    `table` has the columns `by`, quantity, value, low, high, n.  Quantities share a row and
    have their own marks: "accuracy", and beside it the control "shuffled", if there is one.
    `chance` is drawn as a dotted line (paper, Table 1).
    """
    _need(table, by, "quantity", "value", "low", "high", "n")
    names = _in_order(table[by], [*DIRECTIONS, *CLASSES])
    rows = table.set_index(by).loc[names].reset_index()
    return dots(
        rows.assign(**{by: rows[by].map(_direction)}),
        by=by,
        line="quantity",
        x_label="accuracy, with its 95 % interval",
        looks={**SCORES, **CONTROLS},
        chance=chance,
        numbers=True,
    )


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
    """Panels of lines over slots, one for each direction, and for each entry of `rows` a column."""
    directions = _in_order(table["direction"], DIRECTIONS)
    looks = _complete(looks, pd.concat([part[line] for part in rows.values()]))
    single = len(rows) == 1
    columns = min(COLUMNS, len(directions)) if single else len(rows)
    places = [(label, direction) for direction in directions for label in rows]
    n_rows = -(-len(places) // columns)
    with mpl.rc_context(STYLE):
        height = 0.7 + 1.9 * n_rows + (0 if single else 0.3) + _legend_height(looks, WIDTH)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel, (label, direction) in zip(grid.flat, places, strict=False):
            here = rows[label]
            here = here[here["direction"] == direction]
            for name, look in looks.items():
                _curve(panel, here[here[line] == name], "slot", look)
            _slot_axis(panel, table["slot"])
            heading = f"{label}\n" if not single and direction == directions[0] else ""
            panel.set_title(heading + _direction(direction))
        _hide_from(grid, len(places))
        for panel in grid[:, 0]:
            panel.set_ylabel((next(iter(rows)) or "mean probability") if single else "probability")
        figure.supxlabel(_wrapped(SLOTS, WIDTH), fontsize="medium")
        _legend(figure, looks)
    return figure


def _curve(axes: Axes, rows: pd.DataFrame, x: str, look: Look) -> None:
    """Draws one line and its band."""
    if rows.empty:
        return
    rows = rows.sort_values(x)
    at, value, low, high = (rows[name].to_numpy(float) for name in (x, "value", "low", "high"))
    axes.fill_between(at, low, high, color=look.color, alpha=0.18, lw=0)
    axes.plot(at, value, **_drawn(look, size=3.0 + 0.8 * look.width))


def _drawn(look: Look, size: float = 6) -> dict[str, Any]:
    line = {"color": look.color, "ls": look.dashes, "lw": look.width}
    return {**line, "marker": look.marker, "ms": size}


def _slot_axis(panel: Axes, slots: pd.Series) -> None:
    panel.set(ylim=(-0.03, 1.03), yticks=(0, 0.25, 0.5, 0.75, 1))
    panel.set_xlim(-0.4, float(slots.max()) + 0.4)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=3))


CHANCE: dict[str, Any] = {"color": "#555555", "ls": ":", "lw": 1.4}
COLUMNS = 2
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
    chosen = _complete(looks or {}, table[line].astype(str))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        height = 0.7 + 2.3 * rows + _legend_height(chosen, WIDTH)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (name, part) in zip(grid.flat, panels, strict=False):
            for key, look in chosen.items():
                _curve(axes, part[part[line].astype(str) == key], x, look)
            if chance is not None:
                axes.axhline(chance, **CHANCE)
            axes.set_title(_wrapped(name, 0.8 * (WIDTH - 0.8) / columns))
        _hide_from(grid, len(panels))
        first = grid[0, 0]
        if limits is not None:
            first.set_ylim(limits[0] - 0.02, limits[1] + 0.02)
        if pd.api.types.is_integer_dtype(table[x]):
            first.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.supxlabel(_wrapped(x_label or x, WIDTH), fontsize="medium")
        for axes in grid[:, 0]:  # a label of the whole figure would reach into the legend
            axes.set_ylabel(_wrapped(y_label, 1.9))
        if len(chosen) > 1:
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
    numbers: bool = False,
) -> Figure:
    """Draws `value` with its interval: a row for each value of `by`, a mark for each `line`.

    One panel for each value of `panel`, two side by side.  `numbers` are for shares in one panel:
    the axis is in per cent, and each mark has its value, interval and n beside it.  See `curves`
    for the rest.
    """
    panels = _panels(table, panel, by, line)
    chosen = _complete(looks or {}, table[line].astype(str))
    names = list(dict.fromkeys(table[by].astype(str)))
    with mpl.rc_context(STYLE):
        columns = min(COLUMNS, len(panels))
        n_rows = -(-len(panels) // columns)
        beside = 0.2 + 0.09 * max(map(len, names))  # inches of the rows' names, about
        # Inches of each row, and of each mark in it.
        row, mark = (0.25, 0.24) if numbers else (0.2, 0.14)
        each = 0.3 + len(names) * (row + mark * len(chosen))
        height = 0.6 + n_rows * each + _legend_height(chosen, WIDTH)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True)
        _hide_from(grid, len(panels))
        for axes, (name, part) in zip(grid.flat, panels, strict=False):
            for index, (key, look) in enumerate(chosen.items()):
                shift = 0.7 * ((index + 0.5) / len(chosen) - 0.5)
                rows = part[part[line].astype(str) == key]
                y = np.array([names.index(str(value)) for value in rows[by]]) + shift
                _whiskers(axes, rows, y, look)
                if numbers:
                    _write(axes, rows, y)
            if chance is not None:
                axes.axvline(chance, **CHANCE)
            axes.set_title(_wrapped(name, 0.8 * (WIDTH - beside) / columns))
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
        first = grid[0, 0]
        first.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        if limits is not None:
            first.set_xlim(limits[0] - 0.02, limits[1] + 0.02)
        if numbers:
            _in_per_cent(first, x_label, chance)
        else:
            figure.supxlabel(_wrapped(x_label, WIDTH), fontsize="medium")
        if len(chosen) > 1:
            _legend(figure, chosen)
    return figure


def _whiskers(axes: Axes, rows: pd.DataFrame, y: np.ndarray, look: Look) -> None:
    """Draws values and their intervals at some heights."""
    if rows.empty:
        return
    value, low, high = (rows[name].to_numpy(float) for name in ("value", "low", "high"))
    # Rounding may leave a bound on the wrong side of the value by one bit.
    sides = np.maximum([value - low, high - value], 0)
    how = {"capsize": 3, "lw": 1.5, "ms": 6, "clip_on": False}
    axes.errorbar(value, y, xerr=sides, fmt=look.marker, color=look.color, **how)


def _write(axes: Axes, rows: pd.DataFrame, y: np.ndarray) -> None:
    """Writes values, intervals and counts to the right of the panel."""
    at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": SMALL}
    for place, row in zip(y, rows.itertuples(), strict=True):
        text = f"{row.value:.3f} [{row.low:.2f}, {row.high:.2f}]  n = {row.n}"
        axes.annotate(text, (1.03, place), **at)


def _in_per_cent(axes: Axes, label: str, chance: float | None) -> None:
    axes.set(xlim=(0, 1.01), xlabel=label)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if chance is not None:
        at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        color = CHANCE["color"]
        axes.annotate("chance", (chance, 1.0), xytext=(4, 0), fontsize=SMALL, color=color, **at)


def _panels(
    table: pd.DataFrame, panel: str | None, *columns: str
) -> Sequence[tuple[str, pd.DataFrame]]:
    _need(table, *columns, *([panel] if panel else []), "value", "low", "high")
    if panel is None:
        return [("", table)]
    return [(str(name), table[table[panel] == name]) for name in dict.fromkeys(table[panel])]


def _hide_from(grid: np.ndarray, used: int) -> None:
    """Hides the panels that are not used; those above them get the labels of the axis."""
    for index, axes in enumerate(grid.flat):
        if index >= used:
            axes.set_visible(False)
            row, column = divmod(index, grid.shape[1])
            if row:
                grid[row - 1, column].tick_params(labelbottom=True)


def _legend_columns(looks: Mapping[str, Look], width: float) -> int:
    """Returns how many columns a legend has in a figure so many inches wide."""
    lengths = [0.7 + 0.087 * len(look.label) for look in looks.values()]
    for columns in range(len(lengths), 1, -1):
        each = -(-len(lengths) // columns)  # a legend is filled column by column
        if sum(max(lengths[i : i + each]) for i in range(0, len(lengths), each)) <= width:
            return columns
    return 1


def _legend_height(looks: Mapping[str, Look], width: float) -> float:
    return 0.25 * -(-len(looks) // _legend_columns(looks, width))


def _legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    """Adds a legend above the panels, in as many columns as fit."""
    handles = [Line2D([], [], label=look.label, **_drawn(look)) for look in looks.values()]
    columns = _legend_columns(looks, figure.get_figwidth())
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.2)
