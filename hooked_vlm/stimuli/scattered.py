"""Objects that stand anywhere in the picture, for questions that are harder than the paper's.

In the paper's pictures three objects stand in a row or in a column, and a model that names the
right two can still be wrong about their order.  Small models, trained on rows and columns, seldom
are.  Where objects stand anywhere, most of their wrong answers name the one at the other end: what
amplified ordering (E7) can correct.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hooked_vlm.errors import CannotRunError, DataError
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.geometry import Axis, Box, Geometry, geometry_for, is_horizontal


LEAST_APART = 0.5
"""Of an object's side: the least distance of two neighbours along the axis.

It was written down before any model was asked.
"""


@dataclass(frozen=True)
class Scattered:
    """A layout whose objects stand anywhere, in their order along the axis, without overlap.

    Each picture has its own places (`placed`).  It has no strips, and its objects do not fill
    whole visual tokens, so whatever reads an object's or a strip's cells is refused.

    >>> layout = scattered_layout(12, 28).placed(("red", "green", "blue"), "horizontal")
    >>> [layout.place_box("horizontal", place)[0] for place in range(3)]
    [96, 188, 256]
    """

    plain: Geometry
    """The layout whose canvas and size of objects it has."""
    axis: Axis = ""
    """The axis of the order, of one picture."""
    boxes: tuple[Box, ...] = ()
    """Pixel boxes by place, of one picture."""

    @property
    def canvas(self) -> int:
        """Side of the image, in pixels."""
        return self.plain.canvas

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of visual tokens."""
        return self.plain.shape

    def placed(self, entities: Sequence[str | None], axis: Axis) -> "Scattered":
        """Returns the layout of one picture, which depends on its entities and the axis."""
        is_row = is_horizontal(axis)
        rng = random.Random(f"{axis}/{'/'.join(str(name) for name in entities)}")
        side = self.plain.object_tokens * self.plain.token_px
        while True:
            along, across = ([rng.randint(0, self.canvas - side) for _ in range(3)] for _ in "ab")
            along.sort()
            corners = list(zip(along, across, strict=True))
            if _apart(corners, side):
                break
        flat = corners if is_row else [(x, y) for y, x in corners]
        boxes = tuple((x, y, x + side, y + side) for x, y in flat)
        return replace(self, axis=axis, boxes=boxes)

    def place_box(self, axis: Axis, place: int) -> Box:
        """Returns a place's pixel box `(x0, y0, x1, y1)`, half-open.

        Raises `DataError` for an axis other than that of its picture.
        """
        if not self.boxes or axis != self.axis:
            raise DataError(
                f"axis={axis!r} was given; scattered objects have places in one picture and an "
                "order along one axis. Use placed(entities, axis)."
            )
        return self.boxes[place]

    def object_region(self, axis: Axis, place: int) -> Region:
        """Raises `CannotRunError`: see `Scattered`."""
        raise _no_cells(f"object {place}, {axis}")

    def strip_region(self, axis: Axis, place: int) -> Region:
        """Raises `CannotRunError`: see `Scattered`."""
        raise _no_cells(f"strip {place}, {axis}")

    def background(self, axis: Axis) -> Region:
        """Raises `CannotRunError`: see `Scattered`."""
        raise _no_cells(f"the background, {axis}")


def scattered_layout(n_tokens: int, token_px: int) -> Scattered:
    """Returns the layout of scattered objects for a grid of visual tokens."""
    return Scattered(geometry_for(n_tokens, token_px))


def _apart(corners: Sequence[tuple[int, int]], side: int) -> bool:
    """Returns whether neighbours are far enough apart along the axis, and none overlap."""
    (a, b, c) = corners
    near = min(b[0] - a[0], c[0] - b[0])
    pairs = ((a, b), (b, c), (a, c))
    return near >= LEAST_APART * side and all(
        abs(p[0] - q[0]) >= side or abs(p[1] - q[1]) >= side for p, q in pairs
    )


def _no_cells(wanted: str) -> CannotRunError:
    return CannotRunError(
        f"The cells of {wanted}, were asked for; scattered objects do not fill whole visual tokens "
        "and have no strips. Use the setting without '-scattered'."
    )
