"""Cells that edit the vision encoder or act elsewhere before the language model's blocks.

In the encoder every token sees all others, so cells have only the blocks below their first
change in common with the clean run; those return what they returned in it.  In a growing batch,
what comes of the encoder and of edits on pixels' way or on embeddings, the blocks' input,
joins before block 0.  That is right where the blocks get nothing else that depends on
the encoder (as in DeepStack or by cross-attention they do); `proofs` tries it out on noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.clean_run import asked
from hooked_vlm.engine.fingerprints import remember, shapes_of, ways_of_attending
from hooked_vlm.engine.stages import MERGED, RowPlan
from hooked_vlm.hooks.names import VISION, site_path
from hooked_vlm.hooks.stand_ins import encoder_of, ending_encoded, keeping, recording
from hooked_vlm.inputs.rows import known_grids
from hooked_vlm.interventions.chain import Cell, flattened, is_located


BUDGET = 2**31
"""Bytes of what blocks returned that may be kept."""


@dataclass(frozen=True, eq=False)
class TowerRestart:
    """What a clean pass through the vision encoder returns, block by block.

    Once it is proved, no such pass is made: each cell's own gives what lies below its edit.
    """

    model: Any
    inputs: Mapping[str, Any]
    blocks: Sequence[nn.Module]
    outputs: Sequence[list[Any]]
    """What each call of each block returned; empty until a pass gives it."""
    encoded: list[Any]
    """What each call of the whole encoder returned; empty until a pass gives it."""
    embed: nn.Module | None
    """The patches' embedding, which lies below all blocks."""
    embedded: list[Any]
    """What each call of it returned; empty until a pass gives it."""

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
        own, part = model.anatomy.vision, model.hf_model.get_submodule
        blocks = [part(block.path) for block in own.blocks[:depth]]
        embed = part(own.patch_embed) if own.patch_embed else None
        made = cls(model, inputs, blocks, [[] for _ in blocks], [], embed, [])
        kind = ("tower", depth, shapes_of(inputs), ways_of_attending(model))

        def is_exact() -> bool:
            return attempt(made._is_exact, "the encoder's blocks could not be recorded")

        try:
            return made if remember(model, kind, is_exact) else None
        except GrowthError:
            return None  # what is wrong, if it is, shows in a plain pass

    def _is_exact(self) -> bool:
        with self._replaying(len(self.blocks)):
            self.encoded.extend(_encoded(self.model, self.inputs))
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
        """Replays the blocks below some interventions, for the length of a `with` block.

        A pass within it makes what is not there yet; there must be one, and no more.
        """
        with self._replaying(tower_depth(self.model, interventions)):
            yield

    @contextmanager
    def _replaying(self, depth: int) -> Iterator[None]:
        with ExitStack() as stack:
            if depth:
                stack.enter_context(keeping(self.embed, self.embedded))
            for block, outputs in zip(self.blocks[:depth], self.outputs, strict=False):
                stack.enter_context(keeping(block, outputs))
            yield


def _encoded(model: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """Returns all that the encoder returns, from a pass that ends after it."""
    encoder = encoder_of(model)
    with recording(encoder) as found, ending_encoded(encoder, inputs):
        site = "vision_encoder.blocks.0.hook_resid_pre"
        model.run_with_cache(inputs, [site], stop_at_layer=0)
    return list(found)


def _block_bytes(model: Any, inputs: Mapping[str, Any]) -> int:
    """Returns about how many bytes a block of the encoder returns for some inputs' images."""
    n_patches = sum(g.patch_rows * g.patch_cols for g in known_grids(model, inputs))
    return n_patches * model.cfg.vision.d_model * model.cfg.dtype.itemsize


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def tower_depth(model: Any, interventions: Sequence[Any]) -> int:
    """Returns how many of the vision encoder's blocks lie below all changes; 0 for no changes."""
    depths = [model.cfg.vision.n_layers]
    for part in flattened(interventions):
        if not is_located(part):
            return 0  # an intervention of the user's own may act anywhere
        path = site_path(part.site)
        if path.tower != VISION or path.leaf == "hook_out":
            continue  # no block of the encoder runs after it
        if path.layer is None:
            return 0
        depths.append(path.layer + (path.leaf == "hook_resid_post"))
    return min(depths)


FIRST = "blocks.0.hook_resid_pre"


@dataclass(frozen=True, eq=False)
class Early:
    """Makes the blocks' input of jobs that act before them."""

    model: Any
    inputs: Mapping[str, Any]
    tower: TowerRestart | None

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any], jobs: Sequence[RowPlan]) -> "Early":
        """Records what the jobs' passes through the encoder have in common."""
        fronts = [job.front for job in jobs if job.front]
        tower = TowerRestart.of(model, inputs, fronts) if len(fronts) > 1 else None
        return cls(model, inputs, tower)

    def rows(self, front: Sequence[Any]) -> Tensor:
        """Returns the blocks' input `[batch, pos, d_model]` under some interventions."""
        with self.under(front):
            return self.model.run_with_cache(asked(self.inputs), [FIRST], stop_at_layer=0)[0]

    @contextmanager
    def under(self, front: Sequence[Any]) -> Iterator[None]:
        """Puts interventions on one pass, whose encoder begins where they change something."""
        with ExitStack() as stack:
            if self.tower is not None and self._encodes(front):
                stack.enter_context(self.tower.below(front))
            elif self.tower is not None:
                stack.enter_context(keeping(encoder_of(self.model), self.tower.encoded))
            # Their hooks come first: the blocks' input is noted as they left it.
            stack.enter_context(self.model.hooks(front, inputs=self.inputs))
            yield

    def _encodes(self, front: Sequence[Any]) -> bool:
        """Whether any intervention is on pixels' way (some encoders hold their projector)."""
        return any(site_path(part.site).is_vision for part in front)


def merges_first(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the merged embeddings are what the first block takes, bit for bit."""

    def find_out() -> bool:
        if MERGED not in model.sites or model.device.type == "meta":
            return True
        with torch.no_grad():
            _, cache = model.run_with_cache(asked(inputs), [MERGED, FIRST], stop_at_layer=1)
        return torch.equal(cache[MERGED], cache[FIRST])

    # Torch hooks of others may lie between the two, and so may what only some inputs bring.
    kind = ("merged embeddings come first", tuple(sorted(inputs)), ways_of_attending(model))
    return remember(model, kind, find_out)
