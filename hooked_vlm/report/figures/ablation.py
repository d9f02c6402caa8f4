"""Figures of E5 and E6."""

from collections.abc import Iterator

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts
from hooked_vlm.report.figures.drawing import CHANCE, OF_ENTITIES, Drawing, Draws, Headlines


def _ablation(result: Result) -> Iterator[Drawing]:
    table = result.table[result.table["quantity"] == "accuracy"]
    yield Drawing(
        "accuracy",
        charts.dots(
            table, by="kind", line="direction", x_label="accuracy, 95 % interval", chance=CHANCE
        ),
        "Accuracy with the image tokens at the language model's input replaced. removed: each "
        "entity's tokens come from a picture with this entity alone in the middle, the background "
        "from an empty picture (the paper's recipe). objects only, background only: its halves. in "
        "place: entities alone, each at its own place. mean: the mean image token everywhere. "
        "itself: the existing tokens, which changes nothing. " + OF_ENTITIES,
        headline=True,
    )


def _swap_under(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "swap-by-slot",
        charts.swap(result.table),
        "As in E4, with vision's order removed first: the tokens of two regions are exchanged with "
        "those of the mirrored image, at one slot at a time. At slot 0 the swapped tokens hold no "
        "order; if object cells flip the answer at a later slot, blocks of the language model "
        "wrote the order. Only pairs that are answered correctly under the removal. Bands are "
        "95 % intervals.",
        headline=True,
    )


DRAW: Draws = {"E5": _ablation, "E6": _swap_under}

HEADLINES: Headlines = {
    "E5": (
        ({"quantity": "accuracy", "kind": "removed"}, "accuracy without vision's order"),
        ({"quantity": "accuracy", "kind": "intact"}, "… with vision's order"),
    ),
    "E6": (
        (
            {"quantity": "swapped", "kind": "object"},
            "answers flipped by objects without vision's order, at the best slot",
        ),
    ),
}
