"""What passes cost in floating-point operations, counted from module sizes; nothing runs.

A linear map costs two operations for each weight and row, attention four for each query, key
and number of a head.  Norms, activations and the embedding are left out: they are below a
hundredth.  All of it works on the `meta` device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from hooked_vlm.anatomy.parts import is_linear


@dataclass(frozen=True)
class Costs:
    """Operations of a model's parts, for one prompt or row."""

    block: int
    """Of one block's linear maps, for one position."""
    trimmed: int
    """The share of that which the last block needs for its last position alone."""
    attention: int
    """Of one block's attention, for one query and one key."""
    head: int
    """Of the vocabulary, for one position."""
    n_layers: int
    vision: int
    """Of the vision encoder and projector, for all images of the inputs."""

    def rows(
        self, n_rows: int, n: int, length: int, first: int = 0, *, last_only: bool = False
    ) -> int:
        """Returns what `n_rows` rows of `n` positions cost in blocks `first` and above.

        They see `length` positions.  With `last_only` the last block runs trimmed.
        """
        n_blocks = self.n_layers - first
        if n_blocks <= 0:
            return 0
        each = n * self.block + n * length * self.attention
        total = n_blocks * each
        if last_only:
            total -= (n - 1) * self.trimmed
        return n_rows * total


def costs_of(model: Any, inputs: Mapping[str, Any]) -> Costs:
    """Returns a model's costs; blocks are taken to be as costly as their mean."""
    lm, whole = model.anatomy.lm, model.hf_model
    blocks = [whole.get_submodule(block.path) for block in lm.blocks]
    cfg = model.cfg
    last = lm.blocks[-1]
    paths = [last.attn and last.attn.out, last.mlp and last.mlp.path]
    trimmed = sum(_linear(whole.get_submodule(path)) for path in paths if path)
    return Costs(
        block=sum(_linear(block) for block in blocks) // len(blocks),
        trimmed=trimmed,
        attention=4 * cfg.n_heads * cfg.d_head,
        head=2 * cfg.d_model * cfg.d_vocab,
        n_layers=len(blocks),
        vision=_vision(model, inputs),
    )


def _linear(module: nn.Module) -> int:
    return 2 * sum(
        m.in_features * m.out_features  # type: ignore[operator]
        for m in module.modules()
        if is_linear(m)
    )


def _vision(model: Any, inputs: Mapping[str, Any]) -> int:
    vision = model.anatomy.vision
    grids = [grid for row in model.grids(inputs) for grid in row]
    if vision is None or not grids:
        return 0
    total = 0
    blocks = [model.hf_model.get_submodule(block.path) for block in vision.blocks]
    width = model.cfg.vision.n_heads * model.cfg.vision.d_head
    for grid in grids:
        n = grid.patch_rows * grid.patch_cols
        total += sum(n * _linear(block) + 4 * n * n * width for block in blocks)
        if model.anatomy.projector:
            projector = model.hf_model.get_submodule(model.anatomy.projector)
            total += len(grid) * _linear(projector)
    patches = inputs.get("pixel_values")
    if isinstance(patches, Tensor):
        total += 2 * prod(patches.shape) * width
    return total
