"""Measures grids of visual tokens, for any processor, tiling and order.

`pixel_routing` measures which position of the prompt each element of the pixel tensor reaches.
The place of such an element in the *image* is measured with the processor.  An image whose
grey level rises from left to right is resized, cropped, padded and tiled like any other, so
the value of each element gives the x coordinate it came from.  A second image gives the y
coordinate.  A black and a white image undo the normalisation and mark padding.

Together they give the rectangle of the image that each visual token shows.  Tokens of one
scale form a view: the tiles form one grid, and a thumbnail forms another.  Tokens that do not
form a complete grid raise `GridError`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hooked_vlm.errors import GridError
from hooked_vlm.hooks.names import PROJECTOR, VISION
from hooked_vlm.inputs.pixel_routing import SEVERAL, Routes
from hooked_vlm.regions.grid import EncoderRows, TokenGrid


Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class View:
    """One grid of visual tokens over an image: the tiles together, or the thumbnail."""

    tokens: Int[np.ndarray, "row col"]
    """For each cell the number of its token in the prompt, counted from the image's first."""
    scale: tuple[float, float]
    offset: tuple[float, float]
    processed_size: Size
    patches: EncoderRows | None
    rows: EncoderRows | None


@dataclass(frozen=True, eq=False)
class Template:
    """The layout of the tokens of an image of one size, at any position in a prompt."""

    n_tokens: int
    """Number of image tokens, including separators with the same id."""
    views: tuple[View, ...]
    """The views, from the finest to the coarsest."""
    n_encoder_images: int
    """Number of images (tiles) that the encoder makes of it."""


def ramp_images(size: Size) -> list[Image.Image]:
    """Returns four images of (width, height): black, white, rising to the right, rising down."""
    width, height = size
    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    levels = [np.zeros((height, width)), np.ones((height, width)), x, y]
    return [Image.fromarray(np.uint8(np.round(level * 255))).convert("RGB") for level in levels]


def places_of(
    process: Callable[[Image.Image], Tensor], size: Size
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Returns the x and y (in pixels of the image) that each element of the pixel tensor shows.

    NaN marks padding, whose value does not depend on the image.  `process` returns the pixel
    tensor of an image.
    """
    black, white, right, down = (
        process(image).double().cpu().numpy() for image in ramp_images(size)
    )
    span = white - black
    known = np.abs(span) > 1e-6 * max(np.abs(span).max(), 1e-12)
    places = []
    for ramp, length in ((right, size[0]), (down, size[1])):
        part = np.divide(ramp - black, span, out=np.full_like(span, np.nan), where=known)
        places.append(part * length)
    return places[0], places[1]


def make_template(
    routes: Routes,
    places: tuple[np.ndarray, np.ndarray],
    size: Size,
    image_tokens: Int[Tensor, " token"],
    cell_px: Callable[[int], int],
) -> Template:
    """Returns the template of an image that is the only one in a prompt.

    `image_tokens` are the positions of the image token in that prompt; `cell_px` returns the
    side in processed pixels of a token made of a given number of encoder patches.

    Raises `GridError` when a token shows several places of the image, or when the places do
    not form a grid.
    """
    positions = routes.pixels.cpu().numpy()
    if (positions == SEVERAL).any():
        raise GridError(
            "Its visual tokens have no place in the image: each depends on several parts of the "
            "image (a resampler, a Q-former, or overlapping convolutions). Use token positions "
            "instead of regions."
        )
    index_of = {int(p): k for k, p in enumerate(image_tokens.tolist())}
    cells = _cells(positions, places, index_of)
    if not cells:
        raise GridError(
            "No image token of the prompt depends on a pixel of the image. Use sites of the vision "
            "encoder."
        )
    patches = _encoder_rows(routes, f"{VISION}.blocks.0.hook_resid_pre", index_of)
    rows = _encoder_rows(routes, f"{PROJECTOR}.hook_out", index_of)
    views = [_view(group, size, patches, rows, cell_px) for group in _split_by_scale(cells)]
    n_encoder = len(next(iter(routes.rows.values()), [None]))
    return Template(len(index_of), tuple(views), n_encoder)


@dataclass(frozen=True)
class _Cell:
    """One visual token: its number, and the centre and size of what it shows, in pixels."""

    token: int
    x: float
    y: float
    width: float
    height: float


def _cells(
    positions: np.ndarray, places: tuple[np.ndarray, np.ndarray], index_of: dict[int, int]
) -> list[_Cell]:
    # Group the pixel elements by the position that they reach.
    flat = positions.ravel()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], sorted(index_of))
    stops = np.searchsorted(flat[order], sorted(index_of), side="right")
    x, y = (place.ravel() for place in places)
    cells = []
    for position, start, stop in zip(sorted(index_of), starts, stops, strict=True):
        elements = order[start:stop]
        seen = elements[np.isfinite(x[elements])]
        if not len(elements):
            continue  # a separator, which no pixel reaches
        if len(seen) < len(elements):
            raise GridError(
                "The processor padded this image into its tiles, and the places of padded tokens "
                "cannot be measured. Give an image that fills its tiles (with sides that are "
                "multiples of the model's tile)."
            )
        # The spread of the places, plus one step for the width of a pixel, is the cell's size.
        boxes = []
        for place in (x, y):
            values = np.unique(np.round(place[seen], 6))
            steps = max(len(values) - 1, 1)
            spread = values[-1] - values[0]
            if spread == 0:
                raise GridError(
                    "The image is so small that a whole visual token shows one of its pixels, so "
                    "the places of tokens cannot be measured. Give a larger image."
                )
            boxes.append((values.mean(), spread * (steps + 1) / steps))
        cells.append(_Cell(index_of[position], boxes[0][0], boxes[1][0], boxes[0][1], boxes[1][1]))
    return cells


def _split_by_scale(cells: Sequence[_Cell]) -> list[list[_Cell]]:
    """Returns the cells of each view, the finest first."""
    by_width = sorted(cells, key=lambda cell: cell.width * cell.height)
    areas = np.array([cell.width * cell.height for cell in by_width])
    jumps = np.flatnonzero(areas[1:] / areas[:-1] > 1.5) + 1
    groups = [by_width[a:b] for a, b in zip([0, *jumps], [*jumps, len(areas)], strict=True)]
    return [part for group in groups for part in _split_repeats(group)]


def _split_repeats(cells: Sequence[_Cell]) -> list[list[_Cell]]:
    """Returns one view, or several where several tokens show the same place."""
    views: list[list[_Cell]] = []
    taken: list[set[tuple[int, int]]] = []
    width, height = (np.median([getattr(c, side) for c in cells]) for side in ("width", "height"))
    for cell in sorted(cells, key=lambda cell: cell.token):
        place = round(cell.x / width * 2), round(cell.y / height * 2)
        for view, places in zip(views, taken, strict=True):
            if place not in places:
                view.append(cell)
                places.add(place)
                break
        else:
            views.append([cell])
            taken.append({place})
    return views


def _view(
    cells: Sequence[_Cell],
    size: Size,
    patches: dict[int, list[tuple[int, int]]],
    rows: dict[int, list[tuple[int, int]]],
    cell_px: Callable[[int], int],
) -> View:
    # Sort the cells into rows and columns by their centres.
    x, x_index = _lattice([cell.x for cell in cells], [cell.width for cell in cells])
    y, y_index = _lattice([cell.y for cell in cells], [cell.height for cell in cells])
    n_rows, n_cols = len(y), len(x)
    tokens = np.full((n_rows, n_cols), -1)
    for cell, row, col in zip(cells, y_index, x_index, strict=True):
        tokens[row, col] = cell.token
    if len(cells) != tokens.size or (tokens < 0).any():
        raise GridError(
            f"Its {len(cells)} visual tokens of one scale make no grid: their centres lie in "
            f"{n_rows} rows and {n_cols} columns, which need {n_rows * n_cols} tokens. Use token "
            "positions instead of regions."
        )
    # The affine map from image pixels to the pixels of the view.
    counts = {len(patches.get(int(t), ())) for t in tokens.ravel()}
    px = cell_px(counts.pop() if len(counts) == 1 else 1)
    scale, offset = [], []
    widths, heights = ([getattr(cell, side) for cell in cells] for side in ("width", "height"))
    for centres, sides, length in ((x, widths, size[0]), (y, heights, size[1])):
        start, step = _edges(centres, float(np.median(sides)), length)
        scale.append(px / step)
        offset.append(start * px / step)
    return View(
        tokens=tokens,
        scale=(scale[0], scale[1]),
        offset=(offset[0], offset[1]),
        processed_size=(n_cols * px, n_rows * px),
        patches=_by_cell(tokens, patches),
        rows=_by_cell(tokens, rows),
    )


def _lattice(centres: Sequence[float], sizes: Sequence[float]) -> tuple[np.ndarray, list[int]]:
    """Returns the distinct centres along an axis, and for each cell the index of its centre."""
    step = float(np.median(sizes))
    order = np.argsort(centres)
    ordered = np.array(centres)[order]
    group = np.concatenate([[0], np.cumsum(np.diff(ordered) > step / 2)])
    index = np.empty(len(order), dtype=int)
    index[order] = group
    means = np.array([ordered[group == g].mean() for g in range(group[-1] + 1)])
    return means, index.tolist()


def _edges(centres: np.ndarray, side: float, length: int) -> tuple[float, float]:
    """Returns the start of the first cell and the length of a cell, in image pixels.

    For a single cell the length is its own `side`.  There are 256 grey levels, so places on a
    long axis are exact only to a pixel or two.  Cells that end at the image's borders within
    that tolerance are aligned with the borders.
    """
    n = len(centres)
    step, first = np.polyfit(np.arange(n), centres, 1) if n > 1 else (side, centres[0])
    start = first - step / 2
    slack = 2.5 * length / 255 + step / 8
    if abs(start) < slack and abs(start + n * step - length) < slack:
        return 0.0, length / n
    return float(start), float(step)


def _encoder_rows(
    routes: Routes, site: str, index_of: dict[int, int]
) -> dict[int, list[tuple[int, int]]]:
    """Returns for each token of the prompt the (image, row) pairs of a site that reach it."""
    found: dict[int, list[tuple[int, int]]] = {}
    for image, positions in enumerate(routes.rows.get(site, [])):
        for row, position in enumerate(positions.tolist()):
            if position in index_of:
                found.setdefault(index_of[position], []).append((image, row))
    return found


def _by_cell(tokens: np.ndarray, rows: dict[int, list[tuple[int, int]]]) -> EncoderRows | None:
    """Returns `[row, col, k, 2]` of (image, row), or None where cells have different numbers."""
    by_cell = [[rows.get(int(t), []) for t in line] for line in tokens]
    counts = {len(pairs) for line in by_cell for pairs in line}
    if len(counts) != 1 or counts == {0}:
        return None
    return torch.tensor(by_cell)


def shows_what_it_says(grid: TokenGrid, pixels_of: Callable[[Image.Image], Tensor]) -> bool:
    """Whether a processor's pixels agree with a grid's scale and offset.

    `pixels_of` returns the pixels `[1, 3, height, width]` of one image.
    """
    for axis, place in enumerate(places_of(pixels_of, grid.image_size)):
        along = np.ma.masked_invalid(place[0, 0]).mean(axis=axis)  # x by column, y by row
        seen = np.ma.filled(along, np.nan)
        given = (np.arange(len(seen)) + 0.5 + grid.offset[axis]) / grid.scale[axis]
        known = np.isfinite(seen) & (given > 0) & (given < grid.image_size[axis])
        slack = 4 * grid.image_size[axis] / 255 + 1 / grid.scale[axis]
        if known.any() and np.abs(seen - given)[known].max() > slack:
            return False
    return True
