"""Figures of E8, E9 and Q4: grids, photographs as backgrounds, and composites."""

from collections.abc import Iterator

import pandas as pd
import xarray as xr

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import charts, look
from hooked_vlm.report import maps as plots
from hooked_vlm.report.figures.drawing import CHANCE, OF_PLACES, Drawing, Draws, Headlines, readings
from hooked_vlm.report.look import BLUE, ORANGE, Look


def _grids(result: Result) -> Iterator[Drawing]:
    table = readings(result.table)
    table = table.assign(probe=table["kind"] + ", " + table["axis"])
    yield Drawing(
        "probes",
        charts.dots(
            table,
            by="probe",
            line="quantity",
            looks=look.SCORES,
            x_label="share of correct tokens, 95 % interval",
        ),
        "Probes of an object's column and row in grids of 2x2 and 3x3 shapes, fitted to object "
        "tokens at the projector's output and scored on held-out pictures. Chance is 1/2 and 1/3.",
        headline=True,
    )

    for size in dict.fromkeys(
        str(name).split()[0] for name in result.arrays["mean_maps"]["probe"].values
    ):
        maps, cells = (
            _of_size(result.arrays[name], size) for name in ("mean_maps", "object_cells")
        )
        yield Drawing(
            f"maps-{size}",
            plots.mean_maps(maps, cells),
            f"Probe maps of {size} grids, mean over held-out pictures: the upper row by the "
            "object's column, the lower by its row. Boxes are the objects, thick for the class "
            "shown; the probes were fitted only to these cells.",
        )


def _of_size(arrays: xr.DataArray, size: str) -> xr.DataArray:
    """Returns the arrays of one size of grid, with probes named by their labels."""
    probes = [str(name) for name in arrays["probe"].values if str(name).startswith(f"{size} ")]
    found = arrays.sel(probe=probes).isel({"class": slice(int(size.split("x")[0]))})
    return found.assign_coords(probe=[name.split()[1] for name in probes]).rename(probe="axis")


def _photographs(result: Result) -> Iterator[Drawing]:
    table = result.table
    probes = _readings(table)
    yield Drawing(
        "probes",
        charts.dots(
            probes,
            by="quantity",
            line="ground",
            panel="axis",
            x_label="share of tokens, 95 % interval",
            chance=CHANCE,
        ),
        "Ordering probes on white and on photographs: accuracy on object tokens of held-out "
        "pictures (converged: fitted to convergence), and the share of background tokens assigned "
        f"to their strip. {OF_PLACES}",
        headline=True,
    )
    for ground in dict.fromkeys(probes["ground"]):
        maps = result.arrays[f"mean_maps_{ground}"]
        yield Drawing(
            f"maps-{ground}",
            plots.mean_maps(maps, result.arrays[f"object_cells_{ground}"]),
            f"Probe maps, mean over held-out pictures on {ground}; boxes are the objects.",
        )
    swaps = table[(table["quantity"] == "swapped") & table["kind"].isin(["strip", "object"])]
    swaps = swaps[swaps["direction"] != "all"]
    if len(swaps):
        yield Drawing(
            "swaps",
            charts.curves(
                _named(swaps),
                x="slot",
                line="line",
                panel="direction",
                looks=LINES,
                x_label=look.SLOTS,
                y_label="P(swapped answer)",
            ),
            "Probability of the mirrored picture's answer when regions are exchanged, by slot. "
            "Bands are 95 % bootstrap intervals over pairs.",
        )


def _readings(table: pd.DataFrame) -> pd.DataFrame:
    probes = readings(table[table["part"] == "ordering-probes"])
    return probes[~probes["quantity"].str.contains("shuffled")]


def _named(swaps: pd.DataFrame) -> pd.DataFrame:
    return swaps.assign(
        line=swaps["kind"] + " on " + swaps["ground"], slot=swaps["slot"].astype(int)
    )


LINES = {
    "strip on white": Look("strips, white", ORANGE, "s", (0, (4, 2))),
    "object on white": Look("objects, white", BLUE, "o", (0, (4, 2))),
    "strip on photographs": Look("strips, photographs", ORANGE, "s"),
    "object on photographs": Look("objects, photographs", BLUE, "o"),
}


def _composites(result: Result) -> Iterator[Drawing]:
    table = result.table
    probes = _readings(table)
    yield Drawing(
        "probes",
        charts.dots(
            probes,
            by="variant",
            line="quantity",
            looks=look.SCORES,
            x_label="share of tokens, 95 % interval",
            chance=CHANCE,
        ),
        "Ordering probes on whole pictures of three objects and on joined ones: accuracy on object "
        "tokens of held-out pictures, and the share of background tokens assigned to their strip. "
        + OF_PLACES,
        headline=True,
    )
    swaps = table[(table["quantity"] == "swapped") & table["kind"].isin(["strip", "object"])]
    swaps = swaps[swaps["direction"] == "all"]
    if len(swaps):
        yield Drawing(
            "swaps",
            charts.curves(
                swaps.assign(slot=swaps["slot"].astype(int)),
                x="slot",
                line="variant",
                panel="kind",
                x_label=look.SLOTS,
                y_label="P(swapped answer)",
            ),
            "Probability of the mirrored picture's answer when strips or object cells are "
            "exchanged with its own. Bands are 95 % bootstrap intervals over pairs.",
        )


DRAW: Draws = {"E8": _grids, "E9": _photographs, "Q4": _composites}
HEADLINES: Headlines = {
    "E8": (({"quantity": "accuracy"}, "column and row read from grids"),),
    "E9": (
        (
            {"quantity": "background", "ground": "photographs"},
            "background tokens assigned to their strip, on photographs",
        ),
    ),
}
