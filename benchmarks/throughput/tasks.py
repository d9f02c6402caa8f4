"""What is timed: sweeps as data, so that every tool carries out the same ones.

A cell writes source activations at some positions of a stream of activations (the residual
stream of the language model or of the vision encoder, or the heads' outputs), or moves what is
there along a direction.  Positions are those of the prompt (or of the encoder's rows), the same
in every prompt of a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.common.parts import patch_rows, split_heads
from hooked_vlm.regions.pairs import CellPairs, swap_pairs
from hooked_vlm.regions.region import Region


class Cannot(Exception):  # noqa: N818 - no error: it goes into the table
    """A tool has no way to carry out a task; says why."""


TASKS = ("strip", "object", "final_token", "alpha", "head", "vision")


@dataclass(frozen=True, eq=False)
class Cell:
    """One intervention."""

    stream: str
    """`"resid"` (layer: slot), `"z"` or `"vision"` (layer: the block whose output it is)."""
    layer: int
    targets: Tensor
    sources: Tensor
    pairs: CellPairs | None = None
    """The same as cells of the image, for a tool that knows images."""
    head: int = -1
    n_heads: int = 1
    alpha: float | None = None
    """None: a write of source activations; else a step along `direction`."""
    direction: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A sweep over cells, on `clean`, with `source` as the other run."""

    name: str
    clean: Mapping[str, Tensor]
    source: Mapping[str, Tensor]
    cells: list[Cell] = field(default_factory=list)
    zeroed: Tensor | None = None
    """Positions that every cell begins with at zero, before all blocks."""
    removed: Region | None = None
    """The same as a region, for a tool that knows images."""
    questions: int = 1
    """Prompts about each image; a batch has all first questions, then all second ones."""


def make_task(
    name: str,
    clean: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    *,
    n_layers: int,
    n_vision: int,
    n_heads: int,
    width: int,
    first_image: int,
    side: int,
    family: str,
    questions: int = 1,
) -> Task:
    """Returns a task on prompts with one image of `side` x `side` tokens from `first_image` on.

    `n_vision` are the blocks of the vision encoder that the language model gets to see.
    """
    task = Task(name, clean, source, questions=questions)
    third, low, shape = side // 3, (side - 2) // 2, (side, side)
    last = torch.tensor([clean["input_ids"].shape[1] - 1])
    if name in ("strip", "object", "vision"):
        regions = Region.column_band(shape, 0, third), Region.column_band(shape, side - third, side)
        if name == "object":
            left = Region.rectangle(shape, rows=(low, low + 2), cols=(1, 3))
            regions = left, left.shifted(cols=side - 4)
        pairs = swap_pairs(*regions)
        targets, sources = pairs.tokens()
        if name == "vision":
            rows = patch_rows(family, side)
            targets, sources = rows[targets].flatten(), rows[sources].flatten()
            layers, stream = range(n_vision), "vision"
        else:
            targets, sources = targets + first_image, sources + first_image
            layers, stream = range(n_layers + 1), "resid"
        task.cells.extend(Cell(stream, layer, targets, sources, pairs) for layer in layers)
    elif name == "final_token":
        task.cells.extend(Cell("resid", slot, last, last) for slot in range(n_layers + 1))
    elif name == "alpha":
        direction = torch.randn(width, generator=torch.Generator().manual_seed(0))
        tokens = first_image + torch.arange(side * side)
        task.cells.extend(
            Cell("resid", 0, tokens, tokens, alpha=float(alpha), direction=direction)
            for alpha in range(16)
        )
    else:
        task.cells.extend(
            Cell("z", layer, last, last, head=head, n_heads=n_heads)
            for layer in range(n_layers)
            for head in range(n_heads)
        )
    return task


def edited(cell: Cell, here: Tensor, there: Tensor | None) -> Tensor:
    """Returns an activation `[batch, pos, ...]` with a cell carried out on it."""
    changed = here.clone()
    if cell.alpha is not None:
        assert cell.direction is not None
        if cell.alpha:
            changed[:, cell.targets] += cell.alpha * cell.direction.to(here)
        return changed
    assert there is not None
    if cell.head >= 0:
        changed[:, cell.targets, cell.head] = there[:, cell.sources, cell.head]
    else:
        changed[:, cell.targets] = there[:, cell.sources]
    return changed


def edited_rows(cell: Cell, here: Tensor, there: Tensor, batch: int) -> Tensor:
    """Returns an encoder's output with a cell carried out, where images may share one axis."""
    split = [x.reshape(batch, -1, x.shape[-1]) for x in (here, there)]
    return edited(cell, *split).reshape(here.shape)


def edited_heads(cell: Cell, here: Tensor, there: Tensor) -> Tensor:
    """Returns what an attention's output map reads with a cell carried out on one head."""
    return edited(cell, *(split_heads(z, cell.n_heads) for z in (here, there))).flatten(-2)
