"""Where a cell's rows join the batch, and what is done to them on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from hooked_vlm.hooks.names import site_path
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.rows import known_grids
from hooked_vlm.interventions.chain import Cell, flattened, is_located


MERGED = "hook_merged_embed"
IN_FRONT = -1
"""The stage of sites whose edits reach the blocks only through block 0's input, if that is proved
for the model."""


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
    def is_after(self) -> bool:
        """Whether it acts on the output of a block, not on the input of the next one."""
        return self.site.endswith("hook_resid_post")

    @property
    def is_early(self) -> bool:
        """Whether it acts before what is at the next block's own site, however they are listed."""
        return self.is_after or self.site == MERGED


@dataclass(frozen=True, eq=False)
class RowPlan:
    """A cell as rows of the growing batch."""

    index: int
    """The cell's number in its sweep; -1 for the control."""
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
    model: Any,
    inputs: Mapping[str, Any],
    cell: Cell,
    index: int,
    *,
    merged_first: bool = True,
    first_image: Callable[[], int] | None = None,
) -> RowPlan | None:
    """Returns a cell as a job, or None where it changes something that rows cannot carry.

    That is: interventions of the user's own kind that may act anywhere, sites of theirs outside
    blocks, and what all cells begin with where it acts after the first of the cell's own.
    `merged_first` says that the merged embeddings are what the first block takes, and nothing is
    done to them on the way.  `first_image` returns the first token of any image, where many cells
    ask for it.
    """
    base, own = (
        _steps(model, inputs, part, merged_first, first_image) for part in (cell.base, cell.own)
    )
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


def _before(base: StageEdit, own: StageEdit) -> bool:
    """Whether a step of the base before a block acts before one of the cell's own."""
    return base.is_early or not own.is_early


def _steps(
    model: Any,
    inputs: Mapping[str, Any],
    interventions: Sequence[Any],
    merged_first: bool,
    first_image: Callable[[], int] | None = None,
) -> list[StageEdit] | None:
    """Returns interventions as steps, or None where one is of the user's own kind."""
    find_first = first_image or partial(first_image_token, model, inputs)
    steps = []
    for part in flattened(interventions):
        if not is_located(part):
            return None
        if not _is_placed(model.sites[part.site]):
            return None
        stage, between = stage_of(part.site, model.cfg.n_layers, merged_first=merged_first)
        is_vision = site_path(part.site).is_vision
        first = find_first() if is_vision else part.first
        steps.append(StageEdit(part, part.site, stage, between, first))
    return steps


def _is_placed(site: Site) -> bool:
    """Whether a site's name says when it runs; that of a user's site may not."""
    in_block = site.by_position and site_path(site.name).layer is not None
    return not site.own or site.by_image or in_block


def first_image_token(model: Any, inputs: Mapping[str, Any]) -> int:
    """Returns the first position of any image in any prompt."""
    if any("video" in name for name in inputs):
        return 0  # an edit in the encoder acts on videos, too
    return min((int(grid.positions.min()) for grid in known_grids(model, inputs)), default=0)


def stage_of(site: str, n_layers: int, *, merged_first: bool = True) -> tuple[int, bool]:
    """Returns the block that a site is in or before, and whether it lies between two blocks.

    The stage is `n_layers` after all blocks, and -1 before them.

    >>> stage_of("blocks.3.hook_resid_post", 6), stage_of("blocks.3.attn.hook_z", 6)
    ((4, True), (3, False))
    >>> stage_of("vision_projector.hook_out", 6), stage_of("hook_logits", 6)
    ((-1, False), (6, False))
    """
    path = site_path(site)
    if path.layer is not None and not path.is_vision:
        is_post = path.leaf == "hook_resid_post"
        return path.layer + is_post, is_post or path.leaf == "hook_resid_pre"
    if site == MERGED and merged_first:
        return 0, True
    if path.is_vision or site in (MERGED, "hook_embed"):
        return IN_FRONT, False
    return n_layers, False


def start_layer(model: Any, inputs: Mapping[str, Any], cell: Cell) -> int | None:
    """Returns the block from which on a cell can run alone, on the stream that its base left there.

    0: all blocks run.  None: something acts in the vision encoder, or may act anywhere.
    """
    base, own = (_steps(model, inputs, part, True) for part in (cell.base, cell.own))
    if base is None or own is None:
        return None
    if any(site_path(step.site).is_vision for step in (*base, *own)):
        return None
    # What is on a block's output needs that block to run.
    layers = [step.stage - step.is_after for step in own]
    layer = max(0, min([*layers, model.cfg.n_layers - 1]))
    is_past = all(step.stage <= layer if step.between else step.stage < layer for step in base)
    return layer if is_past else 0


def ids_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the tokens `[batch, pos]` that the language model runs on, if inputs hold them."""
    return inputs.get("input_ids", inputs.get("decoder_input_ids"))


def last_kept(arguments: Mapping[str, Any]) -> int | None:
    """Returns of how many last positions logits are asked for; 0 for all, None for any others."""
    asked_for = arguments.get("logits_to_keep", 0)
    return asked_for if isinstance(asked_for, int) and asked_for >= 0 else None


def prompt_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns which of those tokens are no padding, if inputs say it."""
    part = "" if "input_ids" in inputs else "decoder_"
    return inputs.get(f"{part}attention_mask")
