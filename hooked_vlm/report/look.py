"""Colours, markers and labels of figures, and checks of the data they are drawn from.

Figures are made from tables and labelled arrays without pyplot, so drawing changes no global
state and opens no window.  A figure computes nothing: every value it shows is in its table.
Colours are Okabe and Ito's, which colour-blind readers can distinguish, and every line has
its own marker, for print without colour.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from hooked_vlm.errors import DataError


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
BLUE, ORANGE, GREEN, PINK, _, _, GREY = COLORS
MARKERS = "osv^DPX"
"""The markers of these colours, for what has no look of its own."""


@dataclass(frozen=True)
class Look:
    """The style of one quantity or kind, the same in every figure."""

    label: str
    color: str
    marker: str
    dashes: str | tuple[int, tuple[int, int]] = "-"
    width: float = 1.8  # wider where another line often covers this one


KINDS = {
    "strip": Look("strips through the whole image", ORANGE, "s", width=4.0),
    "strip, aligned": Look("strips, aligned object on object", PINK, "D"),
    "object": Look("object cells alone", BLUE, "o"),
    "background": Look("strips without their object cells", GREY, "^", (0, (4, 2))),
}
STAGES = {
    "clean": Look("clean answer", GREY, "o"),
    "ordering": Look("ordering: the clean colour at the counterfactual's place", ORANGE, "s"),
    "attribute": Look("attribute: the counterfactual's colour", BLUE, "^"),
}
SCORES = {
    "accuracy": Look("held-out object tokens", BLUE, "o"),
    "converged": Look("the same, fitted to convergence", GREEN, "v"),
    "shuffled": Look("its control, fitted to shuffled labels", GREY, "D"),
    "background": Look("background tokens assigned to their strip", ORANGE, "s"),
    "background, shuffled": Look("its control", GREY, "^"),
}
CONTROLS = {
    "background, middle strip": Look("of these, the middle strip's", PINK, "P"),
    "background, one object": Look("the same with one object alone", COLORS[4], "X"),
    "background, empty": Look("the same in an empty picture", COLORS[5], "d"),
}
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

WIDTH = 6.4
"""Inches of a figure's width: reduced to a column of 3.4 inches, small text has about 6 points."""
SMALL = 11.0
"""Points of the smallest text."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "image.interpolation": "nearest",
}


def to_png(figure: Figure, *, dpi: int = 160) -> bytes:
    """Returns the figure as a PNG file, the same bytes for the same figure."""
    return _saved(figure, "png", dpi=dpi, metadata={"Software": None})


def vector_files(figure: Figure) -> dict[str, bytes]:
    """Returns the figure as SVG and PDF, by ending, the same bytes for the same figure.

    Their text is text: it can be searched, and edited in a drawing program.
    """
    return {
        "svg": _saved(figure, "svg", metadata={"Date": None, "Creator": None}),
        "pdf": _saved(figure, "pdf", metadata={"CreationDate": None, "Creator": None}),
    }


def _saved(figure: Figure, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hooked_vlm", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, **how)
    return buffer.getvalue()


def _complete(looks: Mapping[str, Look], found: pd.Series) -> dict[str, Look]:
    """Returns the styles of the names found, in order, with a spare style for unknown names."""
    names = _in_order(found, looks)
    used = {looks[name].color for name in names if name in looks}
    # Colours that are taken come last.
    spare = cycle(sorted(zip(COLORS, MARKERS, strict=True), key=lambda pair: pair[0] in used))
    return {name: looks.get(name) or Look(name, *next(spare)) for name in names}


def _in_order(found: pd.Series, order: Mapping[str, object] | Sequence[str]) -> list[str]:
    present = list(dict.fromkeys(str(name) for name in found.dropna()))
    known = [name for name in order if name in present]
    return known + [name for name in present if name not in known]


def _wrapped(text: str, inches: float) -> str:
    """Returns a label in as many lines as it needs in that many inches."""
    return textwrap.fill(text, max(10, int(inches / 0.092)), break_long_words=False)


def _direction(name: object) -> str:
    return DIRECTIONS.get(str(name), str(name))


def _class(axis: str, index: int) -> str:
    names = CLASSES.get(axis, ())
    return names[index] if index < len(names) else f"{axis} {index + 1}"


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(
            f"The table has the columns {list(table.columns)}; this figure also needs {missing}. "
            "Give the table of the experiment's result."
        )
    if table.empty:
        raise DataError(
            "The table has no rows, so there is nothing to draw. Give a table with rows."
        )


def _need_dims(array: xr.DataArray, *dims: str) -> None:
    if array.dims != dims:
        raise DataError(
            f"The array has the dimensions {array.dims}; this figure needs {dims}. "
            "Use array.transpose(...) to put them in this order."
        )
