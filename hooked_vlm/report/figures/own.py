"""Figures of experiments on a user's own data."""

from collections.abc import Iterator

import pandas as pd

from hooked_vlm.experiments.own.setting import ANYWHERE, AS_MANY, OTHERS, control_of
from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts, look
from hooked_vlm.report.figures import steering
from hooked_vlm.report.figures.drawing import Drawing, Draws, readings
from hooked_vlm.report.look import Look
from hooked_vlm.report.maps import Figure


KINDS = {
    ANYWHERE: Look("all boxes together", look.ORANGE, "s", width=4.0),
    OTHERS: Look("all other cells", look.GREY, "^", (0, (4, 2))),
    AS_MANY: Look("as many other cells, drawn at random", look.GREY, "D"),
}


def _behaviour(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "accuracy",
        charts.accuracy(result.table),
        "Accuracy over all questions, by direction. Dots are accuracies, whiskers are 95 % Wilson "
        "intervals; a picture is one observation.",
        headline=True,
    )


def _final_token(result: Result) -> Iterator[Drawing]:
    table = result.table[result.table["quantity"].isin(["swapped", "clean"])]
    looks = {
        "clean": Look("the picture's own answer", look.GREY, "o"),
        "swapped": Look("the counterfactual's answer", look.BLUE, "^"),
    }
    yield Drawing(
        "final-token",
        _by_slot(table, "quantity", "mean probability", looks),
        "The final token's residual vector is replaced, at one slot at a time, by that of the run "
        "on the counterfactual picture with the same question. Bands are 95 % bootstrap intervals "
        "over observations: pairs that share a picture are one.",
        headline=True,
    )


def _regions(result: Result) -> Iterator[Drawing]:
    table = _without_small_controls(result.table[result.table["quantity"] == "swapped"])
    yield Drawing(
        "patched-by-slot",
        _by_slot(table, "kind", "P(counterfactual's answer)", KINDS),
        "The visual tokens of a region are replaced, at one slot at a time, by those of the same "
        "cells in the run on the counterfactual picture. Controls of single boxes are in the "
        "table. Bands are 95 % bootstrap intervals over observations: pairs that share a picture "
        "are one.",
        headline=True,
    )


def _ablation(result: Result) -> Iterator[Drawing]:
    table = _without_small_controls(result.table[result.table["quantity"] == "answer"])
    yield Drawing(
        "ablated-by-slot",
        _by_slot(table, "kind", "P(correct answer)", KINDS),
        "The visual tokens of a region are replaced at one slot at a time. 'none': without "
        "ablation. Controls of single boxes are in the table. Bands are 95 % bootstrap intervals "
        "over pictures.",
        headline=True,
    )


def _probes(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "probe-accuracy",
        charts.accuracy(readings(result.table), by="axis"),
        "A linear probe reads the label from single visual tokens at the projector's output. "
        "Accuracy on held-out pictures; the control is fitted in the same way to shuffled labels, "
        "and 'fitted to convergence' is a logistic regression on the same tokens. n is the number "
        "of held-out pictures.",
        headline=True,
    )


def _without_small_controls(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows without the controls of single boxes: too many lines for one figure."""
    kinds = set(table["kind"])
    return table[~table["kind"].isin({control_of(kind) for kind in kinds - {ANYWHERE}})]


def _by_slot(table: pd.DataFrame, line: str, y_label: str, looks: dict[str, Look]) -> Figure:
    table = table[table["slot"].notna()]
    return charts.curves(
        table.astype({"slot": int}),
        x="slot",
        line=line,
        panel="direction",
        x_label=look.SLOTS,
        y_label=y_label,
        looks=looks,
    )


DRAW: Draws = {
    "D1": _ablation,
    "E1": _behaviour,
    "E2": _final_token,
    "E3": _probes,
    "E4": _regions,
    "E7": steering.DRAW["E7"],
}
"""By id, as for built-in settings; experiments on own data alone are among them."""
