"""Figures of open questions of the paper: encoder depth, interaction of mechanisms, the code."""

from collections.abc import Iterator

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts, look
from hooked_vlm.report.figures.drawing import (
    CHANCE,
    OF_ENTITIES,
    OF_PLACES,
    ZERO,
    Drawing,
    Draws,
    Headlines,
    readings,
)


DEPTH = "layer: 0 = encoder input, l = output of block l−1, last = projector"


def _depth(result: Result) -> Iterator[Drawing]:
    table = result.table
    probes = readings(table)
    yield Drawing(
        "probes",
        charts.curves(
            probes,
            x="layer",
            line="quantity",
            panel="axis",
            looks=look.SCORES,
            x_label=DEPTH,
            y_label="share of tokens",
            chance=CHANCE,
        ),
        "Ordering probes, fitted at each depth of the vision encoder: accuracy on object tokens of "
        "held-out pictures, and the share of background tokens assigned to their strip. Bands are "
        f"95 % intervals over pictures. {OF_PLACES}",
        headline=True,
    )
    swaps = table[table["quantity"] == "swapped"]
    yield Drawing(
        "swaps",
        charts.curves(
            swaps,
            x="layer",
            line="kind",
            panel="direction",
            looks=look.KINDS,
            x_label=DEPTH,
            y_label="P(swapped answer)",
        ),
        "Probability of the mirrored picture's answer when strips or object cells are exchanged at "
        "one depth of the vision encoder. Bands are 95 % bootstrap intervals over pairs.",
    )
    attention = table[table["quantity"] == "attention"]
    if len(attention):
        yield Drawing(
            "attention",
            charts.curves(
                attention,
                x="layer",
                line="kind",
                panel="axis",
                x_label="layer: l = attention of block l−1",
                y_label="times uniform attention",
                limits=None,
                chance=1.0,
            ),
            "Attention of background patches to the object of their own strip and to the other "
            "two, as a multiple of uniform attention (dotted). Bands are 95 % intervals.",
        )


def _redundancy(result: Result) -> Iterator[Drawing]:
    table = result.table[result.table["quantity"] == "accuracy"]
    yield Drawing(
        "cells",
        charts.dots(
            table[table["kind"] != "interaction"],
            by="direction",
            line="kind",
            x_label="accuracy, 95 % interval",
            chance=CHANCE,
        ),
        "Accuracy with both signals, with vision's order alone (attention between objects "
        "masked in the language model), with the language model's alone (vision's order removed), "
        "and with neither. " + OF_ENTITIES,
        headline=True,
    )
    yield Drawing(
        "interaction",
        charts.dots(
            result.table[
                (result.table["kind"] == "interaction") & (result.table["quantity"] == "log odds")
            ],
            by="direction",
            line="quantity",
            x_label="log odds: both − vision only − LM only + neither",
            limits=None,
            chance=0.0,
        ),
        "The interaction in log odds. Below zero, one signal can replace the other; above zero, "
        "each needs the other. The dotted line is zero, where the two add up. 95 % bootstrap "
        "intervals over pictures.",
    )


def _absolute_or_relative(result: Result) -> Iterator[Drawing]:
    table = result.table
    readings = table[table["shown"].notna() & table["place"].isna()]
    apart = [
        f"{edge}, gap {int(gap)}"
        for edge, gap in zip(readings["kind"], readings["gap"], strict=True)
    ]
    readings = readings.assign(where=apart)
    for shown, objects in (("three", "three objects"), ("alone", "each object alone")):
        yield Drawing(
            f"readings-{shown}",
            charts.dots(
                readings[readings["shown"] == shown],
                by="where",
                line="quantity",
                panel="axis",
                x_label="share of tokens, 95 % interval",
                chance=CHANCE,
            ),
            f"Pictures with {objects} close together at an edge: how ordering probes, fitted to "
            "the usual pictures, read the tokens of objects whose order and strip differ: as their "
            "place among the objects (relative), as their strip (absolute), or as neither. The gap "
            f"is that between the objects, in tokens. {OF_PLACES}",
            headline=shown == "three",
        )


def _why_strips(result: Result) -> Iterator[Drawing]:
    table = result.table[result.table["condition"].notna() & result.table["kind"].notna()]
    table = table.assign(panel=table["axis"] + ", " + table["quantity"])
    whole = table[table["layer"].isna()]
    yield Drawing(
        "shares",
        charts.dots(
            whole[whole["condition"].isin(["cut", "random cut"])],
            by="kind",
            line="condition",
            panel="panel",
            x_label="share of tokens, 95 % interval",
            chance=CHANCE,
        ),
        "Attention in the vision encoder is cut in all layers, from one class of patches to "
        "another, or to as many random keys: the share of background tokens that ordering probes "
        "assign to their strip, and of object tokens that they assign to their place. " + OF_PLACES,
        headline=True,
    )
    layers = table[table["layer"].notna() & (table["condition"] == "cut - intact")]
    if len(layers):
        together = result.config.get("by") == "up to"
        yield Drawing(
            "layers",
            charts.curves(
                layers.assign(layer=layers["layer"].astype(int)),
                x="layer",
                line="kind",
                panel="panel",
                x_label="cut in all layers up to" if together else "cut in one layer",
                y_label="share: cut − uncut",
                limits=(-1.0, 1.0),
                chance=0.0,
            ),
            "Change of the shares where attention is cut in "
            f"{'all layers up to each' if together else 'single layers'}. Bands are 95 % "
            f"intervals over pictures. {ZERO}",
        )


DRAW: Draws = {
    "Q5": _depth,
    "Q6": _redundancy,
    "Q7": _absolute_or_relative,
    "Q8": _why_strips,
}
HEADLINES: Headlines = {
    "Q6": (
        ({"quantity": "accuracy", "kind": "vision only"}, "accuracy with vision's order alone"),
        (
            {"quantity": "accuracy", "kind": "LM only"},
            "accuracy with the LM's order alone",
        ),
    ),
    "Q7": (
        (
            {"quantity": "relative", "kind": "both edges", "shown": "three"},
            "tokens read as their place among the objects",
        ),
        (
            {"quantity": "absolute", "kind": "both edges", "shown": "three"},
            "tokens read as their strip",
        ),
    ),
    "Q8": (
        ({"quantity": "background", "condition": "intact"}, "background read, uncut"),
        (
            {
                "quantity": "background",
                "condition": "cut",
                "kind": "background -> objects",
                "layer": None,  # in all layers
            },
            "background read, cut off from the objects",
        ),
    ),
}
