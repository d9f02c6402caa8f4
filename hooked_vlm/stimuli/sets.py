"""A setting as data: its entities, their pictures, and its questions.

A `StimulusSet` has names, a function that draws a picture, a function that writes the
question, and the places of objects and strips.  It does not depend on a model;
`experiments.setting.Setting` binds it to one.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

from PIL import Image

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.geometry import Geometry, Layout, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import DIRECTIONS, SYSTEM_PROMPT, Direction
from hooked_vlm.stimuli.scattered import Scattered, scattered_layout


Draw = Callable[..., Image.Image]
"""(entities by place, axis, layout, background) -> picture; an entity of None is an empty place."""


@dataclass(frozen=True, kw_only=True)
class StimulusSet:
    """Pictures of three entities with a question about the middle one, for one setting."""

    name: str
    title: str
    """Its title in reports: "Shapes on photographs"."""
    names: tuple[str, ...]
    """The entities of the outer places (and of the middle place, unless `middle` is given)."""
    draw: Draw
    prompt: Callable[[Question], str]
    directions: tuple[str, ...] = DIRECTIONS
    system: str | None = SYSTEM_PROMPT
    grounds: Mapping[str, Image.Image] = field(default_factory=dict)
    """Background photographs by name; empty: white."""
    middle: str | None = None
    """The entity that is always in the middle (What'sUp); None: any."""
    spares: Mapping[str, str] = field(default_factory=dict)
    """By name: the entity that replaces it for a tokenizer that splits the name.  Other names
    that a tokenizer splits are left out."""
    layout: Callable[[int, int], Layout] = geometry_for
    """(visual tokens a side, pixels of one) -> the places of objects and strips."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the directions."""
        horizontal = any(d in ("left", "right") for d in self.directions)
        vertical = any(d in ("above", "below") for d in self.directions)
        return tuple(
            n for n, there in (("horizontal", horizontal), ("vertical", vertical)) if there
        )

    @checked(DataError)
    def items(self, directions: Sequence[Direction] | None = None) -> list[Question]:
        """Returns all questions, grouped by direction, in the order of the names."""
        outer = 2 if self.middle else 3
        return [
            Question(self.with_middle(names), direction)
            for direction in (self.directions if directions is None else directions)
            for names in permutations(self.names, outer)
        ]

    def with_middle(self, names: Sequence[str]) -> Any:
        """Returns the names with the fixed middle entity inserted, if there is one."""
        return (names[0], self.middle, *names[1:]) if self.middle else tuple(names)

    def ground_of(self, question: Question) -> str | None:
        """Returns the name of the background photograph of a question's picture.

        It depends only on the reference, so a clean picture and its counterfactual have the
        same background.
        """
        if not self.grounds:
            return None
        return random.Random(question.reference).choice(list(self.grounds))

    @checked(DataError)
    def picture(self, question: Question, layout: Layout) -> Image.Image:
        """Returns the picture of a question."""
        return self.scene(question.entities, question.axis, layout, self.ground_of(question))

    @checked(DataError)
    def scene(
        self, entities: Sequence[str | None], axis: str, layout: Layout, ground: str | None = None
    ) -> Image.Image:
        """Returns a picture of any entities (None: an empty place), on a photograph or white."""
        if ground is not None and ground not in self.grounds:
            raise DataError(
                f"The setting {self.name} has no background {ground!r}."
                f"{did_you_mean(ground, self.grounds)} Use one of its grounds, or None for white."
            )
        background = self.grounds[ground] if ground is not None else None
        if self.is_scattered and isinstance(layout, Geometry):
            layout = Scattered(layout)
        if isinstance(layout, Scattered):
            layout = layout.placed(entities, axis)
        return self.draw(entities, axis, layout, background)

    def in_rows(self) -> "StimulusSet":
        """Returns the set with its objects in rows and columns, if they are scattered."""
        return replace(self, layout=geometry_for) if self.is_scattered else self

    @property
    def is_scattered(self) -> bool:
        """Whether its objects stand anywhere, not in rows and columns."""
        return self.layout is scattered_layout
