"""The settings by name: which entities there are, how they look, and what is asked.

A setting is what the paper varies while its experiments stay the same: Squares, Shapes,
Objects, each on white or on photographs.  It is data: names, a function that draws, one that
words the question, and the places of objects and strips.  Nothing here knows a model;
`experiments.setting.Setting` binds the two.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli import objects, photographs, shapes, squares
from hooked_vlm.stimuli.geometry import Layout, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import DIRECTIONS, OTHER_WORDS, PREPOSITION, SYSTEM_PROMPT


Draw = Callable[..., Image.Image]
"""(entities by slot, axis, layout, background) -> picture; an entity of None is an empty slot."""


@dataclass(frozen=True, kw_only=True)
class StimulusSet:
    """Pictures of three entities with a question about the middle one, for one setting."""

    name: str
    title: str
    """What a report calls it: "Shapes on photographs"."""
    names: tuple[str, ...]
    """The entities that may stand in an outer slot (and in the middle one, unless `middle`)."""
    draw: Draw
    prompt: Callable[[Question], str]
    directions: tuple[str, ...] = DIRECTIONS
    system: str | None = SYSTEM_PROMPT
    grounds: Mapping[str, Image.Image] = field(default_factory=dict)
    """Photographs to draw on, by name; none: white."""
    middle: str | None = None
    """The entity that always stands in the middle (What'sUp); None: any."""
    layout: Callable[[int, int], Layout] = geometry_for
    """(visual tokens a side, pixels of one) -> where objects and strips are."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that the directions lie on."""
        horizontal = any(d in ("left", "right") for d in self.directions)
        vertical = any(d in ("above", "below") for d in self.directions)
        return tuple(
            n for n, there in (("horizontal", horizontal), ("vertical", vertical)) if there
        )

    def items(self, directions: Sequence[str] | None = None) -> list[Question]:
        """Returns all questions, those of one direction together, in the order of the names."""
        outer = 2 if self.middle else 3
        return [
            Question(self.with_middle(names), direction)
            for direction in (self.directions if directions is None else directions)
            for names in permutations(self.names, outer)
        ]

    def with_middle(self, names: Sequence[str]) -> Any:
        """Returns names with the fixed middle one put in its place, if there is one."""
        return (names[0], self.middle, *names[1:]) if self.middle else tuple(names)

    def ground_of(self, question: Question) -> str | None:
        """Returns the name of the photograph behind a question's picture.

        It hangs on the reference alone, so that a clean picture and its counterfactual
        stand on the same one.
        """
        if not self.grounds:
            return None
        return random.Random(question.reference).choice(list(self.grounds))

    def picture(self, question: Question, layout: Layout) -> Image.Image:
        """Returns the picture that a question is about."""
        return self.scene(question.entities, question.axis, layout, self.ground_of(question))

    def scene(
        self, entities: Sequence[str | None], axis: str, layout: Layout, ground: str | None = None
    ) -> Image.Image:
        """Returns a picture of any entities (None: an empty slot), on a photograph or white."""
        background = self.grounds[ground] if ground is not None else None
        return self.draw(entities, axis, layout, background)


def stimulus_set(
    name: str,
    *,
    cutouts: Path | None = None,
    backgrounds: Path | None = None,
    other_words: bool = False,
) -> StimulusSet:
    """Returns a setting: `squares`, `shapes` or `objects`, or one of them with `-photos`.

    `cutouts` and `backgrounds` are folders of a user's own pictures, in the place of the
    shipped ones; `other_words` asks in a second phrasing.

    Raises `DataError` for an unknown name or an unusable folder.
    """
    plain, _, ground = name.partition("-")
    if plain not in _MAKE or ground not in ("", "photos"):
        raise DataError(
            f"There is no setting {name!r}.{did_you_mean(name, SETTINGS)} "
            f"Known are: {', '.join(SETTINGS)}."
        )
    names, draw, prompt = _MAKE[plain](cutouts)
    grounds = {}
    if ground:
        grounds = photographs.load_photographs(backgrounds) if backgrounds else _scenes()
    return StimulusSet(
        name=name,
        title=plain.capitalize() + (" on photographs" if ground else ""),
        names=names,
        draw=draw,
        prompt=partial(_other_prompt, plain) if other_words else prompt,
        grounds=grounds,
    )


def _other_prompt(plain: str, question: Question) -> str:
    reference = question.reference
    if plain == "shapes":
        reference = f"{reference} {shapes.SHAPE_OF[reference]}"
    preposition = PREPOSITION[question.direction]
    return OTHER_WORDS[plain].format(preposition=preposition, reference=reference)


def _scenes() -> dict[str, Image.Image]:
    return {name: photographs.shipped(name) for name in photographs.SCENES}


def _objects(cutouts: Path | None) -> tuple[tuple[str, ...], Draw, Callable[[Question], str]]:
    if cutouts is None:
        return objects.NAMES, objects.draw, objects.prompt
    loaded = objects.load_cutouts(cutouts)
    if len(loaded) < 5:
        raise DataError(
            f"'{cutouts}' has {len(loaded)} cut-outs; pairs of five different ones are drawn."
        )
    return tuple(loaded), partial(objects.draw, cutouts=loaded), objects.prompt


_MAKE: dict[str, Callable[[Path | None], Any]] = {
    "squares": lambda _: (tuple(squares.COLORS), squares.draw, squares.prompt),
    "shapes": lambda _: (tuple(shapes.SHAPE_OF), shapes.draw, shapes.prompt),
    "objects": _objects,
}
SETTINGS = (*_MAKE, *(f"{name}-photos" for name in _MAKE))
"""The settings that need no data beyond the package."""
