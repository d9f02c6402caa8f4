"""A figure of a page, with its file name and caption."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from hooked_vlm.experiments.result import Result
from hooked_vlm.report import look
from hooked_vlm.report.maps import Figure


CHANCE = 1 / 3  # three entities in every stimulus
OF_ENTITIES = (
    "The dotted line is 1/3, one of the three entities at random; an answer that names one of the "
    "two ends, without any order, is right in 1/2."
)
OF_PLACES = "The dotted line is 1/3, one of three places at random."
"""What the line at `CHANCE` is, for captions of answers and of probes."""
ZERO = "The dotted line is zero, no change."


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its file, and its caption."""

    name: str
    figure: Figure
    caption: str
    headline: bool = False
    """Whether this figure represents the result where only one is shown."""


def readings(table: pd.DataFrame, *more: str) -> pd.DataFrame:
    """Returns the rows of what probes read on average, without claims and without single probes.

    `more` are quantities beside those of `look.SCORES`.
    """
    rows = table[table["quantity"].isin([*look.SCORES, *more])]
    return rows[rows["probe"].isna()] if "probe" in rows else rows


Draws = Mapping[str, Callable[[Result], Iterator[Drawing]]]
"""An experiment's id -> the function that draws its result."""

Headlines = Mapping[str, tuple[tuple[Mapping[str, str | None], str], ...]]
"""An experiment's id -> (columns and values that select rows, their label).

None selects rows without a value in that column.
"""
