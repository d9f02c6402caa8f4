"""Figures of R1 and R3: photographs of COCO-spatial and composites of What'sUp."""

from collections.abc import Iterator

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts, look
from hooked_vlm.report.figures.drawing import (
    CHANCE,
    OF_ENTITIES,
    OF_PLACES,
    Drawing,
    Draws,
    Headlines,
)


def _coco(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "accuracy",
        charts.dots(
            result.table,
            by="axis",
            line="quantity",
            x_label="accuracy, 95 % interval",
            looks={
                "accuracy": look.Look("correct in both orders", look.BLUE, "o"),
                "single": look.Look("single answers", look.ORANGE, "s"),
            },
            chance=0.5,
        ),
        "Items correct in both orders of their options, and single answers that are correct, by "
        "axis. Whiskers are 95 % Wilson intervals; the dotted line is 1/2, chance of a single "
        "answer.",
        headline=True,
    )


def _whatsup(result: Result) -> Iterator[Drawing]:
    table = result.table
    yield Drawing(
        "accuracy",
        charts.dots(
            table[table["part"] == "behaviour"],
            by="reference",
            line="direction",
            x_label="accuracy, 95 % interval",
            chance=CHANCE,
        ),
        "Accuracy on What'sUp's composites, by the reference in the middle and over all of them. "
        f"Whiskers are 95 % Wilson intervals. {OF_ENTITIES}",
        headline=True,
    )
    yield Drawing(
        "probes",
        charts.dots(
            _probes(result),
            by="quantity",
            line="part",
            x_label="share of tokens, 95 % interval",
            chance=CHANCE,
        ),
        "One ordering probe over all references: accuracy on object tokens of held-out composites, "
        "the share of background tokens that it assigns to their strip, and both for a probe with "
        f"shuffled labels. {OF_PLACES}",
    )
    apart = table[table["direction"] != "all"]
    final_token = apart[
        (apart["part"] == "final-token") & apart["quantity"].isin(list(look.STAGES))
    ]
    if len(final_token):
        yield Drawing(
            "final-token",
            charts.final_token(final_token),
            "The final token's residual vector is replaced, at one slot at a time, by that of a "
            "counterfactual run (as in E2), over pairs of all references. Bands are 95 % bootstrap "
            "intervals over pairs.",
        )
    swaps = apart[apart["part"] == "strip-swap"]
    if len(swaps):
        yield Drawing(
            "swap-by-slot",
            charts.swap(swaps),
            "The tokens of two regions are exchanged with those of the mirrored composite (as in "
            "E4), each pair at the regions of its own reference. Bands are 95 % bootstrap "
            "intervals over pairs.",
        )


def _probes(result: Result):
    table = result.table[result.table["part"] == "probes"]
    return table.assign(quantity=table["quantity"].str.removeprefix("probe, "))


DRAW: Draws = {"R1": _coco, "R3": _whatsup}
HEADLINES: Headlines = {
    "R1": (({"quantity": "accuracy", "axis": "all"}, "accuracy, correct in both orders"),),
    "R3": (
        (
            {"quantity": "accuracy", "reference": "all", "direction": "all"},
            "accuracy over all references",
        ),
    ),
}
