"""The places of the objects of a What'sUp composite, on a grid of visual tokens (protocol 2.7)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.regions.region import Region, union_of


Box = tuple[int, int, int, int]
"""Half-open rows and columns: (row0, row1, col0, col1)."""

BOXES: Mapping[str, tuple[Box, Box, Box]] = {
    "chair": ((48, 60, 12, 24), (16, 60, 24, 40), (48, 60, 40, 52)),
    "table": ((40, 60, 8, 16), (20, 60, 16, 48), (40, 60, 48, 56)),
    "armchair": ((52, 60, 8, 20), (24, 60, 20, 44), (52, 60, 44, 56)),
}
"""The places of the three objects on a 64x64 grid, to which probes are fitted (protocol 2.7)."""

SWAPS: Mapping[tuple[str, int], tuple[Box, Box, tuple[int, int]]] = {
    ("chair", 12): ((8, 11, 1, 4), (8, 11, 8, 11), (4, 8)),
    ("table", 12): ((6, 11, 0, 3), (6, 11, 9, 12), (3, 9)),
    ("armchair", 12): ((9, 11, 1, 4), (9, 11, 8, 11), (4, 8)),
    ("chair", 16): ((12, 15, 3, 6), (12, 15, 10, 13), (6, 10)),
    ("table", 16): ((10, 15, 2, 4), (10, 15, 12, 14), (6, 12)),
    ("armchair", 16): ((13, 15, 2, 5), (13, 15, 11, 14), (5, 11)),
}
"""Published regions of swaps: left and right object, the end of the left strip and the start of
the right strip.  The published strips of "table" on 16 tokens are unequal and raise."""


@dataclass(frozen=True)
class CompositeLayout:
    """The places of the objects of a composite, on a grid of visual tokens."""

    reference: str
    n_tokens: int
    token_px: int
    left: Box
    right: Box
    seams: tuple[int, int]
    """The end of the left strip and the start of the right strip."""

    @property
    def canvas(self) -> int:
        """Side of the picture, in pixels."""
        return self.n_tokens * self.token_px

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of visual tokens."""
        return self.n_tokens, self.n_tokens

    def place_box(self, axis: str, place: int) -> tuple[int, int, int, int]:
        """Returns a place's pixel box `(x0, y0, x1, y1)`."""
        r0, r1, c0, c1 = self._box(axis, place)
        x0, y0, x1, y1 = (token * self.token_px for token in (c0, r0, c1, r1))
        return x0, y0, x1, y1

    def object_region(self, axis: str, place: int) -> Region:
        """Returns the cells of a place's object for swaps."""
        r0, r1, c0, c1 = self._box(axis, place)
        return Region.rectangle(self.shape, rows=(r0, r1), cols=(c0, c1), name=f"object {place}")

    def probe_region(self, axis: str, place: int) -> Region:
        """Returns the cells of a place's object for probes: the published ones of its box."""
        self._box(axis, place)
        r0, r1, c0, c1 = probe_box(self.reference, place, self.n_tokens)
        return Region.rectangle(self.shape, rows=(r0, r1), cols=(c0, c1), name=f"object {place}")

    def strip_region(self, axis: str, place: int) -> Region:
        """Returns the columns around a place."""
        self._box(axis, place)
        edges = (0, *self.seams, self.n_tokens)
        return Region.column_band(self.shape, edges[place], edges[place + 1], f"strip {place}")

    def background(self, axis: str) -> Region:
        """Returns the cells without an object, neither for swaps nor for probes."""
        make = (self.object_region, self.probe_region)
        objects = union_of(region(axis, place) for place in range(3) for region in make)
        return (~objects).named("background")

    def _box(self, axis: str, place: int) -> Box:
        if axis != "horizontal" or place not in (0, 1, 2):
            raise DataError(
                f"What'sUp composites have places 0, 1 and 2 in a row; "
                f"place {place}, {axis}, is none."
            )
        if place == 1:
            return scaled(BOXES[self.reference][1], self.n_tokens)
        return self.left if place == 0 else self.right


def layout_of(reference: str, n_tokens: int, token_px: int) -> CompositeLayout:
    """Returns the published regions for 12 and 16 tokens a side, else scaled 64x64 boxes.

    In scaled layouts, strips end halfway between their object and the reference (our choice).
    Raises `DataError` for a reference without boxes.
    """
    if reference not in BOXES:
        raise DataError(
            f"There are no boxes for {reference!r}, only for {', '.join(BOXES)}."
            f"{did_you_mean(reference, BOXES)}"
        )
    published = SWAPS.get((reference, n_tokens))
    if published is not None:
        return CompositeLayout(reference, n_tokens, token_px, *published)
    left, _, right = (scaled(box, n_tokens) for box in BOXES[reference])
    edge = max(left[3], round(BOXES[reference][1][2] * n_tokens / 64))
    return CompositeLayout(reference, n_tokens, token_px, left, right, (edge, n_tokens - edge))


def probe_box(reference: str, place: int, n_tokens: int) -> Box:
    """Returns the published cells of an object for probes, of its box on the 64x64 grid.

    The published code rounds the first row and column down, and the others to the nearest.

    >>> probe_box("table", 0, 12)
    (7, 11, 1, 3)
    """
    r0, r1, c0, c1 = (edge * n_tokens / 64 for edge in BOXES[reference][place])
    top, left = math.floor(r0), math.floor(c0)
    return top, max(round(r1), top + 1), left, max(round(c1), left + 1)


def scaled(box: Box, n_tokens: int) -> Box:
    """Returns the cells of another grid that lie at least half inside a 64x64 box.

    >>> scaled((48, 60, 12, 24), 16)
    (12, 15, 3, 6)
    """
    found = [round(edge * n_tokens / 64) for edge in box]
    for low, high in ((0, 1), (2, 3)):
        found[high] = max(found[high], found[low] + 1)
    return found[0], found[1], found[2], found[3]
