"""Where a cell's rows join the batch, and what is done to them on the way."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hooked_vlm.engine import Cell
from hooked_vlm.interventions import site_of


BOUNDARY = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)$")
INSIDE = re.compile(r"blocks\.(\d+)\.")
BEHIND = ("ln_final.", "hook_logits")


@dataclass(frozen=True, eq=False)
class Step:
    """One intervention on a cell's rows: between two blocks, or at a site inside one."""

    part: Any
    site: str
    stage: int
    """The block that comes next (between blocks), or that the site is in; n_layers: behind all."""
    between: bool
    first: int
    """The first position that it changes."""

    @property
    def is_behind(self) -> bool:
        """Whether it is on what a block hands on, rather than on what the next one takes."""
        return self.site.endswith("hook_resid_post")


@dataclass(frozen=True, eq=False)
class Job:
    """A cell as rows of the growing batch."""

    index: int
    """The cell's number in its sweep; -1 for the control, which changes nothing."""
    stage: int
    """The block in front of which its rows join; n_layers: behind all blocks."""
    first: int
    """The first position that anything changes."""
    steps: tuple[Step, ...] = field(default=())

    def between(self, stage: int) -> list[Step]:
        """The steps on the residual stream in front of a block, as they come."""
        here = [step for step in self.steps if step.between and step.stage == stage]
        return sorted(here, key=lambda step: not step.is_behind)

    def inside(self) -> list[Step]:
        """The steps at other sites, in order."""
        return [step for step in self.steps if not step.between]


def ordered(interventions: Sequence[Any]) -> Iterator[Any]:
    """Yields every single intervention in the order in which they act."""
    for intervention in interventions:
        inner = getattr(intervention, "parts", None)
        if inner is None:
            yield intervention
        else:
            yield from ordered(inner)


def job_of(model: Any, inputs: Mapping[str, Any], cell: Cell, index: int) -> Job | None:
    """Returns a cell as a job, or None where it changes something that rows cannot carry.

    That is: anything in front of the language model's blocks but its merged input, and hook
    functions of one's own.
    """
    base = _steps(model, inputs, cell.base)
    own = _steps(model, inputs, cell.own)
    if base is None or own is None:
        return None
    n_layers = model.cfg.n_layers
    stage = min((step.stage for step in own), default=n_layers)
    # What the clean run kept in front of a block has the base's work in it already: it must
    # not come behind a step of the cell's own there, nor lie within the block.
    if any(step.stage > stage or (step.stage == stage and not step.between) for step in base):
        return None
    if any(a.stage == stage and not _before(a, b) for a in base for b in own if b.stage == stage):
        return None
    first = min((step.first for step in own), default=0)
    return Job(index, stage, first, tuple(own))


def _before(base: Step, own: Step) -> bool:
    """Whether a step of the base in front of a block acts before one of the cell's own."""
    return not (base.site.endswith("resid_pre") and own.site.endswith("resid_post"))


def _steps(model: Any, inputs: Mapping[str, Any], interventions: Sequence[Any]) -> Any:
    steps = []
    for part in ordered(interventions):
        if not hasattr(part, "first_position"):
            return None  # a hook function, or an intervention unknown here
        name = site_of(model, part.site).name
        place = place_of(name, model.cfg.n_layers)
        if place is None:
            return None
        stage, between = place
        steps.append(Step(part, name, stage, between, part.first_position(model, inputs)))
    return steps


def place_of(site: str, n_layers: int) -> tuple[int, bool] | None:
    """Returns a site's stage, and whether it is the residual stream between blocks, or None.

    >>> place_of("blocks.3.hook_resid_post", 6), place_of("blocks.3.attn.hook_z", 6)
    ((4, True), (3, False))
    """
    if site == "hook_merged_embed":
        return 0, True
    between = BOUNDARY.match(site)
    if between:
        return int(between[1]) + (between[2] == "post"), True
    inside = INSIDE.match(site)
    if inside:
        return int(inside[1]), False
    return (n_layers, False) if site.startswith(BEHIND) else None
