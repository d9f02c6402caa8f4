"""The places of a stimulus's entities, aligned with whole visual tokens for every model.

Three entities are placed in a row or in a column, each on a square of whole visual tokens, so
the tokens of an object and of its strip are exact (paper, section 4, with the numbers of its
appendix).  With N tokens on a side, objects of S tokens and gaps of g tokens, the first object
begins at (N - (3S + 2g)) // 2, and all objects are centred on the other axis.  A strip has
every token of the columns (or rows) around an object.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Count, Whole
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.regions.region import Region


Axis = str
"""`"horizontal"` (places from left to right) or `"vertical"` (from top to bottom)."""

AXES = ("horizontal", "vertical")

Box = tuple[int, int, int, int]
"""Pixels `(x0, y0, x1, y1)`, half-open."""


@runtime_checkable
class Layout(Protocol):
    """The places of three objects and their strips on a square grid of visual tokens."""

    @property
    def canvas(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def place_box(self, axis: Axis, place: int) -> Box: ...

    def object_region(self, axis: Axis, place: int) -> Region: ...

    def strip_region(self, axis: Axis, place: int) -> Region: ...

    def background(self, axis: Axis) -> Region: ...


@checked(DataError)
@dataclass(frozen=True)
class Geometry:
    """Token counts and sizes of a stimulus with three places."""

    n_tokens: Count
    """Visual tokens on a side."""
    token_px: Count
    """Pixels on a side of one visual token."""
    object_tokens: Count
    gap_tokens: Whole
    strips: tuple[Whole, Whole, Whole]
    """Tokens across each of the three strips, which tile the image."""

    def __post_init__(self) -> None:
        if sum(self.strips) != self.n_tokens:
            raise DataError(
                f"Strips {self.strips} do not tile {self.n_tokens} tokens: their sum is "
                f"{sum(self.strips)}. Give three widths whose sum is {self.n_tokens}."
            )
        if self.width > self.n_tokens:
            raise DataError(
                f"Three objects of {self.object_tokens} tokens with gaps of {self.gap_tokens} do "
                f"not fit in {self.n_tokens} tokens. Give smaller objects or gaps."
            )

    @property
    def canvas(self) -> int:
        """Side of the image, in pixels."""
        return self.n_tokens * self.token_px

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of visual tokens."""
        return self.n_tokens, self.n_tokens

    @property
    def width(self) -> int:
        """Tokens from the first object's first to the last object's last."""
        return 3 * self.object_tokens + 2 * self.gap_tokens

    @property
    def begin(self) -> int:
        """The first object's first token along the axis."""
        return (self.n_tokens - self.width) // 2

    @checked(DataError)
    def place_span(self, place: int) -> tuple[int, int]:
        """Returns the half-open range of tokens of a place along the axis."""
        _check_place(place)
        start = self.begin + place * (self.object_tokens + self.gap_tokens)
        return start, start + self.object_tokens

    def cross_span(self) -> tuple[int, int]:
        """Returns the half-open range of tokens of every place across the axis."""
        start = (self.n_tokens - self.object_tokens) // 2
        return start, start + self.object_tokens

    @checked(DataError)
    def place_box(self, axis: Axis, place: int) -> Box:
        """Returns a place's pixel box `(x0, y0, x1, y1)`, half-open."""
        (a0, a1), (c0, c1) = self.place_span(place), self.cross_span()
        spans = (a0, c0, a1, c1) if is_horizontal(axis) else (c0, a0, c1, a1)
        x0, y0, x1, y1 = (token * self.token_px for token in spans)
        return x0, y0, x1, y1

    @checked(DataError)
    def object_region(self, axis: Axis, place: int) -> Region:
        """Returns the cells of a place's object."""
        along, across = self.place_span(place), self.cross_span()
        rows, cols = (across, along) if is_horizontal(axis) else (along, across)
        return Region.rectangle(self.shape, rows=rows, cols=cols, name=f"object {place}")

    @checked(DataError)
    def strip_region(self, axis: Axis, place: int) -> Region:
        """Returns the cells of the strip around a place: all rows of its columns, or reverse."""
        _check_place(place)
        start = sum(self.strips[:place])
        stop = start + self.strips[place]
        make = Region.column_band if is_horizontal(axis) else Region.row_band
        return make(self.shape, start, stop, f"strip {place}")

    @checked(DataError)
    def background(self, axis: Axis) -> Region:
        """Returns the cells without an object."""
        objects = [self.object_region(axis, place) for place in range(3)]
        return (~(objects[0] | objects[1] | objects[2])).named("background")


@dataclass(frozen=True)
class Shifted(Geometry):
    """A layout whose objects begin at any token; the strips stay where they are.

    >>> edge = Shifted(12, 28, 2, 0, (4, 4, 4), first=0)
    >>> [edge.place_span(place) for place in range(3)]
    [(0, 2), (2, 4), (4, 6)]
    """

    first: int
    """The first object's first token along the axis."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= self.n_tokens - self.width:
            raise DataError(
                f"Objects of {self.width} tokens in all cannot begin at token {self.first} of "
                f"{self.n_tokens}. Give a token from 0 to {self.n_tokens - self.width}."
            )

    @property
    def begin(self) -> int:
        """The first object's first token along the axis."""
        return self.first


PAPER_GEOMETRY = {
    "qwen2-vl": Geometry(12, 28, 2, 2, (4, 4, 4)),
    "gemma-3": Geometry(16, 56, 3, 3, (5, 6, 5)),
    "pixtral": Geometry(15, 16, 2, 2, (5, 5, 5)),
}
FEWEST_TOKENS = 5
"""Tokens a side of the smallest canvas that holds three objects with gaps between them."""


@checked(DataError)
def geometry_for(n_tokens: int, token_px: int) -> Geometry:
    """Returns the paper's layout for its token counts, else a layout with its proportions.

    Raises `DataError` for fewer than five tokens a side, where three objects with gaps
    between them do not fit.
    """
    if token_px < 1:
        raise DataError(f"token_px={token_px} was given; a token needs at least 1 pixel.")
    for paper in PAPER_GEOMETRY.values():
        if paper.n_tokens == n_tokens:
            return Geometry(n_tokens, token_px, paper.object_tokens, paper.gap_tokens, paper.strips)
    if n_tokens < FEWEST_TOKENS:
        raise DataError(
            f"{n_tokens} tokens a side cannot hold three objects with gaps between them. Use a "
            f"canvas of at least {FEWEST_TOKENS} tokens a side."
        )
    size = max(1, n_tokens // 6)
    gap = min(size, (n_tokens - 3 * size) // 2)
    # An outer strip ends in the middle of the gap, as in all of the paper's layouts.
    side = (n_tokens - 3 * size - 2 * gap) // 2 + size + (gap + 1) // 2
    return Geometry(n_tokens, token_px, size, gap, (side, n_tokens - 2 * side, side))


def _check_place(place: int) -> None:
    if place not in (0, 1, 2):
        raise DataError(f"Place {place} does not exist. Use 0, 1 or 2.")


def is_horizontal(axis: Axis) -> bool:
    """Returns whether an axis is the horizontal one; raises `DataError` for an unknown one."""
    if axis not in AXES:
        raise DataError(f"No axis {axis!r}: use {' or '.join(AXES)}.{did_you_mean(axis, AXES)}")
    return axis == "horizontal"
