"""Regions: sets of cells of an image's grid of visual tokens.

A region has the shape of its grid and does not depend on a prompt.  The same region
therefore selects cells of a heat map, rows of the projector's output, patches of the vision
encoder and positions of the language model.  Its cells are in raster order (row by row,
left to right), and so are all indices derived from them.

Regions are made by a `TokenGrid` from pixels, by a stimulus from its objects, or here from
cells.  They combine as sets (`|`, `&`, `-`, `~`).  A combination may be empty, but using an
empty region raises `RegionError`: an intervention on no cell could not be distinguished from
an intervention without effect.  Geometry and regions: protocol 2.1.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked, is_sequence, shown
from hooked_vlm.arguments.displayed import html_block, html_cells
from hooked_vlm.errors import GridError, RegionError, counted
from hooked_vlm.regions.positions import ImageCells, InImage, PromptRow, TokenSelector, union


Cell = tuple[int, int]


@checked(RegionError, but=("shape", "cells"))
@dataclass(frozen=True, repr=False)
class Region:
    """A set of cells `(row, col)` on a grid of `shape` `(rows, cols)`, in raster order.

    Two regions are equal when their shapes and cells are equal; the name is only a label.

    >>> object_ = Region.rectangle((12, 12), rows=(5, 7), cols=(1, 3), name="object")
    >>> strip = Region.column_band((12, 12), 0, 4)
    >>> len(object_), len(strip), len(strip - object_), (5, 1) in object_
    (4, 48, 44, True)
    >>> object_
    Region('object', 4 of 12x12 cells: rows 5-6, columns 1-2)
    """

    shape: tuple[int, int]
    cells: tuple[Cell, ...]
    name: str = field(default="region", compare=False)

    def __post_init__(self) -> None:
        _require_whole(self.shape)
        rows, cols = (operator.index(n) for n in self.shape)
        if rows < 1 or cols < 1:
            raise RegionError(f"A grid of {rows}x{cols} cells has no cell. Give a positive shape.")
        try:
            cells = {(operator.index(r), operator.index(c)) for r, c in self.cells}
        except (TypeError, ValueError):
            raise RegionError(
                f"Region {self.name!r} was given cells={shown(self.cells)}; expected a sequence of "
                "pairs (row, column) of whole numbers."
            ) from None
        off = sorted((r, c) for r, c in cells if not (0 <= r < rows and 0 <= c < cols))
        if off:
            raise RegionError(
                f"Region {self.name!r} has {len(off)} of {counted(len(cells), 'cell')} off the "
                f"grid, the first at {off[0]} (row, column). Use rows 0 to {rows - 1} and columns "
                f"0 to {cols - 1}."
            )
        object.__setattr__(self, "shape", (rows, cols))
        object.__setattr__(self, "cells", tuple(sorted(cells)))

    @classmethod
    @checked(RegionError)
    def from_mask(cls, mask: Bool[np.ndarray, "row col"], name: str = "region") -> "Region":
        """Returns the region of the cells that are True in `[row, col]`."""
        cells = tuple((int(r), int(c)) for r, c in np.argwhere(mask))
        return cls((mask.shape[0], mask.shape[1]), cells, name)

    @classmethod
    @checked(RegionError, but=("rows", "cols"))
    def rectangle(
        cls,
        shape: tuple[int, int],
        rows: tuple[int, int],
        cols: tuple[int, int],
        name: str = "rectangle",
    ) -> "Region":
        """Returns the cells of these half-open ranges of rows and columns."""
        _require_whole(shape, rows, cols)
        for word, (start, stop), size in (("rows", rows, shape[0]), ("columns", cols, shape[1])):
            if not 0 <= start < stop <= size:
                raise RegionError(
                    f"{name} needs {word} {start} to {stop} (half-open), and the grid has "
                    f"{size}. Give 0 <= start < stop <= {size}."
                )
        cells = tuple((r, c) for r in range(*rows) for c in range(*cols))
        return cls(shape, cells, name)

    @classmethod
    @checked(RegionError, but=("start", "stop"))
    def column_band(
        cls, shape: tuple[int, int], start: int, stop: int, name: str = "strip"
    ) -> "Region":
        """Returns a vertical strip: every row of the columns `start` to `stop` (half-open)."""
        return cls.rectangle(shape, (0, shape[0]), (start, stop), name)

    @classmethod
    @checked(RegionError, but=("start", "stop"))
    def row_band(
        cls, shape: tuple[int, int], start: int, stop: int, name: str = "strip"
    ) -> "Region":
        """Returns a horizontal strip: every column of the rows `start` to `stop` (half-open)."""
        return cls.rectangle(shape, (start, stop), (0, shape[1]), name)

    @classmethod
    @checked(RegionError)
    def everything(cls, shape: tuple[int, int], name: str = "image") -> "Region":
        """Returns all cells of the grid."""
        return cls.rectangle(shape, (0, shape[0]), (0, shape[1]), name)

    @checked(RegionError)
    def named(self, name: str) -> "Region":
        """Returns the same cells under another name."""
        return Region(self.shape, self.cells, name)

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def __contains__(self, cell: object) -> bool:
        return cell in self.cells

    def __or__(self, other: Any) -> Any:
        """Returns the union: a `Region` for a region, an `AnyOf` for any other place."""
        if isinstance(other, Region):
            return self._combined(other, "|")
        return union(self, other) if isinstance(other, TokenSelector) else NotImplemented

    def __and__(self, other: "Region") -> "Region":
        return self._combined(other, "&")

    def __sub__(self, other: "Region") -> "Region":
        return self._combined(other, "-")

    def __invert__(self) -> "Region":
        return Region.from_mask(~self.mask, f"~{self.name}")

    def __le__(self, other: "Region") -> bool:
        """Returns whether every cell of this region is in the other."""
        return not self - other

    @checked(RegionError)
    def isdisjoint(self, other: "Region") -> bool:
        """Returns whether the two regions share no cell."""
        return not self & other

    @checked(RegionError)
    def ring(self, width: int = 1, name: str | None = None) -> "Region":
        """Returns the cells around the region: those within `width` cells of it (including
        diagonals) that are not in it.  Cells beyond the image's border are left out."""
        if width < 1:
            raise RegionError(f"A ring of width {width} has no cell. Give a width of 1 or more.")
        self.check_not_empty("ring around it")
        steps = range(-width, width + 1)
        near = {(r + dr, c + dc) for r, c in self.cells for dr in steps for dc in steps}
        rows, cols = self.shape
        inside = tuple((r, c) for r, c in near if 0 <= r < rows and 0 <= c < cols)
        ring = Region(self.shape, inside) - self
        return ring.named(name or f"ring({self.name}, {width})")

    @checked(RegionError)
    def shifted(self, rows: int = 0, cols: int = 0) -> "Region":
        """Returns the region moved down by `rows` and right by `cols`.

        Raises `RegionError` when a moved cell is outside the grid.
        """
        return Region(self.shape, tuple((r + rows, c + cols) for r, c in self.cells), self.name)

    @property
    def mask(self) -> Bool[np.ndarray, "row col"]:
        """The region as a boolean array `[row, col]`."""
        mask = np.zeros(self.shape, dtype=bool)
        if self.cells:
            mask[tuple(np.array(self.cells).T)] = True
        return mask

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """Flat raster indices `row * cols + col`; they index the projector's output
        `[image, token, d_model]`.  Raises `RegionError` when the region is empty."""
        self.check_not_empty("visual token of it")
        return torch.tensor([r * self.shape[1] + c for r, c in self.cells])

    @checked(RegionError, but=("where",))
    def positions(self, where: ImageCells | PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions of the cells in the language model's input, in raster order.

        `where` is the image's `TokenGrid`, or a prompt with exactly one image (for several
        images use `region.of_image(1)`).  Raises `RegionError` for an empty region and for a
        grid of another shape.
        """
        grid = self._only_image(where) if isinstance(where, PromptRow) else where
        self._check_fits(grid)
        return grid.positions.flatten()[self.tokens.to(grid.positions.device)].long()

    @checked(RegionError, but=("grid",))
    def patches_by_cell(self, grid: ImageCells) -> Int[Tensor, "cell patch"]:
        """Returns the vision encoder's token indices of each cell's patches.

        Cells are in raster order, and so are the patches within each cell.  Indices count the
        encoder tokens before the patches (such as a CLS token).

        Raises `RegionError` as `positions` does, and `GridError` when the patch grid is not a
        multiple of the token grid: patches then do not belong to single cells.
        """
        self._check_fits(grid)
        self.check_not_empty("patch of it")
        # Tiles: each cell's patches were measured and are looked up.
        if grid.patches is not None:
            return self._measured_patches(grid.patches)
        # One image: each cell is a block of `tall` x `wide` patches.
        tall, odd_rows = divmod(grid.patch_rows, grid.rows)
        wide, odd_cols = divmod(grid.patch_cols, grid.cols)
        if odd_rows or odd_cols or not tall or not wide:
            raise GridError(
                f"The patch grid {grid.patch_rows}x{grid.patch_cols} is not a multiple of the "
                f"token grid {grid.rows}x{grid.cols}, so its patches do not belong to single "
                "cells. Use a site of the language model or the projector instead."
            )
        row, col = torch.tensor(self.cells).T[:, :, None, None]
        patch_row = row * tall + torch.arange(tall)[:, None]
        patch_col = col * wide + torch.arange(wide)
        return (grid.n_prefix + patch_row * grid.patch_cols + patch_col).flatten(1)

    def _measured_patches(self, patches: Int[Tensor, "row col k 2"]) -> Int[Tensor, "cell k"]:
        row, col = torch.tensor(self.cells).T
        image, index = patches[row, col].unbind(-1)
        if len(image.unique()) > 1:
            raise GridError(
                f"{self.name!r} lies in {len(image.unique())} tiles, which the vision encoder sees "
                "as separate images, so its patches have no indices within one image. Give the "
                "region itself to an intervention at a vision site, or read grid.patches, which "
                "lists each cell's (tile, token) pairs."
            )
        return index

    @checked(RegionError, but=("grid",))
    def patches(self, grid: ImageCells) -> Int[Tensor, " patch"]:
        """Returns the vision encoder's token indices of all patches of the region, in raster
        order of patches.  Raises what `patches_by_cell` raises."""
        return self.patches_by_cell(grid).flatten().sort().values

    @checked(RegionError)
    def of_image(self, image: int) -> InImage:
        """Returns this region in image number `image` of prompts with several images."""
        return InImage(self, image)

    def check_not_empty(self, use: str) -> None:
        """Raises `RegionError` when the region has no cell; `use` names the missing item."""
        if not self.cells:
            raise RegionError(
                f"{self.name!r} has no cells, so there is no {use}. Check the regions it was made "
                "from."
            )

    @checked(RegionError)
    def check_same_grid(self, other: "Region") -> None:
        """Raises `RegionError` when the two regions are on grids of different shapes."""
        if self.shape != other.shape:
            raise RegionError(
                f"{self.name!r} is on a grid of {self.shape[0]}x{self.shape[1]} cells and "
                f"{other.name!r} on one of {other.shape[0]}x{other.shape[1]}. Combine regions of "
                "one grid."
            )

    def sketch(self) -> str:
        """Returns the grid as text, one line per row: `#` inside the region, `-` outside.

        >>> print(Region.rectangle((3, 4), rows=(1, 3), cols=(0, 2)).sketch())
        ----
        ##--
        ##--
        """
        return "\n".join("".join("#" if on else "-" for on in row) for row in self.mask)

    def __repr__(self) -> str:
        return f"Region({self.name!r}, {self._extent()})"

    def __str__(self) -> str:
        return f"{self.name} ({self._extent()})"

    def _repr_html_(self) -> str:
        return html_block(repr(self), html_cells(self.mask))

    def _extent(self) -> str:
        count = f"{len(self)} of {self.shape[0]}x{self.shape[1]} cells"
        if not self.cells:
            return count
        rows, cols = zip(*self.cells, strict=True)
        ranges = f"rows {min(rows)}-{max(rows)}, columns {min(cols)}-{max(cols)}"
        box = (max(rows) - min(rows) + 1) * (max(cols) - min(cols) + 1)
        return f"{count}: {ranges}" if box == len(self) else f"{count}, within {ranges}"

    def _combined(self, other: Any, sign: str) -> Any:
        if not isinstance(other, Region):
            return NotImplemented
        self.check_same_grid(other)
        # numpy has no minus for boolean arrays: a - b is a & ~b.
        a, b = self.mask, other.mask
        mask = a | b if sign == "|" else a & (b if sign == "&" else ~b)
        return Region.from_mask(mask, f"({self.name} {sign} {other.name})")

    def _only_image(self, row: PromptRow) -> ImageCells:
        if not row.grids:
            raise RegionError(
                f"{self.name!r} is a region of an image, and this prompt has 0 images whose tokens "
                "form a grid. Give an image, or use LastToken(), Positions((…)) or Span('…')."
            )
        if len(row.grids) != 1:
            raise RegionError(
                f"{self.name!r} is a region of one image, and this prompt has {len(row.grids)}. "
                "Name the image: region.of_image(0)."
            )
        return row.grids[0]

    def _check_fits(self, grid: ImageCells) -> None:
        if not hasattr(grid, "rows") or not hasattr(grid, "patch_rows"):
            raise RegionError(
                f"{self.name!r} was placed on {shown(grid)}; expected the TokenGrid of an image, "
                "such as inputs.grid."
            )
        if self.shape != (grid.rows, grid.cols):
            raise RegionError(
                f"{self.name!r} is on a grid of {self.shape[0]}x{self.shape[1]} cells, and this "
                f"image has {grid.rows}x{grid.cols} visual tokens. Make the region from this "
                "image's grid."
            )


def union_of(regions: Iterable[Region], name: str | None = None) -> Region:
    """Returns the union of one or more regions of one grid."""
    regions = list(regions)
    if not regions:
        raise RegionError("A union of no regions has no grid. Give at least one region.")
    whole = regions[0]
    for region in regions[1:]:
        whole = whole | region
    return whole.named(name) if name else whole


def _require_whole(*pairs: Any) -> None:
    """Raises `RegionError` for anything but pairs of whole numbers."""
    for pair in pairs:
        try:
            _, _ = map(operator.index, pair)
            is_whole = is_sequence(pair) and not any(isinstance(n, bool) for n in pair)
        except (TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise RegionError(
                f"A region was given {shown(pair)}; expected two whole numbers: (rows, "
                "columns) of the grid, or (start, stop) of a range."
            )
