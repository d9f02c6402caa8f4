"""One row of a user's data: a picture, a question and its answer, and what else is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.pictures import (
    UNREADABLE,
    open_picture,
    size_of,
    upright,
    upright_size,
)


Box = tuple[float | int, float | int, float | int, float | int]
"""(x0, y0, x1, y1) in pixels of the picture, half-open."""
EVERY = "all questions"
"""The direction of rows that name none."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is opened when it is needed: a file, or one in memory."""

    key: str
    """Equal for equal sources: two questions about one picture are one observation."""
    source: Path | Image.Image | Any
    """A path, a picture, or a function that returns a picture."""

    def open(self, ground: str = "white") -> Image.Image:
        """Returns the picture in RGB, upright and over a colour; raises `DataError`."""
        if isinstance(self.source, Path):
            return open_picture(self.source, partial(upright, ground=ground))
        try:
            found = self.source if isinstance(self.source, Image.Image) else self.source()
            return upright(found, ground)
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise DataError(
                f"A picture of the data cannot be read as a picture: {str(error)[:120]}."
            ) from None

    def size(self, whole: bool = False) -> tuple[int, int]:
        """Returns its width and height, upright; decodes it with `whole`.

        Raises `DataError`, and of one in memory what PIL raises, for what cannot be read.
        """
        if isinstance(self.source, Path):
            return size_of(self.source, whole)
        found = self.source if isinstance(self.source, Image.Image) else self.source()
        return upright_size(found, whole)

    def pixels(self) -> np.ndarray:
        """Returns, of a mask, which pixels `[row, column]` are not black, and not transparent."""
        return np.asarray(self.open("black").convert("L")) > 0


@dataclass(frozen=True, kw_only=True)
class OwnItem:
    """A question about a picture.

    It has the fields of the built-in settings' questions that experiments read: `target`,
    `direction` and `axis`.
    """

    id: str
    image: Picture
    question: str
    answer: str
    counterfactual: Picture | None = None
    """The same picture with one change, for which the question has another answer."""
    counterfactual_answer: str | None = None
    other_answers: tuple[str, ...] = ()
    """Answers that are wrong for this picture and possible for the question."""
    boxes: Mapping[str, Box] = field(default_factory=dict)
    masks: Mapping[str, Picture] = field(default_factory=dict)
    """Pictures of the picture's size, not black where the named thing is."""
    split: str | None = None
    direction: str = EVERY
    """The group of questions that it is reported in."""
    label: str | None = None
    where: str = ""
    """Where it was read: `"items.csv:3"`."""

    @property
    def target(self) -> str:
        """The correct answer."""
        return self.answer

    @property
    def axis(self) -> str:
        """One for all: whatever is asked about it, a picture is one observation."""
        return "picture"

    @property
    def name(self) -> str:
        """What tells the question from all others, in words."""
        return f"{self.id}: {self.question}"

    @property
    def entities(self) -> tuple[str, ...]:
        """What the picture is known by."""
        return (self.image.key,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its boxes and masks."""
        return (*self.boxes, *self.masks)

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer that its row names, the correct one first."""
        more = (*filter(None, [self.counterfactual_answer]), *self.other_answers)
        return tuple(dict.fromkeys((self.answer, *more)))

    def on_counterfactual(self) -> "OwnItem":
        """Returns the same question about the counterfactual; raises `DataError` without one."""
        if self.counterfactual is None or self.counterfactual_answer is None:
            raise DataError(
                f"Item {self.id!r} has no counterfactual with an answer. Give the columns "
                "counterfactual and counterfactual_answer."
            )
        return replace(
            self,
            image=self.counterfactual,
            answer=self.counterfactual_answer,
            counterfactual=self.image,
            counterfactual_answer=self.answer,
            other_answers=tuple(a for a in self.other_answers if a != self.counterfactual_answer),
        )

    @checked(DataError)
    def regions(self, grid: TokenGrid) -> dict[str, Region]:
        """Returns the cells of each named box and mask on the grid of its picture.

        A cell belongs to a box that it overlaps at all.  Raises `RegionError` for a box in a part
        of the picture that the processor crops.
        """
        found = {name: grid.box(*box, name=name) for name, box in self.boxes.items()}
        for name, mask in self.masks.items():
            found[name] = grid.mask(mask.pixels(), name=name)
        return found
