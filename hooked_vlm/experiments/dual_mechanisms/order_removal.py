"""Removing the order that vision gives, at the language model's input (paper, 5.3; protocol 2.6).

Every image token at slot 0 is replaced: an entity's tokens by those of a picture that holds
it alone, in the middle, and the background by the same cells of an empty picture.  What
things there are is still told, and each still stands at its place in the prompt; what the
vision encoder wrote about their order is gone.  It is not a mean ablation.

`REMOVALS` names the recipe, what stands beside it to tell its parts apart, and its controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.inputs.prepare import Inputs
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question


SLOT = 0
"""Where order is removed: the language model's input, the image merged in."""
MIDDLE = 1
SLOTS = range(3)


@dataclass(frozen=True, eq=False)
class References:
    """Slot-0 activations of the pictures that a removal reads, prompt by prompt.

    Each is run when it is first asked for: not every removal reads all of them.
    """

    setting: Setting
    questions: Sequence[Question]

    @property
    def axis(self) -> str:
        """The one axis of all questions."""
        return self.questions[0].axis

    @cached_property
    def inputs(self) -> Inputs:
        """Of the questions' own pictures."""
        return self.setting.inputs(self.questions)

    @cached_property
    def itself(self) -> Recording:
        """The questions' own pictures."""
        return embedded(self.setting.model, self.inputs)

    @cached_property
    def in_middle(self) -> Sequence[Recording]:
        """By slot: the picture that holds that slot's entity alone, in the middle."""
        return [self._shown(lambda q, s=slot: alone(q.entities[s], MIDDLE)) for slot in SLOTS]

    @cached_property
    def in_place(self) -> Sequence[Recording]:
        """By slot: the picture that holds that slot's entity alone, where it stood."""
        return [self._shown(lambda q, s=slot: alone(q.entities[s], s)) for slot in SLOTS]

    @cached_property
    def empty(self) -> Recording:
        """The picture that holds nothing."""
        return self._shown(lambda _: (None, None, None))

    def cells(self, slot: int) -> Region:
        """Returns the cells of a slot's object."""
        return self.setting.geometry.object_region(self.axis, slot)

    @property
    def background(self) -> Region:
        """The cells of no object."""
        return self.setting.geometry.background(self.axis)

    def _shown(self, entities: Callable[[Question], tuple[str | None, ...]]) -> Recording:
        stimuli, layout = self.setting.stimuli, self.setting.geometry
        pictures = [
            stimuli.scene(entities(q), self.axis, layout, stimuli.ground_of(q))
            for q in self.questions
        ]
        return embedded(self.setting.model, self.setting.inputs_of(pictures, self.questions))


def references(setting: Setting, questions: Sequence[Question]) -> References:
    """Returns what removals read for some questions of one axis.

    Raises `DataError` for questions of several axes, and where objects and background do
    not cover every cell of the grid exactly once.
    """
    if len({question.axis for question in questions}) != 1:
        raise DataError("A removal takes questions of one axis; objects stand elsewhere in others.")
    check_cover(setting.geometry, questions[0].axis)
    return References(setting, questions)


def alone(name: str, slot: int) -> tuple[str | None, ...]:
    """Returns the entities of a picture that holds one, in a slot.

    >>> alone("red", 1)
    (None, 'red', None)
    """
    return tuple(name if s == slot else None for s in SLOTS)


def embedded(model: Any, inputs: Inputs) -> Recording:
    """Returns the recorded input of the first block; the others do not run."""
    site = slot_name(SLOT, model.cfg.n_layers)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, site, stop_at_layer=1)
    return Recording(inputs, cache)


def check_cover(layout: Layout, axis: str) -> None:
    """Raises `DataError` unless objects and background are every cell exactly once."""
    parts = [layout.object_region(axis, slot) for slot in SLOTS] + [layout.background(axis)]
    counts = np.sum([part.mask for part in parts], axis=0)
    if not (counts == 1).all():
        raise DataError(
            f"Objects and background of this layout cover {int((counts == 0).sum())} cells never "
            f"and {int((counts > 1).sum())} more than once, {axis}; a removal must write every "
            "image token once."
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
    """The same writes, of what is there already: nothing may change, not a bit."""
    return [*_objects(found, [found.itself] * 3, None), _background(found, found.itself)]


def _mean(found: References) -> list[Any]:
    """Every image token becomes the mean of all image tokens: no picture is left."""
    whole = found.background | found.cells(0) | found.cells(1) | found.cells(2)
    return [Ablate(SLOT, at=whole, to="mean", reference=found.itself)]


def _objects(found: References, sources: Sequence[Recording], read_at: int | None) -> list[Any]:
    return [
        Patch(
            SLOT,
            at=found.cells(slot),
            source=sources[slot],
            source_at=None if read_at is None else found.cells(read_at),
        )
        for slot in SLOTS
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
"""Name -> what is written at slot 0.

`removed` is the paper's recipe; `objects only` and `background only` are its halves; `in
place` reads each entity from the picture where it stands alone at its own place, so only
what entities tell of each other is gone; `mean` leaves no picture, and `itself` writes what
is there.
"""
