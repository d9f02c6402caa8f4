"""Grids: k x k cells, each with a random shape of a random colour (paper, App. C.6).

Every cell is a square block of whole visual tokens with its object in the middle, so a column
and a row of the grid are columns and rows of tokens.
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
from hooked_vlm.stimuli.squares import COLORS


Cell = tuple[str, str]
"""A shape and a colour."""


@checked(DataError)
@dataclass(frozen=True)
class GridLayout:
    """The places of the cells of a k x k grid, in visual tokens."""

    k: int
    n_tokens: int
    """Visual tokens on a side."""
    token_px: Count

    def __post_init__(self) -> None:
        if self.k < 2 or self.block < 2:
            raise DataError(
                f"A {self.k}x{self.k} grid needs at least 2 cells a side, each of at least 2 "
                f"tokens; there are {self.n_tokens} tokens a side."
            )

    @property
    def block(self) -> int:
        """Tokens on a side of a cell."""
        return self.n_tokens // self.k

    @property
    def object_tokens(self) -> int:
        """Tokens on a side of an object: as in the paper's rows, where they fit."""
        return max(1, min(self.n_tokens * 3 // 16, self.block - 1))

    @property
    def canvas(self) -> int:
        """Side of the picture, in pixels."""
        return self.n_tokens * self.token_px

    @property
    def start(self) -> int:
        """The first token of the first cell; tokens left over are split between both ends."""
        return (self.n_tokens - self.k * self.block) // 2

    @checked(DataError)
    def span(self, index: int) -> tuple[int, int]:
        """Returns the half-open range of tokens of a cell's object, along either axis."""
        if not 0 <= index < self.k:
            raise DataError(
                f"Index {index} does not exist: a {self.k}x{self.k} grid has 0 to {self.k - 1}."
            )
        begin = self.start + index * self.block + (self.block - self.object_tokens) // 2
        return begin, begin + self.object_tokens

    @checked(DataError)
    def object_region(self, row: int, col: int) -> Region:
        """Returns the tokens of a cell's object."""
        shape = (self.n_tokens, self.n_tokens)
        return Region.rectangle(
            shape, rows=self.span(row), cols=self.span(col), name=f"cell {row},{col}"
        )

    def band(self, token: int) -> int:
        """Returns the cell index that a token's row or column belongs to."""
        return min(max((token - self.start) // self.block, 0), self.k - 1)


def random_cells(k: int, rng: random.Random) -> list[list[Cell]]:
    """Returns the cells of a picture by row and column, each drawn independently."""
    return [
        [(rng.choice(tuple(shapes.PAINT)), rng.choice(tuple(COLORS))) for _ in range(k)]
        for _ in range(k)
    ]


@checked(DataError)
def draw(cells: Sequence[Sequence[Cell]], layout: GridLayout) -> Image.Image:
    """Returns a white canvas with the cells' shapes; raises `DataError` for another k."""
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
            shapes.paint(pen, shape, (x0, y0, x1, y1), COLORS[color])
    return image
