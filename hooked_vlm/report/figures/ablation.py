"""Figures of E5 and E6, and of how the two mechanisms go together."""

from collections.abc import Iterator

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts
from hooked_vlm.report import charts as plots
from hooked_vlm.report.figures.drawing import CHANCE, Drawing, Draws, Headlines


def _ablation(result: Result) -> Iterator[Drawing]:
    table = result.table[result.table["quantity"] == "accuracy"]
    yield Drawing(
        "accuracy",
        charts.dots(
            table, by="kind", line="direction", x_label="accuracy, 95 % interval", chance=CHANCE
        ),
        "Accuracy with the image tokens at the language model's input replaced. removed: each "
        "entity's tokens come from a picture that holds it alone in the middle, the background's "
        "from an empty picture (the paper's recipe). objects only, background only: its halves. in "
        "place: entities alone, each at its own place. mean: no picture is left. itself: what was "
        "there is written back, which changes nothing. The dotted line is chance.",
        headline=True,
    )


def _swap_under(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "swap-by-slot",
        plots.swap(result.table),
        "As in E4, with vision's order removed first: regions' tokens trade places with those of "
        "the mirrored image, at one slot at a time. At slot 0 the swapped tokens carry no order; "
        "where object cells flip the answer later, blocks of the language model wrote it. Only "
        "pairs that are answered rightly under the removal. Bands are 95 % intervals.",
        headline=True,
    )


DRAW: Draws = {"E5": _ablation, "E6": _swap_under}

HEADLINES: Headlines = {
    "E5": (
        ({"quantity": "accuracy", "kind": "removed"}, "accuracy without vision's order"),
        ({"quantity": "accuracy", "kind": "intact"}, "… and with it"),
    ),
    "E6": (
        (
            {"quantity": "swapped", "kind": "object"},
            "answers flipped by objects without vision's order, at the best slot",
        ),
    ),
}
