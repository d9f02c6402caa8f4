"""Shapes: three shapes of different forms and colours in a row or in a column (paper, 4).

Each colour has its own shape, so the colour is both the entity's name and the answer.  There
are 120 ordered triples and 480 items, as in Squares.  The question names the middle entity by
colour and shape.  Sizes are the paper's, in a box of side s (protocol 2.2); `DRAWINGS` has the
sizes that two shipped models were trained on, too.
"""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.geometry import Box, Layout
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import PREPOSITION, SHAPES
from hooked_vlm.stimuli.squares import PAINTS, SPARES, canvas


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
FORMS = {**SHAPE_OF, **{spare: SHAPE_OF[name] for name, spare in SPARES.items()}}
"""The shape of every colour that can be drawn: a spare colour has the shape of the replaced one."""

DEFAULT = "published"
"""The default among `DRAWINGS`."""
STAR_RATIO = 0.381966
"""Inner over outer radius of the five-pointed star."""


@checked(DataError)
def prompt(question: Question) -> str:
    """Returns the question for the colour of the shape in a direction from the middle one.

    >>> prompt(Question(("red", "green", "blue"), "left"))
    'The color of the shape to the left of the green circle is '
    """
    if question.reference not in FORMS:
        raise _unknown(question.reference)
    reference = f"{question.reference} {FORMS[question.reference]}"
    return SHAPES.format(preposition=PREPOSITION[question.direction], reference=reference)


@checked(DataError)
def draw(
    entities: Sequence[str | None],
    axis: str,
    geometry: Layout,
    background: Image.Image | None = None,
    drawing: str = DEFAULT,
) -> Image.Image:
    """Returns a canvas with each colour's shape in its place; None leaves a place empty.

    `drawing` is one of `DRAWINGS`.  Raises `DataError` for an unknown colour or drawing, and
    for other than three places.
    """
    image = canvas(entities, geometry, background)
    pen = ImageDraw.Draw(image)
    for place, name in enumerate(entities):
        if name is None:
            continue
        if name not in FORMS:
            raise _unknown(name)
        paint(pen, FORMS[name], geometry.place_box(axis, place), PAINTS[name], drawing)
    return image


def _unknown(name: str) -> DataError:
    return DataError(f"No entity {name!r} among {', '.join(FORMS)}.{did_you_mean(name, FORMS)}")


def paint(
    pen: ImageDraw.ImageDraw, shape: str, box: Box, color: Color, drawing: str = DEFAULT
) -> None:
    """Draws a shape in a half-open pixel box, in one of `DRAWINGS`.

    Raises `DataError` for an unknown shape or drawing.
    """
    if drawing not in DRAWINGS:
        raise DataError(
            f"No drawing {drawing!r} among {', '.join(DRAWINGS)}.{did_you_mean(drawing, DRAWINGS)}"
        )
    if shape not in PAINT:
        raise DataError(f"No shape {shape!r} among {', '.join(PAINT)}.{did_you_mean(shape, PAINT)}")
    DRAWINGS[drawing][shape](pen, box, color)


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
    pen.polygon(_star_points(x, y, outer), fill=color)


def _star_points(x: float, y: float, outer: float) -> Points:
    points: Points = []
    for tip in range(10):
        radius = outer if tip % 2 == 0 else outer * STAR_RATIO
        angle = -math.pi / 2 + tip * math.pi / 5
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return points


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


def _whole_triangle(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x0, y0, x1, _ = box
    base = y0 + int((x1 - x0) * math.sqrt(3) / 2) - 1
    pen.polygon([((x0 + x1 - 1) / 2, y0), (x0, base), (x1 - 1, base)], fill=color)


def _whole_star(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    # The two upper side tips touch the box, so the star is as wide as the box.
    outer = (box[2] - box[0] - 1) / 2 / math.sin(2 * math.pi / 5)
    x, y, _ = _frame(box)
    # The upper tip is a radius above the centre, the lower tips are less: centre the extent.
    lowered = outer * (1 - math.cos(math.pi / 5)) / 2
    points = _star_points(x, y + lowered, outer)
    # PIL paints the pixel of a tip that a rounding error moves out of the box.
    pen.polygon([(round(u, 6), round(v, 6)) for u, v in points], fill=color)


def _whole_cross(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x0, y0, x1, y1 = box
    bar = (x1 - x0) // 3
    x, y = x0 + (x1 - x0 - bar) // 2, y0 + (y1 - y0 - bar) // 2
    pen.rectangle((x0, y, x1 - 1, y + bar - 1), fill=color)
    pen.rectangle((x, y0, x + bar - 1, y1 - 1), fill=color)


def _whole_heart(pen: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    x0, y0, x1, y1 = box
    curve = [_heart_point(2 * math.pi * step / 360) for step in range(360)]
    us, vs = zip(*curve, strict=True)
    left, right, bottom, top = min(us), max(us), min(vs), max(vs)
    # Width and height are scaled on their own, so that the heart fills the box.
    wide, tall = (x1 - x0 - 1) / (right - left), (y1 - y0 - 1) / (top - bottom)
    points = [(x0 + (u - left) * wide, y0 + (top - v) * tall) for u, v in curve]
    pen.polygon(points, fill=color)


Painter = Callable[[ImageDraw.ImageDraw, Box, Color], None]
PAINT: dict[str, Painter] = {
    "square": _square,
    "circle": _circle,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
"""The shapes, drawn inset: at most 0.9 of the box, centred."""
DRAWINGS: dict[str, dict[str, Painter]] = {
    "published": {
        **PAINT,
        "triangle": _whole_triangle,
        "star": _whole_star,
        "cross": _whole_cross,
        "heart": _whole_heart,
    },
    "inset": PAINT,
}
"""The ways to draw shapes.  "published": triangle, star, cross and heart are as wide as the box,
the triangle at its top; "inset": 0.9 of that, as in the training of two shipped models."""
