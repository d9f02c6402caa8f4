"""Maps between an image's pixels, visual tokens, encoder patches and prompt positions.

A `TokenGrid` is one image's rectangle of visual tokens ("cells").  It holds the position
of every cell in the language model's input, the vision encoder's patch grid under the
cells, and the affine map from the pixels of the given image to the pixels that the
encoder sees.  It makes `Region`s from pixels; a region indexes any activation.

Boxes and masks are in pixels of the given image: x to the right, y down, half-open
`(x0, y0, x1, y1)`, as in PIL.  A named rule decides about partly covered cells: "any" (some
of the cell is covered), "center" (the cell's centre is covered), or a fraction (at least
that part of the cell's area is covered).  Area and centre refer to the part of the image
that the cell shows; padding that the processor added does not count.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.displayed import html_block, html_cells
from hooked_vlm.arguments.kinds import Count, Finite, Whole
from hooked_vlm.errors import (
    GridError,
    HookedVLMWarning,
    RegionError,
    callers_level,
    counted,
    did_you_mean,
)
from hooked_vlm.regions.coverage import TOLERANCE_PX, Box, Coverage, Px, box_coverage, mask_coverage
from hooked_vlm.regions.region import Cell, Region, union_of


EncoderRows = Int[Tensor, "row col _ 2"]
"""For each cell, the (image, row) pairs that it consists of at a site of the encoder or
projector.  Images are the encoder's tiles, counted from the first tile of this image."""


@checked(GridError)
@dataclass(frozen=True, eq=False)
class TokenGrid:
    """One image's visual tokens: their prompt positions, encoder patches and pixels.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> grid = model.prepare(Image.new("RGB", (96, 64)), "What is this?").grid
    >>> print(grid)
    4x6 visual tokens of 16x16 px, 8x12 patches, image 96x64
    >>> grid.at(x=50, y=20), grid.cell_box((1, 3))
    ((1, 3), (48.0, 16.0, 64.0, 32.0))
    >>> grid.box(0, 0, 32, 32, name="corner")
    Region('corner', 4 of 4x6 cells: rows 0-1, columns 0-1)
    """

    positions: Int[Tensor, "row col"]
    """Positions in the prompt's row of `input_ids`, including padding; on the CPU."""
    patch_rows: Count
    patch_cols: Count
    n_prefix: Whole
    """Number of encoder tokens before the patches (such as a CLS token)."""
    image_size: tuple[Count, Count]
    """(width, height) in pixels of the given image."""
    scale: tuple[Finite, Finite]
    offset: tuple[Finite, Finite]
    """`processed_px = original_px * scale - offset`, each (x, y)."""
    processed_size: tuple[Count, Count]
    """(width, height) in pixels of the image that the encoder sees."""
    prompt: Whole = 0
    """Row of the batch."""
    image: Whole = 0
    """Index among all images of the batch, in the encoder's order; of the first tile, if the
    image was cut into tiles."""
    patches: EncoderRows | None = None
    """The encoder's rows of each cell, counting class tokens; None: one image in raster order."""
    projected: EncoderRows | None = None
    """The projector's rows of each cell; None: one image in raster order."""
    overview: "TokenGrid | None" = None
    """Grid of the thumbnail of an image cut into tiles: the same picture, coarser cells."""

    def __post_init__(self) -> None:
        # Places are found on the CPU: on a GPU each step of it would wait for the device.
        object.__setattr__(self, "positions", self.positions.cpu())
        flat = self.positions.flatten()
        if self.positions.ndim != 2 or not flat.numel():
            raise GridError(
                f"Positions of shape {tuple(self.positions.shape)} are not a grid. Give a "
                "non-empty tensor [row, col]."
            )
        ascending = bool((flat.diff() > 0).all())
        # Tiles follow each other in the prompt, so a row of the whole image is not contiguous.
        if self.patches is not None:
            ascending = len(flat.unique()) == len(flat)
        if flat.min() < 0 or not ascending:
            raise GridError(
                f"Positions do not ascend in raster order: the first row given is "
                f"{self.positions[0].tolist()}. Expected the prompt positions of the visual "
                "tokens, which must be >= 0 and ascend in raster order, row by row."
            )
        if min(self.scale) <= 0:
            raise GridError(f"Scale (x, y) is {self.scale}; both numbers must be positive.")

    @property
    def rows(self) -> int:
        return self.positions.shape[0]

    @property
    def cols(self) -> int:
        return self.positions.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of visual tokens."""
        return self.rows, self.cols

    def __len__(self) -> int:
        return self.rows * self.cols

    @property
    def cell_size(self) -> tuple[float, float]:
        """(width, height) of one cell, in pixels of the given image."""
        return (
            self.processed_size[0] / self.cols / self.scale[0],
            self.processed_size[1] / self.rows / self.scale[1],
        )

    @property
    def is_resized(self) -> bool:
        """Whether the encoder sees a resized, padded or cropped copy of the given image."""
        return self.processed_size != self.image_size or self.scale != (1.0, 1.0)

    @property
    def is_separated(self) -> bool:
        """Whether other tokens, such as row separators, stand between all rows of cells."""
        gaps = self.positions[1:, 0] - self.positions[:-1, -1]
        return bool(len(gaps)) and bool((gaps > 1).all())

    @property
    def shows_everything(self) -> bool:
        """Whether no part of the image was cropped away."""
        return self.visible_box == (0.0, 0.0, *map(float, self.image_size))

    @property
    def visible_box(self) -> Box:
        """The part of the given image that the cells show: the whole image unless cropped."""
        x, y = self.edges
        return float(x[0]), float(y[0]), float(x[-1]), float(y[-1])

    @checked(RegionError)
    def cell_box(self, cell: Cell) -> Box:
        """Returns the cell's box `(x0, y0, x1, y1)` in the given image, clipped to the image.

        Raises `RegionError` for a cell outside the grid and `GridError` for a cell that shows
        only padding.
        """
        ((row, col),) = self.cells([cell]).cells
        x, y = self.edges
        box = float(x[col]), float(y[row]), float(x[col + 1]), float(y[row + 1])
        if box[0] >= box[2] or box[1] >= box[3]:
            raise GridError(
                f"Cell {cell} shows only padding that the image processor added, so it has no "
                f"box in the image of {_px(self.image_size)}. Use cells that show the image."
            )
        return box

    @checked(RegionError)
    def at(self, x: Px, y: Px) -> Cell:
        """Returns the cell that shows the point `(x, y)` of the given image.

        Raises `RegionError` for a point outside the image or in a cropped part.
        """
        if not (0 <= x < self.image_size[0] and 0 <= y < self.image_size[1]):
            raise RegionError(
                f"The point ({x}, {y}) is outside the image of {_px(self.image_size)}. Give x and "
                "y in pixels of that image."
            )
        x_edges, y_edges = self.edges
        col = int(np.searchsorted(x_edges, x, side="right")) - 1
        row = int(np.searchsorted(y_edges, y, side="right")) - 1
        if not (0 <= row < self.rows and 0 <= col < self.cols):
            raise RegionError(
                f"The point ({x}, {y}) was cropped away by the image processor: the cells show "
                f"{_ranges(self.visible_box)} of the image."
            )
        return row, col

    @checked(RegionError)
    def cells(self, cells: Iterable[Cell], name: str = "cells") -> Region:
        """Returns a region of explicit cells `(row, col)`."""
        return Region(self.shape, tuple(cells), name)

    @checked(RegionError, but=("start", "stop"))
    def strip(self, orientation: str, start: int, stop: int, name: str | None = None) -> Region:
        """Returns a strip across the whole image: the token range `start` to `stop` (half-open).

        A "vertical" strip has every row of those columns (protocol 2.1, left and right); a
        "horizontal" strip has every column of those rows.
        """
        make = {"vertical": Region.column_band, "horizontal": Region.row_band}
        if orientation not in make:
            raise RegionError(
                f"A strip is 'vertical' or 'horizontal', not {orientation!r}."
                f"{did_you_mean(orientation, make)}"
            )
        return make[orientation](self.shape, start, stop, name or f"{orientation} strip")

    @checked(RegionError)
    def all(self, name: str = "image") -> Region:
        """Returns every cell of the grid."""
        return Region.everything(self.shape, name)

    @checked(RegionError)
    def background(self, *regions: Region, name: str = "background") -> Region:
        """Returns every cell that is in none of the regions; the result may be empty."""
        return (~union_of(regions)).named(name) if regions else self.all(name)

    @checked(RegionError)
    def box(
        self,
        x0: Px,
        y0: Px,
        x1: Px,
        y1: Px,
        rule: str | Px = "any",
        name: str = "box",
    ) -> Region:
        """Returns the cells that a pixel box of the given image covers, by `rule`.

        Raises `RegionError` for a box that is empty, reaches outside the image, lies in a
        cropped part, or covers no cell by this rule.
        """
        width, height = self.image_size
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise RegionError(
                f"Box {_ranges((x0, y0, x1, y1))} is empty or reaches outside the image of "
                f"{_px(self.image_size)}. Give (x0, y0, x1, y1) in pixels of that image, with "
                "x0 < x1 and y0 < y1."
            )
        return self._select(box_coverage(*self.edges, (x0, y0, x1, y1)), rule, name)

    @checked(RegionError)
    def mask(
        self,
        mask: Shaped[np.ndarray, "height width"] | Shaped[Tensor, "height width"],
        rule: str | Px = "any",
        name: str = "mask",
    ) -> Region:
        """Returns the cells that a boolean mask of the given image covers, by `rule`.

        Raises `GridError` when the mask is not boolean or does not have the image's size, and
        `RegionError` when the mask covers no cell by this rule.
        """
        pixels = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
        width, height = self.image_size
        if pixels.shape != (height, width) or pixels.dtype != np.bool_:
            raise GridError(
                f"The mask is {pixels.dtype} of shape {pixels.shape}; the image of "
                f"{_px(self.image_size)} needs bool of shape {(height, width)} (height, width). "
                "Threshold or resize it first."
            )
        return self._select(mask_coverage(*self.edges, pixels), rule, name)

    def projected_tokens(self) -> Int[Tensor, " token"]:
        """Returns the projector's row of each cell, cells in raster order.

        Raises `GridError` for an image in tiles, and where a cell has several rows.
        """
        if self.projected is None:
            return torch.arange(self.rows * self.cols)
        if self.projected.shape[2] != 1 or bool(self.projected[..., 0].any()):
            raise GridError(
                "The projector's rows of this image are not one for each cell of one image: it "
                "is seen in tiles, or a cell has several rows. grid.projected lists each cell's "
                "(tile, row) pairs."
            )
        return self.projected[..., 0, 1].flatten()

    @checked(RegionError)
    def cell_of_patch(self, patch: int) -> Cell:
        """Returns the cell that contains an encoder token: the inverse of `Region.patches`.

        `patch` counts the `n_prefix` tokens before the patches.
        """
        if self.patches is not None:
            found = (self.patches[..., 1] == patch).any(-1) & (self.patches[..., 0] == 0).any(-1)
            if found.sum() == 1:
                row, col = found.nonzero()[0].tolist()
                return row, col
            raise GridError(
                f"Encoder token {patch} belongs to {counted(int(found.sum()), 'cell')} of this "
                "image, not to exactly one: the encoder sees the image in tiles. grid.patches "
                "lists each cell's (tile, token) pairs."
            )
        index = patch - self.n_prefix
        if not 0 <= index < self.patch_rows * self.patch_cols:
            raise GridError(
                f"Encoder token {patch} is no patch: patches are {self.n_prefix} to "
                f"{self.n_prefix + self.patch_rows * self.patch_cols - 1}."
            )
        row, col = divmod(index, self.patch_cols)
        return row * self.rows // self.patch_rows, col * self.cols // self.patch_cols

    @checked(RegionError)
    def cell_of_position(self, position: int) -> Cell:
        """Returns the cell at a position of the prompt: the inverse of `Region.positions`."""
        found = (self.positions == position).nonzero()
        if not len(found):
            raise GridError(
                f"Position {position} holds no visual token of this image; its visual tokens lie "
                f"between {int(self.positions[0, 0])} and {int(self.positions[-1, -1])}."
            )
        return int(found[0, 0]), int(found[0, 1])

    def describe(self) -> str:
        """Returns the sizes in one line, those of cells in pixels of the given image."""
        (width, height), (w, h) = self.cell_size, self.image_size
        resized = f", seen as {_px(self.processed_size)}" if self.is_resized else ""
        return (
            f"{self.rows}x{self.cols} visual tokens of {width:.4g}x{height:.4g} px, "
            f"{self.patch_rows}x{self.patch_cols} patches, image {w}x{h}{resized}"
        )

    __str__ = describe

    def __repr__(self) -> str:
        return f"TokenGrid({self.describe()}, from position {int(self.positions.min())})"

    def _repr_html_(self) -> str:
        return html_block(repr(self), html_cells(np.zeros(self.shape, bool), self.image_size))

    @property
    def edges(self) -> tuple[Float[np.ndarray, " edges_x"], Float[np.ndarray, " edges_y"]]:
        """The edges of the columns (x) and of the rows (y) of cells, in pixels of the image."""
        edges = []
        for axis, cells in enumerate((self.cols, self.rows)):
            processed = np.arange(cells + 1) * self.processed_size[axis] / cells
            original = (processed + self.offset[axis]) / self.scale[axis]
            # Rounding errors would make the cell of a point on an edge ambiguous, so quotients
            # within the tolerance of a whole pixel become that pixel.
            whole = original.round()
            original = np.where(np.abs(original - whole) < TOLERANCE_PX, whole, original)
            edges.append(original.clip(0.0, self.image_size[axis]))
        return edges[0], edges[1]

    def _select(self, coverage: Coverage, rule: str | Px, name: str) -> Region:
        """Returns the covered cells; raises `RegionError` with the reason when there are none."""
        region = Region.from_mask(coverage.select(rule), name)
        if region:
            return region
        if coverage.part.any():
            row, col = np.unravel_index(coverage.part.argmax(), coverage.part.shape)
            raise RegionError(
                f"{name!r} covers no cell by rule {rule!r}: the most it covers is "
                f"{coverage.part.max():.0%} of cell ({row}, {col}). Use rule='any' or a lower "
                "fraction."
            )
        raise RegionError(
            f"{name!r} covers no cell. The cells show {_ranges(self.visible_box)} of the image of "
            f"{_px(self.image_size)}; either the marked part was cropped away by the image "
            "processor, or nothing was marked. Mark pixels inside the visible part."
        )


def warn_if_resized(grids: Iterable[TokenGrid]) -> None:
    """Warns with `HookedVLMWarning`, once per size, about images that the processor changed.

    Cells of a changed image are not whole multiples of the encoder's cells in its own pixels.
    The warning names the processed size and the size of a cell in pixels of the given image.
    """
    changed = {(g.image_size, g.processed_size, g.shape): g for g in grids if g.is_resized}
    for grid in changed.values():
        cropped = (
            ""
            if grid.shows_everything
            else (f" It was cropped too: the cells show {_ranges(grid.visible_box)} of it.")
        )
        width, height = grid.cell_size
        warnings.warn(
            f"The image processor changed an image of {_px(grid.image_size)} to "
            f"{_px(grid.processed_size)}: each of the {grid.rows}x{grid.cols} visual "
            f"tokens shows {width:.4g}x{height:.4g} px of your image.{cropped} Regions made by "
            f"its TokenGrid account for this. If objects must fill whole cells, draw the image "
            f"at {_px(grid.processed_size)}.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} px"


def _ranges(box: Box) -> str:
    x0, y0, x1, y1 = box
    return f"x {x0:g} to {x1:g}, y {y0:g} to {y1:g}"
