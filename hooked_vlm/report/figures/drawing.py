"""A figure of a page, with its file name and caption."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hooked_vlm.experiments.result import Result
from hooked_vlm.report.maps import Figure


CHANCE = 1 / 3  # three entities in every stimulus


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its file, and its caption."""

    name: str
    figure: Figure
    caption: str
    headline: bool = False
    """Whether this figure represents the result where only one is shown."""


Draws = Mapping[str, Callable[[Result], Iterator[Drawing]]]
"""An experiment's id -> the function that draws its result."""

Headlines = Mapping[str, tuple[tuple[Mapping[str, str | None], str], ...]]
"""An experiment's id -> (columns and values that select rows, their label).

None selects rows without a value in that column.
"""
