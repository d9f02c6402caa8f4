"""Which cells of a grid a box or a mask covers, and by how much.

Cells are given by the edges of their columns and rows in pixels of the image.  Partial
coverage is therefore exact, even where cells are not a whole number of pixels.  A named rule
selects cells: "any" (some of the cell is covered), "center" (the cell's centre is covered),
or a fraction (at least that part of the cell's area is covered).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

from hooked_vlm.errors import RegionError, did_you_mean


# Pixel coordinates may be whole numbers or fractions.
Px = int | float
Box = tuple[Px, Px, Px, Px]

# Cell edges are quotients of pixel counts, so they carry rounding errors.  A box edge within
# this distance of a cell edge counts as lying on it.
TOLERANCE_PX = 1e-6


@dataclass(frozen=True, eq=False)
class Coverage:
    """How much of each cell is covered."""

    part: Float[np.ndarray, "row col"]
    """Covered part of the cell's area, 0 to 1; 0 for a cell without area."""
    center: Bool[np.ndarray, "row col"]
    """Whether the cell's centre is covered."""

    def select(self, rule: str | Px) -> Bool[np.ndarray, "row col"]:
        """Returns the cells that `rule` selects; raises `RegionError` for an unknown rule."""
        if rule == "any":
            return self.part > 0
        if rule == "center":
            return self.center
        if isinstance(rule, str):
            raise RegionError(
                f"No coverage rule {rule!r}. Use 'any', 'center' or a fraction in (0, 1]."
                f"{did_you_mean(rule, ('any', 'center'))}"
            )
        if not 0 < rule <= 1:
            raise RegionError(
                f"Coverage rule {rule} is not a fraction in (0, 1]. To select cells with any "
                "overlap, use 'any'."
            )
        return self.part >= rule - 1e-9  # rounding may give 0.999… for a fully covered cell


def box_coverage(
    x_edges: Float[np.ndarray, " x_edge"],
    y_edges: Float[np.ndarray, " y_edge"],
    box: Box,
) -> Coverage:
    """Returns how much of each cell a box `(x0, y0, x1, y1)` covers."""
    covered, centers = [], []
    # A box is a product of two intervals, so each axis is computed by itself.
    for edges, low, high in ((y_edges, box[1], box[3]), (x_edges, box[0], box[2])):
        covered.append(_overlap(edges, np.array([low]), np.array([high]))[:, 0])
        middle = (edges[:-1] + edges[1:]) / 2
        centers.append((low - TOLERANCE_PX <= middle) & (middle < high - TOLERANCE_PX))
    return _coverage(np.outer(*covered), np.outer(*centers), x_edges, y_edges)


def mask_coverage(
    x_edges: Float[np.ndarray, " x_edge"],
    y_edges: Float[np.ndarray, " y_edge"],
    mask: Bool[np.ndarray, "height width"],
) -> Coverage:
    """Returns how much of each cell the True pixels of a mask cover."""
    # For each axis: the length that each cell shares with each pixel, and each centre's pixel.
    weights, middles = [], []
    for edges, n_pixels in zip((y_edges, x_edges), mask.shape, strict=True):
        pixel = np.arange(n_pixels)
        weights.append(_overlap(edges, pixel, pixel + 1))
        middle = np.floor((edges[:-1] + edges[1:]) / 2).astype(int)
        middles.append(middle.clip(0, n_pixels - 1))
    covered = weights[0] @ mask.astype(np.float64) @ weights[1].T
    return _coverage(covered, mask[np.ix_(*middles)], x_edges, y_edges)


def _overlap(
    edges: Float[np.ndarray, " edge"],
    low: Shaped[np.ndarray, " interval"],
    high: Shaped[np.ndarray, " interval"],
) -> Float[np.ndarray, "cell interval"]:
    """Returns the length that each cell shares with each interval, along one axis."""
    begin = np.maximum(edges[:-1, None], low)
    end = np.minimum(edges[1:, None], high)
    length = end - begin
    return np.where(length > TOLERANCE_PX, length, 0.0)


def _coverage(
    covered: Float[np.ndarray, "row col"],
    center: Bool[np.ndarray, "row col"],
    x_edges: Float[np.ndarray, " x_edge"],
    y_edges: Float[np.ndarray, " y_edge"],
) -> Coverage:
    area = np.outer(np.diff(y_edges), np.diff(x_edges))
    part = np.divide(covered, area, out=np.zeros_like(covered), where=area > 0)
    return Coverage(part, center & (area > 0))
