"""General figures draw every row of their table, and say what is missing."""

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.report import charts
from hooked_vlm.report.figures import DRAW
from hooked_vlm.report.look import Look, to_png


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
