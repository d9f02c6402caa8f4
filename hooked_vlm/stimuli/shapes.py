"""Shapes: three shapes of different forms and colours in a row or in a column (paper, 4).

Each colour has its own shape, so the colour is both the entity's name and the answer.  There
are 120 ordered triples and 480 items, as in Squares.  The question names the middle entity by
colour and shape.  Sizes are the paper's, in a box of side s (protocol 2.2).
"""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.geometry import Geometry
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import PREPOSITION, SHAPES
from hooked_vlm.stimuli.squares import COLORS, canvas


Box = tuple[int, int, int, int]
Color = tuple[int, int, int]
Points = list[tuple[float, float]]

SHAPE_OF = {
    "red": "square",
    "green": "circle",
    "blue": "triangle",
    "black": "star",
    "brown": "cross",
    "gray": "heart",
}
"""The shape of each colour, in the paper's order."""

STAR_RATIO = 0.381966
"""Inner over outer radius of the five-pointed star."""


@checked(DataError)
def prompt(question: Question) -> str:
    """Returns the question for the colour of the shape in a direction from the middle one.

    >>> prompt(Question(("red", "green", "blue"), "left"))
    'The color of the shape to the left of the green circle is '
    """
    if question.reference not in SHAPE_OF:
        raise _unknown(question.reference)
    reference = f"{question.reference} {SHAPE_OF[question.reference]}"
    return SHAPES.format(preposition=PREPOSITION[question.direction], reference=reference)


@checked(DataError)
def draw(
    entities: Sequence[str | None],
    axis: str,
    geometry: Geometry,
    background: Image.Image | None = None,
) -> Image.Image:
    """Returns a canvas with each colour's shape in its place; None leaves a place empty.

    Raises `DataError` for an unknown colour or other than three places.
    """
    image = canvas(entities, geometry, background)
    pen = ImageDraw.Draw(image)
    for place, name in enumerate(entities):
        if name is None:
            continue
        if name not in SHAPE_OF:
            raise _unknown(name)
        paint(pen, SHAPE_OF[name], geometry.place_box(axis, place), COLORS[name])
    return image


def _unknown(name: str) -> DataError:
    return DataError(
        f"No entity {name!r} among {', '.join(SHAPE_OF)}.{did_you_mean(name, SHAPE_OF)}"
    )


def paint(pen: ImageDraw.ImageDraw, shape: str, box: Box, color: Color) -> None:
    """Draws a shape in a half-open pixel box; raises `DataError` for an unknown shape."""
    if shape not in PAINT:
        raise DataError(f"No shape {shape!r} among {', '.join(PAINT)}.{did_you_mean(shape, PAINT)}")
    PAINT[shape](pen, box, color)


def _frame(box: Box) -> tuple[float, float, int]:
    """Returns a box's centre and side."""
    x0, y0, x1, y1 = box
    return (x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2, x1 - x0


def _square(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x, y, side = _frame(box)
    half = (0.8 * side - 1) / 2  # PIL paints the last pixel too
    pen.rectangle((x - half, y - half, x + half, y + half), fill=color)


def _circle(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x, y, side = _frame(box)
    half = (0.9 * side - 1) / 2
    pen.ellipse((x - half, y - half, x + half, y + half), fill=color)


def _triangle(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x, y, side = _frame(box)
    half, height = 0.9 * side / 2, 0.9 * side * math.sqrt(3) / 2
    top = y - height / 2
    pen.polygon([(x, top), (x - half, top + height), (x + half, top + height)], fill=color)


def _star(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x, y, side = _frame(box)
    outer = 0.9 * side / 2
    points: Points = []
    for tip in range(10):
        radius = outer if tip % 2 == 0 else outer * STAR_RATIO
        angle = -math.pi / 2 + tip * math.pi / 5
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    pen.polygon(points, fill=color)


def _cross(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x, y, side = _frame(box)
    half, bar = (0.9 * side - 1) / 2, (side // 3 - 1) / 2
    pen.rectangle((x - half, y - bar, x + half, y + bar), fill=color)
    pen.rectangle((x - bar, y - half, x + bar, y + half), fill=color)


def _heart(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x, y, side = _frame(box)
    curve = [_heart_point(2 * math.pi * step / 90) for step in range(90)]
    ys = [v for _, v in curve]
    scale, middle = 0.9 * side / 32, (max(ys) + min(ys)) / 2  # the curve is 32 wide
    points = [(x + u * scale, y - (v - middle) * scale) for u, v in curve]
    pen.polygon(points, fill=color)


def _heart_point(t: float) -> tuple[float, float]:
    waves = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return 16 * math.sin(t) ** 3, waves


PAINT: dict[str, Callable[[ImageDraw.ImageDraw, Box, Color], None]] = {
    "square": _square,
    "circle": _circle,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
