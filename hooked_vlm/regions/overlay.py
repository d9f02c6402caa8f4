"""Draws regions over the image they belong to.

The picture has the pixels of the given image, and each cell is drawn at its `cell_box`, even
when the processor resized, padded or cropped the image.  A pixel belongs to the cell that
contains the pixel's centre.  Cropped parts are greyed out, since no cell shows them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import GridError, RegionError
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region


# Okabe and Ito's palette: colour-blind readers can distinguish these colours.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
_GRID_LINE = np.array([128, 128, 128])
_CROPPED = np.array([96, 96, 96])
_FONT_PX = 13


@checked(RegionError)
def draw_regions(
    image: Image.Image | UInt8[np.ndarray, "height width rgb"],
    grid: TokenGrid,
    regions: Region | Sequence[Region] | Mapping[str, Region],
    *,
    opacity: float = 0.45,
    labels: bool = True,
    zoom: int = 1,
) -> Image.Image:
    """Returns the image with the grid's lines, the regions in colour, and a legend below.

    `image` is the image the grid was made for.  A mapping gives the regions other names.
    Later regions are drawn over earlier ones.  `zoom` first enlarges every pixel to
    `zoom x zoom`, for small images.  With `labels=False` the result has no legend and exactly
    the (zoomed) image's size.

    Raises `GridError` for an image of another size, and `RegionError` for an empty region, a
    region of another grid, or an opacity outside 0 to 1.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> image = Image.new("RGB", (96, 64), "white")
    >>> grid = model.prepare(image, "What is this?").grid
    >>> draw_regions(image, grid, grid.box(0, 0, 32, 32), labels=False, zoom=2).size
    (192, 128)
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    named = _named(regions)
    _check(picture, grid, named, opacity, zoom)
    # Enlarge the image, and find the cell of each pixel row and column.
    pixels = np.asarray(picture.convert("RGB")).astype(np.float64)
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    rows, cols = _cell_of_pixels(grid, zoom)
    # Grey out what no cell shows, then draw the grid's lines.
    on_grid = (rows >= 0)[:, None] & (cols >= 0)
    pixels[~on_grid] = 0.35 * pixels[~on_grid] + 0.65 * _CROPPED
    lines = _lines(rows, cols) & on_grid
    pixels[lines] = 0.5 * pixels[lines] + 0.5 * _GRID_LINE
    # Tint each region, and draw its outline in full colour.
    for index, region in enumerate(named.values()):
        inside = region.mask[np.ix_(rows, cols)] & on_grid
        color = np.array(_rgb(index))
        pixels[inside] = (1 - opacity) * pixels[inside] + opacity * color
        if opacity:
            pixels[_outline(inside)] = color
    drawn = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return _with_legend(drawn, named) if labels and named else drawn


def _check(
    picture: Image.Image, grid: TokenGrid, regions: Mapping[str, Region], opacity: float, zoom: int
) -> None:
    if picture.size != grid.image_size:
        raise GridError(
            f"The image is {picture.size[0]}x{picture.size[1]} px, and the grid was made for one "
            f"of {grid.image_size[0]}x{grid.image_size[1]} px. Give the image that was prepared."
        )
    if not 0 <= opacity <= 1 or zoom < 1:
        raise RegionError(
            f"opacity={opacity} and zoom={zoom} were given; opacity must be in [0, 1] and zoom "
            "at least 1."
        )
    for region in regions.values():
        region.check_not_empty("cell to draw")
        region.check_same_grid(grid.all())


def _named(regions: Region | Sequence[Region] | Mapping[str, Region]) -> dict[str, Region]:
    if isinstance(regions, Mapping):
        return dict(regions)
    listed = [regions] if isinstance(regions, Region) else list(regions)
    named: dict[str, Region] = {}
    for region in listed:
        name, count = region.name, 1
        while name in named:
            count += 1
            name = f"{region.name} ({count})"
        named[name] = region
    return named


def _cell_of_pixels(
    grid: TokenGrid, zoom: int
) -> tuple[Int[np.ndarray, " height"], Int[np.ndarray, " width"]]:
    """Returns the grid row of each picture row and the grid column of each picture column.

    The value is -1 where no cell shows the pixel.
    """
    found = []
    for axis, edges in ((1, grid.edges[1]), (0, grid.edges[0])):
        centers = (np.arange(grid.image_size[axis] * zoom) + 0.5) / zoom
        cell = np.searchsorted(edges, centers, side="right") - 1
        found.append(np.where(cell < len(edges) - 1, cell, -1))
    return found[0], found[1]


def _lines(
    rows: Int[np.ndarray, " height"], cols: Int[np.ndarray, " width"]
) -> Bool[np.ndarray, "height width"]:
    """Returns the first row and the first column of pixels of every cell."""
    first_row = np.diff(rows, prepend=-2) != 0
    first_col = np.diff(cols, prepend=-2) != 0
    return first_row[:, None] | first_col


def _outline(inside: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Returns the region's own pixels that touch a pixel outside it or the picture's border."""
    padded = np.pad(inside, 1)
    kept = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~kept


def _rgb(index: int) -> tuple[int, ...]:
    return ImageColor.getrgb(PALETTE[index % len(PALETTE)])[:3]


def _with_legend(picture: Image.Image, regions: Mapping[str, Region]) -> Image.Image:
    """Returns the picture with a strip below: a swatch, the name and the size of each region."""
    font, line, gap = ImageFont.load_default(_FONT_PX), _FONT_PX + 7, 6
    texts = [f"{name}: {len(r)} cell{'s' * (len(r) != 1)}" for name, r in regions.items()]
    widths = [line + int(font.getlength(text)) + 2 * gap for text in texts]
    # Entries wrap like words: a new row begins where an entry would cross the picture's edge.
    places, x, y = [], gap, gap
    for width in widths:
        if x > gap and x + width > picture.width:
            x, y = gap, y + line
        places.append((x, y))
        x += width
    full = max(picture.width, max(widths) + gap)
    canvas = Image.new("RGB", (full, picture.height + y + line), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for index, ((left, top), text) in enumerate(zip(places, texts, strict=True)):
        top += picture.height
        swatch = (left, top, left + _FONT_PX, top + _FONT_PX)
        draw.rectangle(swatch, fill=tuple(_rgb(index)), outline="black")
        draw.text((left + line, top - 1), text, fill="black", font=font)
    return canvas
