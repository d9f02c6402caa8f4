"""Squares: three equal squares of different colours in a row or in a column (paper, 4).

Six colours give P(6,3) = 120 ordered triples, and four directions 480 items.  The
question always names the middle square; its answer is the first square for "left" and
"above" and the last one for "right" and "below".
"""

from collections.abc import Sequence
from itertools import permutations

from PIL import Image, ImageDraw, ImageOps

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import DIRECTIONS, Direction, squares_prompt


COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "brown": (150, 75, 0),
    "gray": (128, 128, 128),
}
"""Names and RGB values, in the paper's order."""
SPARES = {"brown": "orange"}
"""Colours that replace others where a tokenizer splits their names, as in the paper for Pixtral."""
PAINTS = {**COLORS, "orange": (255, 165, 0)}
"""RGB values of all colours that can be drawn.  The paper does not give orange's value; this is
the one of CSS."""


@checked(DataError)
def items(directions: Sequence[Direction] = DIRECTIONS) -> list[Question]:
    """Returns all items, 120 for each direction, in the order of `COLORS`."""
    return [Question(triple, d) for d in directions for triple in permutations(COLORS, 3)]


@checked(DataError)
def prompt(question: Question) -> str:
    """Returns what is asked: the colour in a direction from the middle square."""
    return squares_prompt(question.direction, question.reference)


@checked(DataError)
def canvas(
    entities: Sequence[str | None], geometry: Layout, background: Image.Image | None
) -> Image.Image:
    """Returns the canvas for entities: white, or a copy of a background scaled to fit.

    Raises `DataError` for other than three places.
    """
    if len(entities) != 3:
        raise DataError(
            f"Expected three entities, one per place; got {len(entities)}: {list(entities)}."
        )
    size = (geometry.canvas, geometry.canvas)
    return Image.new("RGB", size, "white") if background is None else ImageOps.fit(background, size)


@checked(DataError)
def draw(
    entities: Sequence[str | None],
    axis: str,
    geometry: Layout,
    background: Image.Image | None = None,
) -> Image.Image:
    """Returns a canvas with a square of each colour in its place; None leaves a place empty.

    Raises `DataError` for an unknown colour or other than three places.
    """
    image = canvas(entities, geometry, background)
    pen = ImageDraw.Draw(image)
    for place, name in enumerate(entities):
        if name is None:
            continue
        if name not in PAINTS:
            raise DataError(
                f"No colour {name!r} among {', '.join(PAINTS)}.{did_you_mean(name, PAINTS)}"
            )
        x0, y0, x1, y1 = geometry.place_box(axis, place)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=PAINTS[name])
    return image
