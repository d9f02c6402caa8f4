"""What encoders are trained on by themselves: pictures of many things, and captions.

A picture shows one to seven things, shapes of six forms, each of another colour out of fourteen.
They have any size and place, but do not cover each other; a third of the pictures of up to seven
stand on noise or on a texture.  A caption names them in random order.  Three quarters of the
captions say where each thing is, in the words of a grid of 3x3 places: after the thing, or before
it (a place is then given, and the thing is asked for, as in LocCa, 2024); a third of the others say
how two things stand to each other.  So places are worth knowing, as in captions of photographs, and
no caption asks for an order of three.
"""

import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import ImageDraw

from hooked_vlm.stimuli import photographs, shapes
from hooked_vlm.stimuli.squares import COLORS
from training.scenes import GROUNDS, ground
from training.tasks import EXTRA_COLORS


MOST_THINGS = 7
FEW_THINGS = 4
SIDES = (0.16, 0.35)
"""Sides of things, as shares of the canvas."""
LARGE = (0.25, 0.4)
"""Sides of a thing that a picture shows alone: forms and places are learned sooner from these."""
PLACED, RELATED = 0.75, 0.33
ROWS, COLUMNS = ("above", "", "below"), ("left", "", "right")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """A coloured shape on a canvas."""

    color: str
    form: str
    box: Box

    def __str__(self) -> str:
        return f"{self.color} {self.form}"

    def middle(self, canvas: int) -> tuple[float, float]:
        """Returns the centre (x, y) as shares of the canvas."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2 / canvas, (y0 + y1) / 2 / canvas


@dataclass(frozen=True)
class Crowd:
    """A picture of many things."""

    things: tuple[Thing, ...]
    ground: str
    canvas: int

    def render(self) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the picture."""
        image = ground(self.ground, self.canvas)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            color = COLORS.get(thing.color) or EXTRA_COLORS[thing.color]
            shapes.paint(pen, thing.form, thing.box, color)
        return np.asarray(image)

    def caption(self, rng: random.Random) -> str:
        """Returns a caption: all things in random order, with their places or without."""
        things = rng.sample(self.things, len(self.things))
        if rng.random() < PLACED:
            place_first = rng.random() < 0.5
            return ", ".join(self._placed(thing, place_first) for thing in things)
        words = ", ".join(map(str, things))
        if len(things) > 1 and rng.random() < RELATED:
            words += f", {_relation(rng, things[0], things[1], self.canvas)}"
        return words

    def _placed(self, thing: Thing, place_first: bool) -> str:
        x, y = thing.middle(self.canvas)
        place = (ROWS[min(int(3 * y), 2)], COLUMNS[min(int(3 * x), 2)])
        words = (*place, str(thing)) if place_first else (str(thing), *place)
        return " ".join(filter(None, words))


def _relation(rng: random.Random, one: Thing, other: Thing, canvas: int) -> str:
    """Returns how one thing stands to another, along the axis on which they are further apart."""
    (x0, y0), (x1, y1) = one.middle(canvas), other.middle(canvas)
    if abs(x1 - x0) > abs(y1 - y0):
        word, back = ("left", "right") if x0 < x1 else ("right", "left")
    else:
        word, back = ("above", "below") if y0 < y1 else ("below", "above")
    return f"{one} {word} {other}" if rng.random() < 0.5 else f"{other} {back} {one}"


def crowd(rng: random.Random, canvas: int, most: int = MOST_THINGS) -> Crowd:
    """Returns a picture of one to `most` things that do not cover each other.

    With `most` 1 it is large; with less than `MOST_THINGS` all stands on white.
    """
    colors, forms = (*COLORS, *EXTRA_COLORS), tuple(shapes.PAINT)
    boxes: list[Box] = []
    wanted = rng.randint(1, most)
    while len(boxes) < wanted:
        if (box := _free_box(rng, boxes, canvas, LARGE if most == 1 else SIDES)) is not None:
            boxes.append(box)
        else:
            break  # the picture is full
    shown = rng.sample(colors, len(boxes))
    things = tuple(Thing(c, rng.choice(forms), box) for c, box in zip(shown, boxes, strict=True))
    stands_on = "white"
    if most == MOST_THINGS and rng.random() < GROUNDS:
        stands_on = f"{rng.choice(('noise', *photographs.TEXTURES))}:{rng.randrange(1 << 30)}"
    return Crowd(things, stands_on, canvas)


def _free_box(
    rng: random.Random, taken: list[Box], canvas: int, sides: tuple[float, float]
) -> Box | None:
    for _ in range(20):
        side = round(rng.uniform(*sides) * canvas)
        x, y = rng.randint(0, canvas - side), rng.randint(0, canvas - side)
        box = (x, y, x + side, y + side)
        if not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
