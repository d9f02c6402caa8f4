"""Figures show the numbers of their tables, all of them, and leave matplotlib as it was."""

import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from helpers import synthetic_results as synthetic
from hooked_vlm.errors import DataError
from hooked_vlm.report import charts, look, maps


def lines(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    """The y data of a panel's lines, by colour."""
    return {str(line.get_color()): line.get_ydata() for line in figure.axes[panel].lines}  # type: ignore[misc]


def render(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("n_slots", [4, 9, 29])
def test_swap_draws_every_number(n_slots: int) -> None:
    table = synthetic.e4(n_slots).table
    figure = charts.swap(table)
    assert len(figure.axes) == 2 * 4
    drawn = [lines(figure, panel) for panel in range(8)]
    for (quantity, direction, kind), rows in table.groupby(["quantity", "direction", "kind"]):
        panel = 2 * synthetic.DIRECTIONS.index(str(direction)) + (quantity == "clean")
        color = look.KINDS[str(kind)].color
        np.testing.assert_array_equal(drawn[panel][color], rows["value"])
    assert render(figure).std() > 0


def test_rows_are_drawn_in_the_order_of_their_slots() -> None:
    table = synthetic.e4().table
    shuffled = table.sample(frac=1, random_state=0)
    np.testing.assert_array_equal(
        lines(charts.swap(shuffled), 0)["#D55E00"], lines(charts.swap(table), 0)["#D55E00"]
    )


def test_bands_are_the_intervals() -> None:
    table = synthetic.e2().table
    figure = charts.final_token(table)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    rows = table.query("direction == 'left' and quantity == 'clean'")
    assert np.asarray(band)[:, 1].min() == pytest.approx(rows["low"].min())
    assert np.asarray(band)[:, 1].max() == pytest.approx(rows["high"].max())


def test_strips_show_where_objects_do_just_the_same() -> None:
    table = synthetic.e4().table
    strips = table[table["kind"] == "strip"]
    pixels = render(charts.swap(pd.concat([strips, strips.assign(kind="object")])))[..., :3]
    legend = len(pixels) // 8
    orange = np.abs(pixels[legend:].astype(int) - (0xD5, 0x5E, 0x00)).max(-1) < 8
    assert orange.sum() > 500


def test_an_unknown_kind_is_drawn_too() -> None:
    table = synthetic.e4().table
    extra = table[table["kind"] == "strip"].assign(kind="ring")
    figure = charts.swap(pd.concat([table, extra]))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 4
    assert "ring" in labels


def test_missing_direction_leaves_no_empty_panel() -> None:
    table = synthetic.e2().table
    assert len(charts.final_token(table[table["direction"] == "above"]).axes) == 1


def test_accuracy_says_its_numbers() -> None:
    table = synthetic.e1().table
    figure = charts.accuracy(table, chance=1 / 3)
    texts = [text.get_text() for text in figure.axes[0].texts]
    for row in table.to_dict("records"):
        assert any(f"{row['value']:.3f}" in text and f"n = {row['n']}" in text for text in texts)
    assert "chance" in texts
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "to the left of",
        "to the right of",
        "above",
        "below",
    ]


def test_accuracy_and_its_control_share_a_line() -> None:
    figure = charts.accuracy(synthetic.e3().table, by="axis")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "horizontal",
        "vertical",
    ]
    assert len(figure.legends[0].get_texts()) == 2


def test_accuracy_without_a_control_for_one_row() -> None:
    table = synthetic.e3().table.iloc[:3]  # vertical has no shuffled row
    assert render(charts.accuracy(table, by="axis")).std() > 0


def test_mean_maps_show_the_arrays() -> None:
    arrays = synthetic.e3().arrays
    figure = maps.mean_maps(arrays["mean_maps"], arrays["object_cells"])
    panels = [axes for axes in figure.axes if axes.images]
    shown = np.stack([np.asarray(panel.images[0].get_array()) for panel in panels])
    np.testing.assert_array_equal(shown, arrays["mean_maps"].values.reshape(6, 12, 12))
    assert [panel.get_title("left") for panel in panels] == [
        *("P(left)", "P(middle)", "P(right)", "P(top)", "P(middle)", "P(bottom)")
    ]


def test_outline_follows_the_cells() -> None:
    cells = np.zeros((4, 4), dtype=bool)
    cells[1, 1:3] = True
    figure = Figure()
    maps._outline(figure.subplots(), cells, width=1.0)
    edges = figure.axes[0].collections[-1].get_segments()  # type: ignore[attr-defined]
    assert len(edges) == 6  # around two cells side by side; none between them
    ends = {tuple(int(x) for x in end) for edge in edges for end in edge}
    assert ends == {(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)}  # (x, y) corners


def test_item_maps_put_the_picture_beside_and_inside_the_maps() -> None:
    result = synthetic.e3()
    figure = maps.item_maps(result.images, result.arrays["item_maps"], result.arrays["item_cells"])
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3 * 4
    assert [len(panel.images) for panel in panels[:4]] == [1, 2, 2, 2]
    assert render(figure).std() > 0


def test_drawing_changes_no_global_state() -> None:
    before = dict(mpl.rcParams)
    charts.swap(synthetic.e4().table)
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")  # another package may have imported it
    assert pyplot is None or pyplot.get_fignums() == []


def test_missing_column_names_it() -> None:
    with pytest.raises(DataError, match="also needs \\['slot'\\]"):
        charts.final_token(synthetic.e2().table.drop(columns="slot"))


def test_empty_table() -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        charts.final_token(synthetic.e2().table.iloc[:0])


def test_swap_without_its_quantities() -> None:
    with pytest.raises(DataError, match="'logit difference'"):
        charts.swap(synthetic.e4().table.assign(quantity="logit difference"))


def test_transposed_array() -> None:
    arrays = synthetic.e3().arrays
    turned: xr.DataArray = arrays["mean_maps"].transpose("axis", "class", "col", "row")
    with pytest.raises(DataError, match="transpose"):
        maps.mean_maps(turned, arrays["object_cells"])
