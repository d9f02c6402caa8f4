"""Removes the vision encoder's order at the language model's input (paper, 5.3; protocol 2.6).

Every image token at slot 0 is replaced: an entity's tokens by those of a picture with this
entity alone in the middle, and the background by the same cells of an empty picture.  The
identities of the entities and their positions in the prompt remain; the vision encoder's
information about their order is removed.  It is not a mean ablation.

`REMOVALS` has the recipe, its parts, and its controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hooked_vlm.errors import CannotRunError, DataError, counted
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question


SLOT = 0
"""The slot at which the order is removed: the language model's input with the image merged."""
MIDDLE = 1
PLACES = range(3)


@dataclass(frozen=True, eq=False)
class References:
    """Slot-0 activations of the pictures that a removal reads, prompt by prompt.

    Each picture is run on first use, since not every removal needs all of them.
    """

    setting: Setting
    questions: Sequence[Question]

    @property
    def axis(self) -> str:
        """The axis of all questions."""
        return self.questions[0].axis

    @cached_property
    def inputs(self) -> Inputs:
        """The inputs with the questions' own pictures."""
        return self.setting.inputs(self.questions)

    @cached_property
    def itself(self) -> Recording:
        """Activations of the questions' own pictures."""
        return embedded(self.setting.model, self.inputs)

    @cached_property
    def in_middle(self) -> Sequence[Recording]:
        """By place: activations of the picture with that place's entity alone in the middle."""
        return [self._shown(lambda q, s=place: alone(q.entities[s], MIDDLE)) for place in PLACES]

    @cached_property
    def in_place(self) -> Sequence[Recording]:
        """By place: activations of the picture with that place's entity alone at its own place."""
        return [self._shown(lambda q, s=place: alone(q.entities[s], s)) for place in PLACES]

    @cached_property
    def empty(self) -> Recording:
        """Activations of the empty picture."""
        return self._shown(lambda _: (None, None, None))

    def cells(self, place: int) -> Region:
        """Returns the cells of a place's object."""
        return self.setting.geometry.object_region(self.axis, place)

    @property
    def background(self) -> Region:
        """The cells without an object."""
        return self.setting.geometry.background(self.axis)

    def _shown(self, entities: Callable[[Question], tuple[str | None, ...]]) -> Recording:
        stimuli, layout = self.setting.stimuli, self.setting.geometry
        pictures = [
            stimuli.scene(entities(q), self.axis, layout, stimuli.ground_of(q))
            for q in self.questions
        ]
        return embedded(self.setting.model, self.setting.inputs_of(pictures, self.questions))


def references(setting: Setting, questions: Sequence[Question]) -> References:
    """Returns the activations that removals read for questions of one axis.

    Raises `DataError` for questions of several axes, and where objects and background do
    not cover every cell of the grid exactly once.
    """
    if len({question.axis for question in questions}) != 1:
        raise DataError(
            "A removal takes questions of one axis, because objects have other places on the "
            f"other axis; got {sorted({question.axis for question in questions})}. Run each axis "
            "by itself."
        )
    check_cover(setting.geometry, questions[0].axis)
    return References(setting, questions)


def alone(name: str, place: int) -> tuple[str | None, ...]:
    """Returns the entities of a picture with one entity, in a place.

    >>> alone("red", 1)
    (None, 'red', None)
    """
    return tuple(name if s == place else None for s in PLACES)


def embedded(model: Any, inputs: Inputs) -> Recording:
    """Returns the recorded input of the first block; later blocks do not run."""
    site = slot_name(SLOT, model.cfg.n_layers)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, site, stop_at_layer=1)
    return Recording(inputs, cache)


def check_cover(layout: Layout, axis: str) -> None:
    """Raises `CannotRunError` unless objects and background cover every cell exactly once."""
    parts = [layout.object_region(axis, place) for place in PLACES] + [layout.background(axis)]
    counts = np.sum([part.mask for part in parts], axis=0)
    if not (counts == 1).all():
        raise CannotRunError(
            "Objects and background of this layout leave out "
            f"{counted(int((counts == 0).sum()), 'cell')} and cover {int((counts > 1).sum())} more "
            f"than once ({axis}); a removal must write every image token once. Use a layout whose "
            "parts cover the grid."
        )


def removed(found: References) -> list[Any]:
    """Returns the paper's recipe: objects from the middle, background from an empty picture."""
    return [*_objects(found, found.in_middle, MIDDLE), _background(found, found.empty)]


def _in_place(found: References) -> list[Any]:
    return [*_objects(found, found.in_place, None), _background(found, found.empty)]


def _objects_only(found: References) -> list[Any]:
    return _objects(found, found.in_middle, MIDDLE)


def _background_only(found: References) -> list[Any]:
    return [_background(found, found.empty)]


def _itself(found: References) -> list[Any]:
    """Returns writes of the existing activations, which must not change any bit."""
    return [*_objects(found, [found.itself] * 3, None), _background(found, found.itself)]


def _mean(found: References) -> list[Any]:
    """Returns a write of the mean image token to every image token: no picture remains."""
    whole = found.background | found.cells(0) | found.cells(1) | found.cells(2)
    return [Ablate(SLOT, at=whole, to="mean", reference=found.itself)]


def _objects(found: References, sources: Sequence[Recording], read_at: int | None) -> list[Any]:
    return [
        Patch(
            SLOT,
            at=found.cells(place),
            source=sources[place],
            source_at=None if read_at is None else found.cells(read_at),
        )
        for place in PLACES
    ]


def _background(found: References, source: Recording) -> Any:
    return Patch(SLOT, at=found.background, source=source)


REMOVALS: Mapping[str, Callable[[References], list[Any]]] = {
    "intact": lambda _: [],
    "removed": removed,
    "objects only": _objects_only,
    "background only": _background_only,
    "in place": _in_place,
    "mean": _mean,
    "itself": _itself,
}
"""The interventions at slot 0, by name.

`removed` is the paper's recipe; `objects only` and `background only` are its halves.  `in
place` reads each entity from a picture with this entity alone at its own place, so only the
information of entities about each other is removed.  `mean` writes the mean image token, and
`itself` writes the existing activations.
"""
