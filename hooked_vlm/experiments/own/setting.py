"""A user's own data for one model: the part of `Setting` that needs no drawn stimuli."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_vlm.analysis.scoring import answer_ids, normalise, target_probability
from hooked_vlm.errors import CannotRunError, counted
from hooked_vlm.experiments.loop import once
from hooked_vlm.experiments.options import Config
from hooked_vlm.experiments.setting import FEWEST_PAIRS, Setting, system_of
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.overlay import draw_regions
from hooked_vlm.regions.region import Region, union_of
from hooked_vlm.stimuli.own import OwnData, OwnItem
from hooked_vlm.stimuli.prompts import SYSTEM_PROMPT


ANYWHERE = "boxes"
OTHERS = "all other cells"
AS_MANY = "as many other cells"
"""The same number of cells outside the boxes, drawn with the seed: a control for the size."""
BOX = "box"
SHARED = (
    "fewer than two pairs without a common picture are left there, whose two pictures the model "
    "answers correctly and whose scores are numbers"
)


def control_of(kind: str) -> str:
    """Returns the kind of region that has as many cells as another one, outside all boxes.

    >>> control_of("boxes"), control_of("box left")
    ('as many other cells', 'as many other cells as box left')
    """
    return AS_MANY if kind == ANYWHERE else f"{AS_MANY} as {kind}"


@dataclass(frozen=True)
class OwnPair:
    """A question about a picture and about its counterfactual."""

    clean: OwnItem
    counterfactual: OwnItem

    @property
    def clean_answer(self) -> str:
        """The correct answer on the picture: nothing was transferred."""
        return self.clean.answer

    @property
    def swapped_answer(self) -> str:
        """The correct answer on the counterfactual."""
        return self.counterfactual.answer

    @property
    def pictures(self) -> str:
        """The two pictures, in whatever order."""
        return " | ".join(sorted(q.image.key for q in self.questions))

    @property
    def questions(self) -> tuple[OwnItem, OwnItem]:
        """The questions that a model must answer correctly for the pair to be kept."""
        return self.clean, self.counterfactual


@dataclass(frozen=True)
class OwnStimuli:
    """Own data with the names that experiments use for built-in stimuli."""

    data: OwnData
    name: str = "own"
    title: str = "Own data"
    system: str = SYSTEM_PROMPT

    def items(self, directions: Sequence[str] | None = None) -> list[OwnItem]:
        """Returns the items, of some directions or of all, in the table's order."""
        return [q for q in self.data.items if directions is None or q.direction in directions]


class OwnSetting(Setting):
    """A user's own data, for one model."""

    def __init__(
        self, model: Any, data: OwnData, batch_size: int = 16, *, leave_out: bool = False
    ) -> None:
        """Verifies that each answer is one token of the model, before any long work.

        Raises `DataProblemsError`, which lists the items with other answers, and
        `UnsupportedModelError` for a model without a vision encoder or processor.
        """
        model.require_vision()
        found = data.for_tokenizer(model.tokenizer, leave_out=leave_out)
        self.data = replace(found, items=_alike(found.items))
        self.model, self.batch_size = model, batch_size
        self.stimuli = cast(Any, OwnStimuli(self.data))
        self.names = self.data.answers
        for name in self.names:
            answer_ids(model.tokenizer, name)
        self.geometry = cast(Any, "the pictures' own")

    @property
    def directions(self) -> tuple[str, ...]:
        """The groups of questions."""
        return self.data.directions

    @property
    def axes(self) -> tuple[str, ...]:
        """One group: a picture is one observation, whatever is asked about it."""
        return tuple(dict.fromkeys(item.axis for item in self.data.items))

    @property
    def notes(self) -> tuple[str, ...]:
        """What distinguishes the questions that were asked from those of the table."""
        said = "Questions are asked as the table has them"
        has_system = system_of(self.model, SYSTEM_PROMPT) is not None
        said += ", after the system message of the paper." if has_system else ", and nothing else."
        out = self.data.left_out
        if not out:
            return (said,)
        some = ", ".join(out[:10]) + (" …" if len(out) > 10 else "")
        return (
            said,
            f"Left out: {counted(len(out), 'item')} with answers of several tokens ({some}).",
        )

    def picture(self, question: Any) -> Image.Image:
        """Returns the picture a question is about."""
        return question.image.open()

    def inputs_of(self, pictures: Sequence[Image.Image], questions: Sequence[Any]) -> Inputs:
        """Returns the model's inputs for questions with other pictures than their own."""
        return self.model.prepare(
            list(pictures),
            [question.question for question in questions],
            system=system_of(self.model, SYSTEM_PROMPT),
        )

    def own_pairs(self, config: Config) -> dict[str, list[OwnPair]]:
        """Returns each direction's pairs, in the table's order, `config.pairs` at most.

        A pair is kept where the model answers both pictures correctly; a direction with fewer than
        two observations is left out.  Raises `CannotRunError` when none is left.
        """
        chosen = once("pairs", lambda: self._right_on_both(config.pairs))
        by_id = {item.id: item for item in self.data.items}
        pairs = {
            direction: [OwnPair(by_id[i], by_id[i].on_counterfactual()) for i in own]
            for direction, own in chosen.items()
        }
        kept = {d: own for d, own in pairs.items() if len({*observations(own)}) >= FEWEST_PAIRS}
        if not kept and any(len(own) >= FEWEST_PAIRS for own in pairs.values()):
            raise CannotRunError(
                f"In no direction are there two pairs without a common picture, of "
                f"{counted(sum(map(len, pairs.values())), 'pair')} that the model answers "
                "correctly. Pairs that share a picture, directly or through others, are one "
                "observation, and an interval needs two. Add other pictures."
            )
        if not kept:
            raise CannotRunError(
                f"In no direction does the model answer two of {counted(len(self.data), 'row')} "
                "correctly on the picture and on its counterfactual, so there is nothing to "
                "intervene on. Run the behaviour experiment to see the model's accuracy."
            )
        return kept

    def _right_on_both(self, at_most: int) -> dict[str, list[str]]:
        """Returns the ids of the first items of each direction that are answered correctly."""
        chosen: dict[str, list[str]] = {}
        for direction in self.directions:
            kept: list[str] = []
            for batch in self.batches(self.stimuli.items([direction])):
                if len(kept) >= at_most:
                    break
                asked = [q for item in batch for q in (item, item.on_counterfactual())]
                right = self.is_right(asked)
                both = zip(batch, right[::2], right[1::2], strict=True)
                kept += [item.id for item, here, there in both if here and there]
            chosen[direction] = kept[:at_most]
        return chosen

    def probabilities(
        self, logits: Float[Tensor, "pair d_vocab"], answers: Sequence[Sequence[str]]
    ) -> Float[Tensor, "pair answer"]:
        """Returns each pair's probabilities of its own answers, a column for each kind."""
        columns = zip(*answers, strict=True)
        tokenizer = self.model.tokenizer
        found = [target_probability(logits, tokenizer, list(column)) for column in columns]
        return torch.stack(found, dim=-1)

    def grids(self, inputs: Inputs) -> list[TokenGrid]:
        """Returns the grid of each prompt's picture; raises `CannotRunError` without grids."""
        if not inputs.grids or not all(inputs.grids):
            raise CannotRunError(
                f"This model's visual tokens form no grid: {inputs.no_grid} Boxes have no cells."
            )
        return [grids[0] for grids in inputs.grids]

    def regions(
        self, items: Sequence[OwnItem], grids: Sequence[TokenGrid], seed: int
    ) -> dict[str, list[Region]]:
        """Returns the cells of each kind in each item's picture: see `region_kinds`.

        Raises `CannotRunError` as `check_regions` does.
        """
        found: dict[str, list[Region]] = {kind: [] for kind in self.region_kinds}
        for item, grid in zip(items, grids, strict=True):
            named, boxes, others = _cells(item, grid)
            kinds = {ANYWHERE: boxes, OTHERS: others}
            kinds |= {f"{BOX} {name}": region for name, region in named.items()}
            for kind in self.compared:
                control = control_of(kind)
                words = f"{seed}/{item.id}" + ("" if kind == ANYWHERE else f"/{kind}")
                drawn = random.Random(words).sample(list(others), len(kinds[kind]))
                kinds[control] = grid.cells(sorted(drawn), control)
            for kind, own in found.items():
                own.append(kinds[kind])
        return found

    def check_regions(self) -> None:
        """Verifies the boxes of all items before the first of them is run.

        Pictures of one size have one grid, so one picture of each size is prepared.  Raises
        `CannotRunError` for boxes that together cover more than half of a picture, `RegionError`
        for a box in a part that the processor crops, and what `prepare` raises for a picture.
        """
        grids: dict[tuple[int, int], TokenGrid] = {}
        for item in self.data.items:
            size = item.image.size()
            if size not in grids:
                grids[size] = self.grids(self.inputs([item]))[0]
            _cells(item, grids[size])

    def first_with_boxes(self) -> Image.Image:
        """Returns the first item's picture with its boxes drawn over it."""
        first = self.data.items[0]
        grid = self.grids(self.inputs([first]))[0]
        return draw_regions(self.picture(first), grid, list(first.regions(grid).values()))

    @property
    def region_kinds(self) -> tuple[str, ...]:
        """All boxes together, the cells outside them, each common box, and the controls of both."""
        return (*self.stated, *(control_of(box) for box in self.compared if box != ANYWHERE))

    @property
    def stated(self) -> tuple[str, ...]:
        """The kinds of region that a verdict is about; the others are controls of single boxes."""
        boxes = (kind for kind in self.compared if kind != ANYWHERE)
        return (ANYWHERE, OTHERS, AS_MANY, *boxes)

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """The kinds of region with a control of as many cells: all boxes, and each common one.

        A box is common if every item has one of its name; a single one is all boxes.
        """
        common = [n for n in self.data.items[0].names if all(n in i.names for i in self.data.items)]
        alone = len(common) == 1 and all(len(item.names) == 1 for item in self.data.items)
        return (ANYWHERE, *(() if alone else (f"{BOX} {name}" for name in common)))


def _cells(item: OwnItem, grid: TokenGrid) -> tuple[dict[str, Region], Region, Region]:
    """Returns the cells of an item's boxes by name, of all of them, and all others."""
    named = item.regions(grid)
    boxes = union_of(named.values(), ANYWHERE)
    others = grid.background(boxes, name=OTHERS)
    if len(others) < len(boxes):
        raise CannotRunError(
            f"The boxes of item {item.id!r} ({item.where}) cover {len(boxes)} of its picture's "
            f"{len(grid)} cells, so there are not as many other cells to compare with. Give boxes "
            "that cover at most half of a picture."
        )
    return named, boxes, others


def observations(pairs: Sequence[OwnPair]) -> list[str]:
    """Returns the observation of each pair: pairs that share a picture are one.

    So are pairs that are connected by other pairs.  An observation has the key of one of its
    pictures, the first in alphabetical order.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for pair in pairs:
        one, other = (root(question.image.key) for question in pair.questions)
        parent[max(one, other)] = min(one, other)
    return [root(pair.clean.image.key) for pair in pairs]


def _alike(items: Sequence[OwnItem]) -> tuple[OwnItem, ...]:
    """Returns items in which one answer has one spelling: that of its first row."""
    known: dict[str, str] = {}
    for item in items:
        for answer in item.answers:
            known.setdefault(normalise(answer), answer)

    def one(answer: str) -> str:
        return known[normalise(answer)]

    def of(item: OwnItem) -> Mapping[str, Any]:
        other = item.counterfactual_answer
        return {
            "answer": one(item.answer),
            "counterfactual_answer": None if other is None else one(other),
            "other_answers": tuple(map(one, item.other_answers)),
        }

    return tuple(replace(item, **of(item)) for item in items)
