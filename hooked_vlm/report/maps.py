"""Maps over an image's grid: mean maps over many images, and single pictures with theirs."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Figure
from PIL import Image

from hooked_vlm.report.look import CLASSES, STYLE, WIDTH, _class, _need_dims, _wrapped


def mean_maps(maps: xr.DataArray, object_cells: xr.DataArray) -> Figure:
    """Draws each probe class's mean probability over the grid, one row per axis (paper, Fig. 4).

    `maps` has the dimensions axis, class, row, col and lies in [0, 1]; `object_cells` is
    boolean with the same dimensions and marks where that class's object stood.
    """
    _need_dims(maps, "axis", "class", "row", "col")
    with mpl.rc_context(STYLE):
        axis_names = [str(name) for name in maps["axis"].values]
        figure = Figure(figsize=(WIDTH, 0.3 + 2.1 * len(axis_names)), layout="constrained")
        panels = figure.subplots(len(axis_names), maps.sizes["class"], squeeze=False)
        for row, axis_name in enumerate(axis_names):
            cells = object_cells.isel(axis=row)
            for index, panel in enumerate(panels[row]):
                _heat(panel, maps.isel(axis=row)[index].values)
                _outline(panel, cells.any("class").values, width=0.7)
                _outline(panel, cells[index].values, width=2.2)
                panel.set_title(f"P({_class(axis_name, index)})")
            label = "{} images" if axis_name in CLASSES else "by {}"
            panels[row, 0].set_ylabel(label.format(axis_name))
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
        figure = Figure(figsize=(WIDTH, 1.75 * len(items)), layout="constrained")
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
    label = _wrapped(label, 1.6 * len(panels))
    figure.colorbar(scale, ax=panels, label=label, shrink=0.7, pad=0.02, aspect=30)
