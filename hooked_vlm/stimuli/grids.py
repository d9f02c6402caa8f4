"""Grids: k x k cells, each with a random shape of a random colour (paper, App. C.6).

Objects and gaps have the sizes of the rows of three (`geometry`), and the grid is centred, so a
column and a row of the grid are columns and rows of tokens.  A 3x3 grid has its objects where
rows and columns of three have theirs.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Count
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli import shapes
from hooked_vlm.stimuli.geometry import FEWEST_TOKENS, Geometry, geometry_for
from hooked_vlm.stimuli.squares import COLORS


Cell = tuple[str, str]
"""A shape and a colour."""


@checked(DataError)
@dataclass(frozen=True)
class GridLayout:
    """The places of the objects of a k x k grid, in visual tokens.

    Raises `DataError` where k objects with gaps between them do not fit.

    >>> [GridLayout(2, 16, 56).span(index) for index in range(2)]
    [(3, 6), (9, 12)]
    """

    k: int
    n_tokens: int
    """Visual tokens on a side."""
    token_px: Count

    def __post_init__(self) -> None:
        if self.k < 2 or self.gap_tokens < 1:
            raise DataError(
                f"A {self.k}x{self.k} grid needs at least 2 objects a side, each of at least 1 "
                f"token and 1 token apart; there are {self.n_tokens} tokens a side."
            )

    @property
    def object_tokens(self) -> int:
        """Tokens on a side of an object: as in the rows of three, or less where k do not fit."""
        most = (self.n_tokens - (self.k - 1)) // self.k
        return max(1, min(self._row.object_tokens, most))

    @property
    def gap_tokens(self) -> int:
        """Tokens between two objects: as in the rows of three, or less where k do not fit."""
        left = self.n_tokens - self.k * self.object_tokens
        return min(self._row.gap_tokens, left // (self.k - 1))

    @property
    def _row(self) -> Geometry:
        return geometry_for(max(self.n_tokens, FEWEST_TOKENS), self.token_px)

    @property
    def canvas(self) -> int:
        """Side of the picture, in pixels."""
        return self.n_tokens * self.token_px

    @property
    def start(self) -> int:
        """The first token of the first object: the grid is centred."""
        width = self.k * self.object_tokens + (self.k - 1) * self.gap_tokens
        return (self.n_tokens - width) // 2

    @property
    def _step(self) -> int:
        return self.object_tokens + self.gap_tokens

    @checked(DataError)
    def span(self, index: int) -> tuple[int, int]:
        """Returns the half-open range of tokens of an object, along either axis."""
        if not 0 <= index < self.k:
            raise DataError(
                f"Index {index} does not exist: a {self.k}x{self.k} grid has 0 to {self.k - 1}."
            )
        begin = self.start + index * self._step
        return begin, begin + self.object_tokens

    @checked(DataError)
    def object_region(self, row: int, col: int) -> Region:
        """Returns the tokens of a cell's object."""
        shape = (self.n_tokens, self.n_tokens)
        return Region.rectangle(
            shape, rows=self.span(row), cols=self.span(col), name=f"cell {row},{col}"
        )

    def band(self, token: int) -> int:
        """Returns the index of the objects that a token's row or column is nearest to.

        Bands meet in the middle of a gap, as strips do.
        """
        return min(max((token - self.start + self.gap_tokens // 2) // self._step, 0), self.k - 1)


def random_cells(k: int, rng: random.Random) -> list[list[Cell]]:
    """Returns the cells of a picture by row and column, each drawn independently."""
    return [
        [(rng.choice(tuple(shapes.PAINT)), rng.choice(tuple(COLORS))) for _ in range(k)]
        for _ in range(k)
    ]


@checked(DataError)
def draw(
    cells: Sequence[Sequence[Cell]], layout: GridLayout, drawing: str = shapes.DEFAULT
) -> Image.Image:
    """Returns a white canvas with the cells' shapes, in one of `shapes.DRAWINGS`.

    Raises `DataError` for another k than the layout's.
    """
    if len(cells) != layout.k or any(len(row) != layout.k for row in cells):
        raise DataError(
            f"The layout has {layout.k}x{layout.k} cells, and {shown(cells)} were given. Give "
            "as many rows and columns."
        )
    image = Image.new("RGB", (layout.canvas, layout.canvas), "white")
    pen = ImageDraw.Draw(image)
    for r, row in enumerate(cells):
        for c, (shape, color) in enumerate(row):
            if color not in COLORS:
                raise DataError(
                    f"No colour {color!r} among {', '.join(COLORS)}.{did_you_mean(color, COLORS)}"
                )
            (y0, y1), (x0, x1) = layout.span(r), layout.span(c)
            x0, y0, x1, y1 = (token * layout.token_px for token in (x0, y0, x1, y1))
            shapes.paint(pen, shape, (x0, y0, x1, y1), COLORS[color], drawing)
    return image
