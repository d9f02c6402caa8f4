"""Where a cell's rows join the batch, and what is done to them on the way."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hooked_vlm.interventions.chain import Cell, flattened


BOUNDARY = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)$")
INSIDE = re.compile(r"blocks\.(\d+)\.")
BEHIND = ("ln_final.", "hook_logits")
MERGED = "hook_merged_embed"
IN_FRONT = ("vision_encoder.", "vision_projector.", "hook_embed")
"""Prefixes of sites whose edits reach the blocks only through block 0's input, if `Early` proves
it for the model."""


@dataclass(frozen=True, eq=False)
class StageEdit:
    """One intervention on a cell's rows: between two blocks, or at a site inside one."""

    part: Any
    site: str
    stage: int
    """The block that comes next (between blocks), or that the site is in; n_layers: after all.

    -1 stands for whatever comes before all blocks."""
    between: bool
    first: int
    """The first position that it changes."""

    @property
    def is_behind(self) -> bool:
        """Whether it is on what a block returns, rather than on what the next one takes."""
        return self.site.endswith("hook_resid_post")

    @property
    def is_early(self) -> bool:
        """Whether it acts before what is at the next block's own site, however they are listed."""
        return self.is_behind or self.site == MERGED


@dataclass(frozen=True, eq=False)
class RowPlan:
    """A cell as rows of the growing batch."""

    index: int
    """The cell's number in its sweep; -1 for the control, which changes nothing."""
    stage: int
    """The block before which its rows join; n_layers: after all blocks."""
    first: int
    """The first position that anything changes."""
    steps: tuple[StageEdit, ...] = field(default=())
    front: tuple[Any, ...] = field(default=())
    """Interventions before the blocks, those that all cells begin with among them: then rows
    start as what a pass under these gives."""

    def between(self, stage: int) -> list[StageEdit]:
        """The steps on the residual stream before a block, as they come."""
        here = [step for step in self.steps if step.between and step.stage == stage]
        return sorted(here, key=lambda step: not step.is_early)

    def inside(self) -> list[StageEdit]:
        """The steps at other sites, in order."""
        return [step for step in self.steps if not step.between]


def job_of(
    model: Any, inputs: Mapping[str, Any], cell: Cell, index: int, *, merged_first: bool = True
) -> RowPlan | None:
    """Returns a cell as a job, or None where it changes something that rows cannot carry.

    That is: hook functions of one's own, and what all cells begin with where it acts after the
    first of the cell's own.  `merged_first` says that the merged embeddings are what the first
    block takes, and nothing is done to them on the way.
    """
    base = _steps(model, inputs, cell.base, merged_first)
    own = _steps(model, inputs, cell.own, merged_first)
    if base is None or own is None:
        return None
    n_layers = model.cfg.n_layers
    if any(step.stage < 0 for step in own):
        # The pass that makes the rows carries out what comes before, of all cells' beginning too;
        # what that does to the blocks' input has to be done to the rows.
        front = [step for step in (*base, *own) if step.stage < 0]
        steps = [step for step in (*base, *own) if step.stage >= 0]
        base = [step for step in base if step.stage >= 0]
        if any(step.stage > 0 or not step.between for step in base):
            return None
        first = min(step.first for step in (*front, *steps))
        return RowPlan(index, 0, first, tuple(steps), tuple(step.part for step in front))
    stage = min((step.stage for step in own), default=n_layers)
    # What the clean run kept before a block has the base's work in it already: it must
    # not come after a step of the cell's own there, nor lie within the block.
    if any(step.stage > stage or (step.stage == stage and not step.between) for step in base):
        return None
    if any(a.stage == stage and not _before(a, b) for a in base for b in own if b.stage == stage):
        return None
    first = min((step.first for step in own), default=0)
    return RowPlan(index, stage, first, tuple(own))


def in_front(model: Any, interventions: Sequence[Any], *, merged_first: bool = True) -> list[Any]:
    """Returns those of some interventions that act before the language model's blocks."""
    found = []
    for part in flattened(interventions):
        name = part.site if hasattr(part, "first") else ""
        place = place_of(name, model.cfg.n_layers, merged_first=merged_first)
        if place is not None and place[0] < 0:
            found.append(part)
    return found


def _before(base: StageEdit, own: StageEdit) -> bool:
    """Whether a step of the base before a block acts before one of the cell's own."""
    return base.is_early or not own.is_early


def _steps(
    model: Any, inputs: Mapping[str, Any], interventions: Sequence[Any], merged_first: bool
) -> list[StageEdit] | None:
    steps = []
    for part in flattened(interventions):
        if not hasattr(part, "first"):
            return None  # an intervention of the user's own
        name = part.site
        place = place_of(name, model.cfg.n_layers, merged_first=merged_first)
        if place is None:
            return None
        stage, between = place
        if name.startswith(("vision_encoder.", "vision_projector.")):
            first = _first_image_token(model, inputs)
        else:
            first = part.first
        steps.append(StageEdit(part, name, stage, between, first))
    return steps


def _first_image_token(model: Any, inputs: Mapping[str, Any]) -> int:
    grids = [grid for row in model.grids(inputs) for grid in row]
    return min((int(grid.positions.min()) for grid in grids), default=0)


def place_of(site: str, n_layers: int, *, merged_first: bool = True) -> tuple[int, bool] | None:
    """Returns a site's stage, and whether it is the residual stream between blocks, or None.

    >>> place_of("blocks.3.hook_resid_post", 6), place_of("blocks.3.attn.hook_z", 6)
    ((4, True), (3, False))
    >>> place_of("vision_projector.hook_out", 6)
    (-1, False)
    """
    if site == MERGED and merged_first:
        return 0, True
    if site == MERGED or site.startswith(IN_FRONT):
        return -1, False
    between = BOUNDARY.match(site)
    if between:
        return int(between[1]) + (between[2] == "post"), True
    inside = INSIDE.match(site)
    if inside:
        return int(inside[1]), False
    return (n_layers, False) if site.startswith(BEHIND) else None


def first_layer(model: Any, cell: Cell) -> int | None:
    """Returns the first LM block that a cell changes something of, or None before them.

    0 stands for the embeddings too: all blocks run.  A cell without interventions of its own
    starts at the last block.
    """
    layers = layers_of(model, cell.own)
    return None if layers is None else min([*layers, model.cfg.n_layers - 1])


def layers_of(model: Any, interventions: Sequence[Any]) -> list[int] | None:
    """Returns the LM blocks that interventions change something of, or None for any other place.

    What is after the last block counts as that block.
    """
    layers = []
    for part in flattened(interventions):
        if not hasattr(part, "first"):
            return None  # an intervention of the user's own
        name = part.site
        block = re.match(r"blocks\.(\d+)\.", name)
        if block is not None:
            layers.append(int(block[1]))
        elif name in ("hook_embed", "hook_merged_embed"):
            layers.append(0)
        elif name.startswith(("ln_final", "hook_logits")):
            layers.append(model.cfg.n_layers - 1)
        else:
            return None
    return layers
