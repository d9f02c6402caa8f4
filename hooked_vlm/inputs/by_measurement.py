"""Grids that are measured rather than known: for any processor, tiling and order.

`pixel_routing` says which position of the prompt each element of the pixel tensor reaches.  Which
part of the *image* such an element shows, the processor itself can tell: given an image
whose grey level rises from left to right, it resizes, crops, pads and tiles that too, and
leaves in every element the place it came from (a second image tells top from bottom; a
black and a white one undo the normalisation, and show where the processor put padding).

Both together give each visual token its rectangle of the image.  Tokens of one scale make a
view: tiles fit together into one grid, and a thumbnail makes another.  What makes no whole
grid is refused, not guessed.
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
    """Which of the image's tokens in the prompt each cell is, counted from its first."""
    scale: tuple[float, float]
    offset: tuple[float, float]
    processed_size: Size
    patches: EncoderRows | None
    rows: EncoderRows | None


@dataclass(frozen=True, eq=False)
class Template:
    """How an image of one size stands in a prompt, wherever it stands."""

    n_tokens: int
    """Image tokens in all, separators of the same id counted."""
    views: tuple[View, ...]
    """From the finest to the coarsest."""
    n_encoder_images: int
    """How many images (tiles) the encoder sees of it."""


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
    """Returns where in the image each element of the pixel tensor came from: x and y in pixels.

    NaN marks padding, which looks alike whatever the image.  `process` is the image
    processor, down to the tensor that the model takes.
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
    """Returns the template of an image that stands alone in a prompt.

    `image_tokens` are the positions of that prompt that hold the image token; `cell_px` gives
    the side in processed pixels of a token made of that many encoder patches.

    Raises `GridError` when a token shows no single place of the image, or the places make no
    grid.
    """
    positions = routes.pixels.cpu().numpy()
    if (positions == SEVERAL).any():
        raise GridError(
            "Its visual tokens have no place in the image: each depends on several parts of it "
            "(a resampler, a Q-former, or overlapping convolutions), so no grid is made."
        )
    index_of = {int(p): k for k, p in enumerate(image_tokens.tolist())}
    cells = _cells(positions, places, index_of)
    if not cells:
        raise GridError("No image token of the prompt depends on a pixel of the image.")
    patches = _encoder_rows(routes, f"{VISION}.blocks.0.hook_resid_pre", index_of)
    rows = _encoder_rows(routes, f"{PROJECTOR}.hook_out", index_of)
    views = [_view(group, size, patches, rows, cell_px) for group in _split_by_scale(cells)]
    n_encoder = len(next(iter(routes.rows.values()), [None]))
    return Template(len(index_of), tuple(views), n_encoder)


@dataclass(frozen=True)
class _Cell:
    """What one visual token shows: its number, its centre and its size, in image pixels."""

    token: int
    x: float
    y: float
    width: float
    height: float


def _cells(
    positions: np.ndarray, places: tuple[np.ndarray, np.ndarray], index_of: dict[int, int]
) -> list[_Cell]:
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
            continue  # a separator, which shows nothing
        if len(seen) < len(elements):
            raise GridError(
                "The processor padded this image into its tiles, and which of the padded tokens "
                "is where cannot be measured. Give an image that fills its tiles (its shape as a "
                "multiple of the model's tile)."
            )
        boxes = []
        for place in (x, y):
            values = np.unique(np.round(place[seen], 6))
            steps = max(len(values) - 1, 1)
            spread = values[-1] - values[0]
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
    """Returns one view, or several where the same places are shown more than once."""
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
    x, x_index = _lattice([cell.x for cell in cells], [cell.width for cell in cells])
    y, y_index = _lattice([cell.y for cell in cells], [cell.height for cell in cells])
    n_rows, n_cols = len(y), len(x)
    tokens = np.full((n_rows, n_cols), -1)
    for cell, row, col in zip(cells, y_index, x_index, strict=True):
        tokens[row, col] = cell.token
    if len(cells) != tokens.size or (tokens < 0).any():
        raise GridError(
            f"Its {len(cells)} visual tokens of one scale make no grid: their centres lie in "
            f"{n_rows} rows and {n_cols} columns."
        )
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
    """Returns the distinct centres along an axis, and which of them each cell has."""
    step = float(np.median(sizes))
    order = np.argsort(centres)
    ordered = np.array(centres)[order]
    group = np.concatenate([[0], np.cumsum(np.diff(ordered) > step / 2)])
    index = np.empty(len(order), dtype=int)
    index[order] = group
    means = np.array([ordered[group == g].mean() for g in range(group[-1] + 1)])
    return means, index.tolist()


def _edges(centres: np.ndarray, side: float, length: int) -> tuple[float, float]:
    """Returns where the first cell begins and how long a cell is, in image pixels; of one cell
    alone that is its own `side`.

    Grey levels are 256, so a long axis is known to a pixel or two only: cells that end at
    the image's borders within that are taken to end there.
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
    """Returns the (image, row) pairs of a site that each token of the prompt is made of."""
    found: dict[int, list[tuple[int, int]]] = {}
    for image, positions in enumerate(routes.rows.get(site, [])):
        for row, position in enumerate(positions.tolist()):
            if position in index_of:
                found.setdefault(index_of[position], []).append((image, row))
    return found


def _by_cell(tokens: np.ndarray, rows: dict[int, list[tuple[int, int]]]) -> EncoderRows | None:
    """Returns `[row, col, k, 2]` of (image, row), or None where cells differ in how many."""
    by_cell = [[rows.get(int(t), []) for t in line] for line in tokens]
    counts = {len(pairs) for line in by_cell for pairs in line}
    if len(counts) != 1 or counts == {0}:
        return None
    return torch.tensor(by_cell)


def shows_what_it_says(grid: TokenGrid, pixels_of: Callable[[Image.Image], Tensor]) -> bool:
    """Whether pixels that a processor makes come from where a grid's scale and offset say.

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
