"""What a setting is: which entities there are, how they look, and what is asked.

It is data: names, a function that draws, one that words the question, and the places of
objects and strips.  Nothing here knows a model; `experiments.setting.Setting` binds the two.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from PIL import Image

from hooked_vlm.stimuli.geometry import Layout, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import DIRECTIONS, SYSTEM_PROMPT


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
    skip_split_names: bool = False
    """Whether names that a model's tokenizer splits are left out, rather than refused."""
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
