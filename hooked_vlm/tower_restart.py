"""Cells that edit the vision encoder, from the first of its blocks that they change.

Every token sees all others there, so cells have only the blocks below their first change in
common with the clean run; those hand on what they did in it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.errors import HookedVLMError
from hooked_vlm.hooks.stand_ins import encoder_of, recording, replaying
from hooked_vlm.interventions.base import site_of
from hooked_vlm.interventions.chain import Cell, parts_of
from hooked_vlm.known import known, shapes_of, ways_of_attending


BUDGET = 2**31
"""Bytes of what blocks returned that may be kept."""
BEHIND_BLOCKS = ("vision_encoder.hook_out", "vision_projector.", "blocks.", "ln_final.", "hook_")
"""Where names begin that no block of the vision encoder comes behind."""


@dataclass(frozen=True, eq=False)
class TowerRestart:
    """A clean pass through the vision encoder, kept block by block."""

    model: Any
    inputs: Mapping[str, Any]
    blocks: Sequence[nn.Module]
    outputs: Sequence[Sequence[Any]]
    """What each call of each block returned."""
    encoded: Sequence[Any]
    """What each call of the whole encoder returned."""

    @classmethod
    def of(
        cls, model: Any, inputs: Mapping[str, Any], interventions: Sequence[Sequence[Any]]
    ) -> "TowerRestart | None":
        """Returns a start for some cells' interventions, or None where there is none.

        The first time for inputs of these shapes it is proved to give the same bits.
        """
        if model.is_hooked or model.hf_model.training or model.anatomy.vision is None:
            return None
        depth = max((tower_depth(model, each) for each in interventions), default=0)
        if not depth or depth * _block_bytes(model, inputs) > BUDGET:
            return None
        paths = [block.path for block in model.anatomy.vision.blocks[:depth]]
        blocks = [model.hf_model.get_submodule(path) for path in paths]
        try:
            with ExitStack() as stack:
                outputs = [stack.enter_context(recording(block)) for block in blocks]
                encoded = _encoded(model, inputs)
            made = cls(model, inputs, blocks, outputs, encoded)
            kind = ("tower", depth, shapes_of(inputs), ways_of_attending(model))
            return made if known(model, kind, made._is_exact) else None
        except (HookedVLMError, RuntimeError, KeyError, TypeError, ValueError):
            return None  # what is wrong, if it is, shows plainly

    def _is_exact(self) -> bool:
        with self._replaying(len(self.blocks)):
            again = _encoded(self.model, self.inputs)
        one, other = _tensors(self.encoded), _tensors(again)
        return len(one) == len(other) > 0 and all(map(torch.equal, one, other))

    def run(self, cell: Cell, arguments: Mapping[str, Any]) -> Tensor:
        """Returns the logits of a cell."""
        with self.below(cell.interventions):
            return self.model.run_with_hooks(self.inputs, cell.interventions, **arguments)

    @contextmanager
    def below(self, interventions: Sequence[Any]) -> Iterator[None]:
        """Lets the blocks below some interventions hand on what they did, in a `with` block."""
        with self._replaying(tower_depth(self.model, interventions)):
            yield

    @contextmanager
    def _replaying(self, depth: int) -> Iterator[None]:
        with ExitStack() as stack:
            for block, outputs in zip(self.blocks[:depth], self.outputs, strict=False):
                stack.enter_context(replaying(block, outputs))
            yield


def _encoded(model: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """Returns all that the encoder hands on, from a pass that ends behind it."""
    with recording(encoder_of(model)) as found:
        site = "vision_encoder.blocks.0.hook_resid_pre"
        model.run_with_cache(inputs, [site], stop_at_layer=0)
    return list(found)


def _block_bytes(model: Any, inputs: Mapping[str, Any]) -> int:
    """Returns about how many bytes a block of the encoder returns for some inputs' images."""
    grids = [grid for row in model.grids(inputs) for grid in row]
    n_patches = sum(grid.patch_rows * grid.patch_cols for grid in grids)
    return n_patches * model.cfg.vision.d_model * model.cfg.dtype.itemsize


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def tower_depth(model: Any, interventions: Sequence[Any]) -> int:
    """Returns how many of the vision encoder's blocks lie below all changes; 0 for no changes."""
    depths = [model.cfg.vision.n_layers]
    for part in parts_of(interventions):
        if not hasattr(part, "site"):
            return 0
        name = site_of(model, part.site).name
        block = re.match(r"vision_encoder\.blocks\.(\d+)\.(.*)", name)
        if block is not None:
            depths.append(int(block[1]) + (block[2] == "hook_resid_post"))
        elif not name.startswith(BEHIND_BLOCKS):
            return 0
    return min(depths)
