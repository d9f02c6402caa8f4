"""Figures of E7: the effect of amplified directions on answers."""

from collections.abc import Iterator

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts
from hooked_vlm.report.figures.drawing import ZERO, Drawing, Draws, Headlines
from hooked_vlm.report.look import BLUE, GREEN, GREY, ORANGE, PINK, Look


KINDS = {
    "released": Look("as released", ORANGE, "s"),
    "orthonormal": Look("orthonormal directions", BLUE, "o"),
    "written, first": Look("as written, first class", GREEN, "^"),
    "written, last": Look("as written, last class", PINK, "v"),
    "random, same norms": Look("random, same norms", GREY, "D", (0, (4, 2))),
    "random, same energy": Look("random, same energy", "#000000", "X", (0, (1, 2))),
    "random, orthonormal": Look("random, orthonormal", "#000000", "P", (0, (6, 1))),
    "random, written": Look("random, as written", GREY, "*", (0, (1, 1))),
}
QUANTITIES = ("accuracy", "corrected", "broken")


def _amplification(result: Result) -> Iterator[Drawing]:
    table = result.table
    curves = table[table["quantity"].isin(QUANTITIES)]
    yield Drawing(
        "by-strength",
        charts.curves(
            curves,
            x="alpha",
            line="kind",
            panel="quantity",
            looks=KINDS,
            x_label="strength alpha",
            y_label="share of items",
        ),
        "Ordering directions amplified in all image tokens at the language model's input. "
        "corrected: share of the answers that were wrong without it; broken: share of those that "
        "were correct. Random directions are random rotations of the directions. Bands are 95 % "
        "Wilson intervals over pictures.",
        headline=True,
    )
    chosen = table[table["quantity"].isin(["net, held-out alpha", "net, best alpha"])]
    yield Drawing(
        "net",
        charts.dots(
            chosen, by="kind", line="quantity", x_label="change in accuracy", limits=None, chance=0
        ),
        "Change in accuracy over all items, with alpha chosen on the same items (as published) or "
        f"on the other half of the items. 95 % bootstrap intervals over items. {ZERO}",
    )


def _transfer(result: Result) -> Iterator[Drawing]:
    table = result.table[result.table["quantity"] == "net"]
    yield Drawing(
        "transfer",
        charts.dots(
            table,
            by="target",
            line="source",
            x_label="change in accuracy, 95 % interval",
            limits=None,
            chance=0.0,
        ),
        "Change in accuracy on each setting (rows) with ordering directions and alpha from each "
        "setting (marks). From the setting itself, alpha is chosen on the other half of its items. "
        f"95 % bootstrap intervals over items. {ZERO}",
        headline=True,
    )


DRAW: Draws = {"E7": _amplification, "R2": _amplification, "Q1": _transfer}
HEADLINES: Headlines = {
    "E7": (
        (
            {"quantity": "net, held-out alpha", "kind": "released"},
            "change in accuracy by amplified ordering, alpha held out",
        ),
        (
            {"quantity": "net, held-out alpha", "kind": "random, same energy"},
            "… by random directions of the same energy",
        ),
    ),
}
