"""What tiny-qwen2-vl and tiny-gemma-3 learn last: squares, shapes and objects, on many grounds.

A mixed scene shows three entities of one kind in a row or in a column: squares, shapes in
free combinations of form and colour, or cut-outs.  A third of them stand on smooth noise or
on a texture; photographs of scenes are never shown, so that they stay a test.  A
conversation asks the relations in one of several phrasings, on which side one entity is
of another, and for all of them in order.  Held out are the colour triples of `tasks` and a
fifth of the paper's object triples.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from hooked_vlm.stimuli import objects, photographs, prompts, shapes
from hooked_vlm.stimuli.geometry import Geometry
from hooked_vlm.stimuli.prompts import OPTIONS, OTHER_WORDS, PREPOSITION
from hooked_vlm.stimuli.squares import COLORS
from training.tasks import (
    EXTRA_COLORS,
    TRIPLE_SEED,
    Triple,
    Turn,
    canonical_scene,
    held_out_triples,
    jittered_scene,
)


KINDS = ("squares", "shapes", "objects")
SHARES = {"squares": 0.25, "shapes": 0.3, "objects": 0.45}
GROUNDS = 0.35
"""Share of scenes that do not stand on white."""
LISTS = {
    "horizontal": "List the {things} from left to right.",
    "vertical": "List the {things} from top to bottom.",
}
PHRASINGS = {
    "squares": (prompts.SQUARES, OTHER_WORDS["squares"]),
    "shapes": (prompts.SHAPES, OTHER_WORDS["shapes"]),
    "objects": (prompts.OBJECTS, OTHER_WORDS["objects"], prompts.WHATSUP),
}
LARGE = (0.14, 0.26)
"""Sides of cut-outs and shapes, as shares of the canvas: smaller ones cannot be told apart."""


@cache
def held_out_objects() -> frozenset[Triple]:
    """Returns the 66 of the paper's 336 object triples that training never shows.

    As with colours, a triple and its mirror image are held out together.
    """
    names = objects.NAMES
    one_way = [t for t in permutations(names, 3) if names.index(t[0]) < names.index(t[2])]
    chosen = random.Random(TRIPLE_SEED).sample(one_way, len(one_way) // 5)
    return frozenset(chosen) | {(c, b, a) for a, b, c in chosen}


@dataclass(frozen=True)
class MixedScene:
    """Three entities of one kind, where they stand, and on what."""

    kind: str
    names: Triple
    """Colours, or objects."""
    forms: Triple
    """The shape of each entity; "square" for squares, unused for objects."""
    axis: str
    boxes: tuple[tuple[int, int, int, int], ...]
    ground: str
    """"white", "noise:<seed>", or "<texture>:<seed>"."""

    def render(self, canvas: int) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the picture."""
        image = ground(self.ground, canvas)
        pen = ImageDraw.Draw(image)
        for name, form, box in zip(self.names, self.forms, self.boxes, strict=True):
            if self.kind == "objects":
                objects.paste(image, name, box, objects.shipped())
                continue
            color = COLORS.get(name) or EXTRA_COLORS[name]
            if self.kind == "shapes":
                shapes.paint(pen, form, box, color, "inset")  # what the models have seen
            else:
                pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=color)
        return np.asarray(image)

    def label(self, place: int) -> str:
        """Returns how a question names the entity of a place as its reference."""
        name, form = self.names[place], self.forms[place]
        return f"{name} {form}" if self.kind == "shapes" else name

    def relations(self, phrasing: int = 0) -> list[Turn]:
        """Returns the questions that neighbours answer, two for each order."""
        first, middle, last = self.names
        before, after = OPTIONS[self.axis]
        template = PHRASINGS[self.kind][phrasing]
        asked = ((before, 1, first), (after, 1, last), (before, 2, middle), (after, 0, middle))
        return [
            (template.format(preposition=PREPOSITION[d], reference=self.label(place)), answer)
            for d, place, answer in asked
        ]

    def side(self, rng: random.Random) -> Turn:
        """Returns a question on which side of one entity another is."""
        one, other = rng.sample(range(3), 2)
        style, swapped = rng.choice(tuple(prompts.SIDES)), rng.random() < 0.5
        text = prompts.side_prompt(self._thing(one), self._thing(other), self.axis, style, swapped)
        return text, OPTIONS[self.axis][int(one > other)]

    def _thing(self, place: int) -> str:
        return f"{self.names[place]} square" if self.kind == "squares" else self.label(place)

    def listing(self) -> Turn:
        """Returns the request for all entities in order, and its answer."""
        things = "objects" if self.kind == "objects" else "colors"
        return LISTS[self.axis].format(things=things), " ".join(self.names)


def ground(what: str, canvas: int) -> Image.Image:
    """Returns a canvas: white, smooth noise, or a tinted piece of a texture."""
    if what == "white":
        return Image.new("RGB", (canvas, canvas), "white")
    kind, seed = what.split(":")
    rng = np.random.default_rng(int(seed))
    if kind == "noise":
        side = int(rng.integers(2, 9))
        coarse = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((canvas, canvas), Image.Resampling.BICUBIC)
    texture = photographs.shipped(kind)
    x, y = (int(v) for v in rng.integers(0, texture.width - canvas + 1, 2))
    piece = np.asarray(texture.crop((x, y, x + canvas, y + canvas)), dtype=np.float32) / 255
    low, high = rng.uniform(0, 255, (2, 3))
    return Image.fromarray((low + (high - low) * piece).astype(np.uint8))


def mixed_scene(
    rng: random.Random, geometry: Geometry, held_out: bool = False, kind: str | None = None
) -> MixedScene:
    """Returns a scene to train on, or one of the held-out triples (on the same grounds).

    The layout is the paper's two times in five, else jittered as in `tasks`.
    """
    kind = kind or rng.choices(KINDS, [SHARES[k] for k in KINDS])[0]
    triple, axis = _triple(rng, kind, held_out), rng.choice(("horizontal", "vertical"))
    forms = ("square",) * 3
    if kind == "shapes":
        forms = tuple(shapes.SHAPE_OF.get(name, rng.choice(tuple(shapes.PAINT))) for name in triple)
        if not held_out and rng.random() < 0.5:
            forms = tuple(rng.choice(tuple(shapes.PAINT)) for _ in triple)
    if held_out or rng.random() < 0.4:
        boxes = canonical_scene(triple, axis, geometry).boxes
    else:
        boxes = _jittered(rng, kind, triple, axis, geometry.canvas)
    stands_on = "white"
    if rng.random() < GROUNDS:
        stands_on = f"{rng.choice(('noise', *photographs.TEXTURES))}:{rng.randrange(1 << 30)}"
    return MixedScene(kind, triple, forms, axis, boxes, stands_on)  # type: ignore[arg-type]


def _triple(rng: random.Random, kind: str, held_out: bool) -> Triple:
    if kind == "objects":
        reserved, names = held_out_objects(), tuple(objects.shipped())
    else:
        reserved, names = held_out_triples(), (*COLORS, *COLORS, *EXTRA_COLORS)
    if held_out:
        return rng.choice(sorted(reserved))
    while True:
        triple = tuple(rng.sample(names, 3))
        if len(set(triple)) == 3 and triple not in reserved:
            return triple  # type: ignore[return-value]


def _jittered(
    rng: random.Random, kind: str, triple: Triple, axis: str, canvas: int
) -> tuple[tuple[int, int, int, int], ...]:
    while True:
        boxes = jittered_scene(rng, triple, axis, canvas, unseen=False).boxes
        smallest = min(x1 - x0 for x0, _, x1, _ in boxes)
        if kind == "squares" or smallest >= LARGE[0] * canvas:
            return boxes


def mixed_conversation(rng: random.Random, scene: MixedScene) -> list[Turn]:
    """Returns turns about a scene in random order: three relations, a side, and the list."""
    phrasing = 0 if rng.random() < 0.5 else rng.randrange(len(PHRASINGS[scene.kind]))
    turns = [*rng.sample(scene.relations(phrasing), 3), scene.side(rng), scene.listing()]
    rng.shuffle(turns)
    return turns
