"""General figures draw every row of their table, and say what is missing."""

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.report import charts
from hooked_vlm.report.figures import DRAW
from hooked_vlm.report.look import WIDTH, Look, to_png, vector_files


def table() -> pd.DataFrame:
    rows = [
        {"direction": d, "kind": k, "alpha": a, "value": v, "low": v - 0.1, "high": v + 0.1}
        for i, d in enumerate(["left", "above"])
        for j, k in enumerate(["probe", "random"])
        for a, v in zip([0.0, 2.0, 5.0], [0.2 + 0.1 * i, 0.4, 0.5 + 0.1 * j], strict=True)
    ]
    return pd.DataFrame(rows)


def test_curves_draw_every_number_of_every_panel() -> None:
    given = table().sample(frac=1, random_state=0)
    figure = charts.curves(given, x="alpha", line="kind", panel="direction", chance=0.33)
    for axes in figure.axes:
        for line, kind in zip(axes.lines, dict.fromkeys(given["kind"]), strict=False):
            rows = given[
                (given["kind"] == kind) & (given["direction"] == axes.get_title(loc="left"))
            ]
            rows = rows.sort_values("alpha")
            np.testing.assert_array_equal(line.get_ydata(), rows["value"])  # type: ignore[arg-type]
    assert Image.open(io.BytesIO(to_png(figure))).size[0] > 500


def test_dots_draw_a_mark_for_every_row() -> None:
    given = table().query("alpha == 5.0")
    look = Look("the probe's directions", "#000000", "s")
    figure = charts.dots(given, by="direction", line="kind", looks={"probe": look})
    drawn = [line.get_xdata() for line in figure.axes[0].lines if str(line.get_marker()) in "so"]
    marks = np.concatenate([np.asarray(x, dtype=float) for x in drawn])
    assert sorted(marks) == sorted(given["value"])
    assert figure.legends[0].get_texts()[0].get_text() == "the probe's directions"
    assert to_png(figure)


@pytest.mark.parametrize("wrong", [{"x": "slot"}, {"panel": "axis"}, {"line": "what"}])
def test_a_missing_column_is_named(wrong: dict[str, str]) -> None:
    columns: dict[str, Any] = {"x": "alpha", "line": "kind", **wrong}
    with pytest.raises(DataError, match=next(iter(wrong.values()))):
        charts.curves(table(), **columns)


def test_nothing_to_draw() -> None:
    with pytest.raises(DataError, match="no rows"):
        charts.dots(table().iloc[:0], by="direction", line="kind")


def test_every_experiment_has_a_figure() -> None:
    assert set(DRAW) == {experiment.id for experiment in EXPERIMENTS.values()}


def boxes(figure: Any) -> dict[str, Any]:
    """The places of a figure's texts and legend, drawn."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.canvas.draw()
    found = {"legend": figure.legends[0].get_window_extent(renderer)}
    for i, axes in enumerate(axes for axes in figure.axes if axes.get_visible()):
        found[f"y label {i}"] = axes.yaxis.label.get_window_extent(renderer)
        if axes.get_title(loc="left"):
            title = axes._left_title  # type: ignore[attr-defined]
            found[f"title {i}"] = title.get_window_extent(renderer)
    return found


def test_legend_and_labels_do_not_overlap_and_lie_in_the_figure() -> None:
    given = table().assign(kind=lambda t: t["kind"] + ", a name that is long enough to wrap")
    figures = (
        charts.curves(
            given,
            x="alpha",
            line="kind",
            panel="direction",
            y_label="P(counterfactual's answer), named at length",
        ),
        charts.curves(
            given[given["direction"] == "left"], x="alpha", line="kind", y_label="P" * 18
        ),
        charts.swap(
            table().assign(slot=lambda t: t["alpha"].astype(int), quantity="swapped", kind="strip")
        ),
    )
    for figure in figures:
        assert figure.get_figwidth() == WIDTH
        found = boxes(figure)
        for name, box in found.items():
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, name
            assert name == "legend" or not box.overlaps(found["legend"]), name


def test_svg_and_pdf_keep_text_as_text_and_are_the_same_bytes_again() -> None:
    first, again = (
        vector_files(charts.curves(table(), x="alpha", line="kind", x_label="strength"))
        for _ in range(2)
    )
    assert first == again and set(first) == {"svg", "pdf"}
    assert b">strength</text>" in first["svg"] and first["pdf"].startswith(b"%PDF")
