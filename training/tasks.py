"""What the shipped models are taught: conversations about three squares.

Every picture shows three squares of different colours in a row or in a column.  A
training conversation asks the four relation questions that the picture answers and, as
one more turn, for all colours in order, shuffled.  (Without that last kind of turn
training sits on a plateau for a thousand steps: naming the colours is the easier half,
and it is learned first.)  A fifth of the ordered colour triples never occurs in training,
nor do some ranges of sizes and positions, so that held-out accuracy means something.
"""

import random
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from jaxtyping import UInt8

from hooked_vlm.stimuli.geometry import Geometry
from hooked_vlm.stimuli.prompts import squares_prompt
from hooked_vlm.stimuli.squares import COLORS


TRIPLE_SEED = 20
LIST_PROMPT = {
    "horizontal": "List the colors from left to right.",
    "vertical": "List the colors from top to bottom.",
}

EXTRA_COLORS = {
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "pink": (255, 105, 180),
    "cyan": (0, 255, 255),
    "olive": (128, 128, 0),
    "navy": (0, 0, 96),
    "teal": (0, 128, 128),
}
"""Colours that only training shows: more of them make it cheaper to read the order off the
picture than to remember which triples occur."""

Triple = tuple[str, str, str]
Turn = tuple[str, str]
"""A question and its answer."""


def held_out_triples() -> frozenset[Triple]:
    """Returns the 24 of the 120 ordered colour triples that training never shows.

    They are twelve triples and their mirror images.  Were one of the two in training, its
    order could be learned by heart: it would be the only one in which those three occur.
    """
    names = list(COLORS)
    one_way = [t for t in permutations(names, 3) if names.index(t[0]) < names.index(t[2])]
    chosen = random.Random(TRIPLE_SEED).sample(one_way, len(one_way) // 5)
    return frozenset(chosen) | {(c, b, a) for a, b, c in chosen}


def training_triples() -> list[Triple]:
    """Returns the other 96."""
    held_out = held_out_triples()
    return [triple for triple in permutations(COLORS, 3) if triple not in held_out]


@dataclass(frozen=True)
class Scene:
    """Three squares: their colours by place and their pixel boxes `(x0, y0, x1, y1)`."""

    triple: Triple
    axis: str
    boxes: tuple[tuple[int, int, int, int], ...]

    def render(self, canvas: int) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the picture: squares on white."""
        image = np.full((canvas, canvas, 3), 255, dtype=np.uint8)
        for name, (x0, y0, x1, y1) in zip(self.triple, self.boxes, strict=True):
            image[y0:y1, x0:x1] = COLORS.get(name) or EXTRA_COLORS[name]
        return image

    def relations(self) -> list[Turn]:
        """Returns the questions that neighbouring squares answer, two for each order."""
        first, middle, last = self.triple
        before, after = ("left", "right") if self.axis == "horizontal" else ("above", "below")
        pairs = (
            (before, middle, first),
            (after, middle, last),
            (before, last, middle),
            (after, first, middle),
        )
        return [(squares_prompt(d, reference), answer) for d, reference, answer in pairs]

    def listing(self) -> Turn:
        """Returns the request for all colours, and its answer."""
        return LIST_PROMPT[self.axis], " ".join(self.triple)


def canonical_scene(triple: Triple, axis: str, geometry: Geometry) -> Scene:
    """Returns the paper's layout (protocol 2.1)."""
    return Scene(triple, axis, tuple(geometry.place_box(axis, place) for place in range(3)))


def jittered_scene(
    rng: random.Random, triple: Triple, axis: str, canvas: int, unseen: bool
) -> Scene:
    """Returns a layout with sizes, gaps and offsets drawn at random, in whole pixels.

    Sides are between 8 % and 26 % of the canvas and squares need not line up across the
    axis.  Training leaves out layouts whose middle square is centred in the canvas's upper
    or left fifth-to-third (across the axis) with sides of 14 % to 17 %: those are `unseen`.
    """
    while True:
        sides = [rng.uniform(0.08, 0.26)] * 3
        if rng.random() < 0.3:
            sides = [rng.uniform(0.08, 0.24) for _ in range(3)]
        if unseen:
            sides = [rng.uniform(0.14, 0.17)] * 3
        slack = 1 - sum(sides)
        cuts = sorted(rng.uniform(0, slack) for _ in range(3))
        gaps = [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1]]
        if min(gaps[1:]) < 0.03:
            continue
        across = rng.uniform(0.2, 0.33) if unseen else rng.uniform(0.15, 0.85)
        middles = [across + rng.uniform(-0.06, 0.06) for _ in range(3)]
        if not unseen and _reserved(sides[1], middles[1]):
            continue
        if not all(s / 2 <= m <= 1 - s / 2 for s, m in zip(sides, middles, strict=True)):
            continue
        return Scene(triple, axis, _boxes(sides, gaps, middles, axis, canvas))


def _reserved(side: float, middle: float) -> bool:
    return 0.13 <= side <= 0.18 and 0.14 <= middle <= 0.39


def _boxes(
    sides: list[float], gaps: list[float], middles: list[float], axis: str, canvas: int
) -> tuple[tuple[int, int, int, int], ...]:
    boxes, start = [], 0.0
    for side, gap, middle in zip(sides, gaps, middles, strict=True):
        start += gap
        a0, c0, size = (
            round(start * canvas),
            round((middle - side / 2) * canvas),
            round(side * canvas),
        )
        x0, y0 = (a0, c0) if axis == "horizontal" else (c0, a0)
        boxes.append((x0, y0, x0 + size, y0 + size))
        start += side
    return tuple(boxes)


def training_scene(
    rng: random.Random, triples: list[Triple], geometry: Geometry, extra: float = 0.0
) -> Scene:
    """Returns a scene to train on: the paper's layout two times in five, else a jittered one.

    `extra` is the share of scenes with at least one of the extra colours in it.
    """
    triple, axis = rng.choice(triples), rng.choice(("horizontal", "vertical"))
    if extra and rng.random() < extra:
        every = [*COLORS, *EXTRA_COLORS]
        while all(name in COLORS for name in triple):
            first, middle, last = rng.sample(every, 3)
            triple = (first, middle, last)
    if rng.random() < 0.4:
        return canonical_scene(triple, axis, geometry)
    return jittered_scene(rng, triple, axis, geometry.canvas, unseen=False)


def conversation(rng: random.Random, scene: Scene) -> list[Turn]:
    """Returns all turns about a scene, in random order."""
    turns = [*scene.relations(), scene.listing()]
    rng.shuffle(turns)
    return turns
