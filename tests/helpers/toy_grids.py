"""Token grids and hypothesis strategies that the tests of grids and regions share."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region


def make_grid(
    rows: int = 12,
    cols: int = 12,
    cell_px: int = 28,
    patches: int = 2,
    first: int = 4,
    gap: int = 0,
    **changed: Any,
) -> TokenGrid:
    """Returns a grid of square cells over an image that was not resized, from position `first`
    on, with `gap` other tokens after each row and `patches` x `patches` patches to a cell."""
    row, col = torch.arange(rows)[:, None], torch.arange(cols)
    size = (cols * cell_px, rows * cell_px)
    fields: dict[str, Any] = {
        "positions": first + row * (cols + gap) + col,
        "patch_rows": rows * patches,
        "patch_cols": cols * patches,
        "n_prefix": 0,
        "image_size": size,
        "scale": (1.0, 1.0),
        "offset": (0.0, 0.0),
        "processed_size": size,
    }
    return TokenGrid(**{**fields, **changed})


SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def masks_of(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    n_cells = shape[0] * shape[1]
    bits = st.lists(st.booleans(), min_size=n_cells, max_size=n_cells)
    return bits.map(lambda values: np.array(values).reshape(shape))


@st.composite
def masks_of_one_grid(draw: st.DrawFn, count: int, min_cells: int = 0) -> list[np.ndarray]:
    """Draws masks of one shape; `regions` makes them regions.

    Not drawn as regions, because beartype, which checks them, draws from `random`, and
    hypothesis forbids that inside a strategy.
    """
    masks = masks_of(draw(SHAPES)).filter(lambda mask: int(mask.sum()) >= min_cells)
    return [draw(masks) for _ in range(count)]


def regions(masks: list[np.ndarray]) -> list[Region]:
    return [Region.from_mask(mask, f"r{i}") for i, mask in enumerate(masks)]


def cell_of_patch(grid: TokenGrid, patch: int) -> tuple[int, int]:
    """Returns the cell over an encoder token, prefix counted: `Region.patches` back."""
    row, col = divmod(patch - grid.n_prefix, grid.patch_cols)
    return row * grid.rows // grid.patch_rows, col * grid.cols // grid.patch_cols


@st.composite
def resized_grids(draw: st.DrawFn) -> TokenGrid:
    """Draws grids over images of any size that were resized, then cropped or padded."""
    rows, cols = draw(SHAPES)
    processed = (cols * draw(st.integers(1, 30)), rows * draw(st.integers(1, 30)))
    image_size, scale, offset = [], [], []
    for axis in range(2):
        resized = draw(st.integers(max(1, processed[axis] // 2), processed[axis] * 2))
        original = draw(st.integers(1, 300))
        image_size.append(original)
        scale.append(resized / original)
        offset.append(float((resized - processed[axis]) // 2))
    return make_grid(
        rows,
        cols,
        first=draw(st.integers(0, 50)),
        gap=draw(st.integers(0, 2)),
        patches=draw(st.integers(1, 3)),
        n_prefix=draw(st.integers(0, 2)),
        image_size=tuple(image_size),
        scale=tuple(scale),
        offset=tuple(offset),
        processed_size=processed,
    )


def visible_cells(grid: TokenGrid) -> list[tuple[int, int]]:
    """Returns the cells that show some of the image."""
    x, y = (np.diff(edges) > 1e-3 for edges in grid.edges)
    return [(int(r), int(c)) for r in np.flatnonzero(y) for c in np.flatnonzero(x)]
