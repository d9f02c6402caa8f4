"""Figures of E1 to E4."""

from collections.abc import Iterator

import pandas as pd
import xarray as xr

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts, look, maps
from hooked_vlm.report.figures.drawing import (
    CHANCE,
    OF_ENTITIES,
    OF_PLACES,
    Drawing,
    Draws,
    Headlines,
    readings,
)


ITEMS_PER_AXIS = 2


def _behaviour(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "accuracy",
        charts.accuracy(result.table, chance=CHANCE),
        "Accuracy over all questions, by direction. Dots are accuracies, whiskers are 95 % Wilson "
        "intervals. " + OF_ENTITIES,
        headline=True,
    )


def _final_token(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "final-token",
        charts.final_token(_answers(result)),
        "The final token's residual vector is replaced, at one slot at a time, by that of a "
        "counterfactual run with other colours and the opposite question. Grey: the clean answer. "
        "Orange: the clean image's colour at the place that the counterfactual asks for, so the "
        "ordering was transferred. Blue: the counterfactual's own colour, so the attribute was "
        "transferred. Bands are 95 % bootstrap intervals over pairs.",
        headline=True,
    )


def _answers(result: Result) -> pd.DataFrame:
    table = _apart(result)
    return table[table["quantity"].isin(list(look.STAGES))]


def _ordering_probes(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "probe-accuracy",
        charts.accuracy(readings(result.table, *look.CONTROLS), by="axis", chance=CHANCE),
        "A linear probe reads an object's place in the order (first, middle, last) from single "
        "visual tokens at the projector's output. Accuracy on the object tokens of held-out "
        "images, and the share of background tokens that the probe assigns to their own strip; "
        "the control is a probe fitted in the same way to shuffled labels. Green: a logistic "
        "regression on the same tokens, fitted to convergence. Background tokens are also counted "
        "in the middle strip alone, with one object alone, and in an empty picture. n is the "
        "number of held-out images. " + OF_PLACES,
    )
    arrays = result.arrays
    if "mean_maps" in arrays:
        yield Drawing(
            "probe-maps",
            maps.mean_maps(arrays["mean_maps"], arrays["object_cells"]),
            "The same probes applied to every visual token of held-out images, averaged over "
            "images. Boxes are the objects' cells, thick for the class shown; the probes were "
            "fitted only to these cells. Order in the background appears as a strip: bright around "
            "its own object's place, dark around the others' places. A background of one shade "
            "holds no order.",
            headline=True,
        )
    if "item_maps" in arrays:
        some = _some(arrays["item_maps"])
        yield Drawing(
            "probe-maps-items",
            maps.item_maps(result.images, arrays["item_maps"][some], arrays["item_cells"][some]),
            "Single held-out images, not averaged. The small squares inside the boxes have the "
            "objects' colours.",
        )


def _swap(result: Result) -> Iterator[Drawing]:
    yield Drawing(
        "swap-by-slot",
        charts.swap(_apart(result)),
        "The tokens of two regions are exchanged with those of the mirrored image, at one slot at "
        "a time, in the run on the clean image. If a region holds the order, the probability of "
        "the mirrored image's answer rises (upper row) and that of the clean answer falls (lower "
        "row). Bands are 95 % bootstrap intervals over pairs.",
        headline=True,
    )


def _apart(result: Result) -> pd.DataFrame:
    """Returns the rows of single directions, without those of all directions together."""
    return result.table[result.table["direction"] != "all"]


def _some(found: xr.DataArray) -> list[int]:
    """Returns the indices of the first items of each axis."""
    axes = [str(axis) for axis in found["axis"].values]
    return [i for i, axis in enumerate(axes) if axes[:i].count(axis) < ITEMS_PER_AXIS]


DRAW: Draws = {
    "E1": _behaviour,
    "E2": _final_token,
    "E3": _ordering_probes,
    "E4": _swap,
}

HEADLINES: Headlines = {
    "E1": (({"quantity": "accuracy"}, "accuracy, lowest to highest direction"),),
    "E2": (({"quantity": "ordering"}, "ordering transferred by the final token, best slot"),),
    "E3": (
        ({"quantity": "accuracy"}, "held-out accuracy of the ordering probes"),
        ({"quantity": "background"}, "background tokens that the probes assign to their strip"),
    ),
    "E4": (
        ({"quantity": "swapped", "kind": "strip"}, "answers flipped by strips, at the best slot"),
        ({"quantity": "swapped", "kind": "object"}, "… by object cells alone, at the best slot"),
    ),
}
