"""Figures of the analyses: tables and labelled arrays in, matplotlib Figures out.

Nothing here computes a number: what a figure shows stands in its table.  Figures are
built without pyplot, so drawing one leaves no global state and opens no window.  Colours
are Okabe and Ito's, which stay apart for colour-blind readers, and every line has its own
marker, for print without colour.  Intervals are bands, chance is a dotted line, and slots are
the paper's: 0 is the projector's output merged into the text, l the output of layer l-1.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from hooked_vlm.errors import DataError


@dataclass(frozen=True)
class Look:
    """How one quantity or kind is drawn, the same in every figure."""

    label: str
    color: str
    marker: str
    dashes: str | tuple[int, tuple[int, int]] = "-"
    width: float = 1.8  # more where another line often runs just over it


KINDS = {
    "strip": Look("strips through the whole image", "#D55E00", "s", width=4.0),
    "strip, aligned": Look("strips, object laid on object", "#CC79A7", "D"),
    "object": Look("object cells alone", "#0072B2", "o"),
    "background": Look("strips without their object cells", "#6B6B6B", "^", (0, (4, 2))),
}
STAGES = {
    "clean": Look("clean answer", "#6B6B6B", "o"),
    "ordering": Look("ordering: the clean colour at the counterfactual's place", "#D55E00", "s"),
    "attribute": Look("attribute: the counterfactual's colour", "#0072B2", "^"),
}
SCORES = {
    "accuracy": Look("held-out object tokens", "#0072B2", "o"),
    "converged": Look("the same, fitted to convergence", "#009E73", "v"),
    "shuffled": Look("its control, fitted to shuffled labels", "#6B6B6B", "D"),
    "background": Look("background tokens given to their strip", "#D55E00", "s"),
    "background, shuffled": Look("its control", "#6B6B6B", "^"),
}
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # for a kind this file has no row for
DIRECTIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
CLASSES = {
    "horizontal": ("left", "middle", "right"),
    "vertical": ("top", "middle", "bottom"),
}
SLOTS = "slot: 0 = merged projector output, l = output of layer l−1"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "image.interpolation": "nearest",
}


def to_png(figure: Figure, *, dpi: int = 160) -> bytes:
    """Returns the figure as a PNG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


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


def mean_maps(maps: xr.DataArray, object_cells: xr.DataArray) -> Figure:
    """Draws each probe class's mean probability over the grid, one row per axis (paper, Fig. 4).

    `maps` has the dimensions axis, class, row, col and lies in [0, 1]; `object_cells` is
    boolean with the same dimensions and marks where that class's object stood.
    """
    _need_dims(maps, "axis", "class", "row", "col")
    with mpl.rc_context(STYLE):
        axis_names = [str(name) for name in maps["axis"].values]
        figure = Figure(figsize=(6.4, 0.3 + 2.1 * len(axis_names)), layout="constrained")
        panels = figure.subplots(len(axis_names), maps.sizes["class"], squeeze=False)
        for row, axis_name in enumerate(axis_names):
            cells = object_cells.isel(axis=row)
            for index, panel in enumerate(panels[row]):
                _heat(panel, maps.isel(axis=row)[index].values)
                _outline(panel, cells.any("class").values, width=0.7)
                _outline(panel, cells[index].values, width=2.2)
                panel.set_title(f"P({_class(axis_name, index)})")
            label = "{} images" if axis_name in CLASSES else "by {}"
            panels[row, 0].set_ylabel(label.format(axis_name), fontsize=10)
        _colorbar(figure, panels, "mean probability on held-out images")
    return figure


def item_maps(
    pictures: Mapping[str, Image.Image], maps: xr.DataArray, object_cells: xr.DataArray
) -> Figure:
    """Draws probe maps over single stimuli, the objects' cells outlined (paper, Fig. 4).

    `maps` has the dimensions item, class, row, col, with the coordinate `item` naming
    entries of `pictures` and a coordinate `axis` along it; `object_cells` likewise, boolean.
    Maps cover the whole picture.
    """
    _need_dims(maps, "item", "class", "row", "col")
    with mpl.rc_context(STYLE):
        items = [str(name) for name in maps["item"].values]
        figure = Figure(figsize=(8.2, 2.25 * len(items)), layout="constrained")
        panels = figure.subplots(len(items), 1 + maps.sizes["class"], squeeze=False)
        for row, item in enumerate(items):
            one, cells = maps.isel(item=row), object_cells.isel(item=row)
            shape = one.sizes["row"], one.sizes["col"]
            _picture(panels[row, 0], pictures[item], shape)
            panels[row, 0].set_title("stimulus" if row == 0 else "")
            for index, panel in enumerate(panels[row, 1:]):
                _heat(panel, one[index].values)
                _picture(panel, _faded(pictures[item], cells.any("class").values), shape)
                _outline(panel, cells.any("class").values, width=0.7)
                _outline(panel, cells[index].values, width=2.2)
                panel.set_title(f"P({_class(str(one['axis'].values), index)})")
        _colorbar(figure, panels, "probability, cell by cell")
    return figure


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


def _heat(panel: Axes, values: np.ndarray) -> None:
    rows, cols = values.shape
    panel.imshow(values, cmap="cividis", vmin=0, vmax=1, extent=(0, cols, rows, 0))
    _bare(panel)


def _picture(panel: Axes, picture: Image.Image, shape: tuple[int, int]) -> None:
    rows, cols = shape
    panel.imshow(np.asarray(picture), extent=(0, cols, rows, 0))
    _bare(panel)


def _faded(picture: Image.Image, cells: np.ndarray) -> Image.Image:
    """The picture, seen only inside `cells`, and there as a smaller inset over the map."""
    mask = Image.fromarray(np.uint8(cells) * 255).resize(picture.size, Image.Resampling.NEAREST)
    inset = Image.fromarray(np.uint8(_shrink(np.asarray(mask) > 0)) * 255)
    faded = picture.convert("RGBA")
    faded.putalpha(inset)
    return faded


def _shrink(mask: np.ndarray) -> np.ndarray:
    """Takes a quarter of an object's width off its mask on every side."""
    width = max(1, round(np.sqrt(mask.sum() / 3) / 4))
    kept = mask.copy()
    for shift in (width, -width):
        kept &= np.roll(mask, shift, axis=0) & np.roll(mask, shift, axis=1)
    return kept


def _outline(panel: Axes, cells: np.ndarray, *, width: float) -> None:
    """Draws the border between `cells` and the rest in white, cased in black, edge by edge."""
    padded = np.pad(cells.astype(bool), 1)
    upright = [
        [(c, r - 1), (c, r)]
        for r, c in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True)
    ]
    level = [
        [(c - 1, r), (c, r)] for r, c in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True)
    ]
    # Two collections, not path effects: the casing of one edge must not cover the next edge.
    for color, extra in (("black", 1.6), ("white", 0.0)):
        panel.add_collection(
            LineCollection(
                upright + level, colors=color, linewidths=width + extra, capstyle="projecting"
            )
        )


def _bare(panel: Axes) -> None:
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    for spine in panel.spines.values():
        spine.set(visible=True, color="#9A9A9A", linewidth=0.8)


def _colorbar(figure: Figure, panels: np.ndarray, label: str) -> None:
    scale = ScalarMappable(Normalize(0, 1), cmap="cividis")
    figure.colorbar(scale, ax=panels, label=label, shrink=0.7, pad=0.02, aspect=30)


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


def _complete(looks: Mapping[str, Look], found: pd.Series) -> dict[str, Look]:
    """The looks of what was found, in their order, with one made up for an unknown name."""
    names = _in_order(found, looks)
    spare = iter(OTHERS * len(names))
    return {name: looks.get(name) or Look(name, next(spare), "D") for name in names}


def _in_order(found: pd.Series, order: Mapping[str, object] | Sequence[str]) -> list[str]:
    present = list(dict.fromkeys(str(name) for name in found.dropna()))
    known = [name for name in order if name in present]
    return known + [name for name in present if name not in known]


def _direction(name: object) -> str:
    return DIRECTIONS.get(str(name), str(name))


def _class(axis: str, index: int) -> str:
    names = CLASSES.get(axis, ())
    return names[index] if index < len(names) else f"{axis} {index + 1}"


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(
            f"The table has the columns {list(table.columns)}; this figure also needs {missing}."
        )
    if table.empty:
        raise DataError("The table has no rows, so there is nothing to draw.")


def _need_dims(array: xr.DataArray, *dims: str) -> None:
    if array.dims != dims:
        raise DataError(
            f"The array has the dimensions {array.dims}; this figure needs {dims}. "
            "Use array.transpose(...) to put them in this order."
        )
