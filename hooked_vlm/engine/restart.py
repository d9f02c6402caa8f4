"""Cells of a sweep run from where they first differ from the clean run.

An intervention at block l of the language model leaves the vision encoder and all blocks
below l as they were.  So the clean pass runs once, its residual stream before the
blocks in question and the encoder's output are kept, and every cell runs from its first
changed block on.  The numbers are those of `run.run_plain`, bit for bit: before a model
is trusted with it, clean passes run both ways and must agree exactly, and whatever cannot
be started this way (hooks that are open, a model whose blocks depend on more than their
input) runs plainly.  Cells that edit the vision encoder run all of the language model, and
of the encoder what is not below their edit (`vision`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.run import run_plain
from hooked_vlm.engine.stages import first_layer, layers_of
from hooked_vlm.engine.vision import TowerRestart
from hooked_vlm.hooks.stand_ins import encoder_of, recording, replaying
from hooked_vlm.interventions.chain import Cell


FEWEST = 4
"""Cells from which on it pays to run the clean passes that prove it right."""
BUDGET = 2**30
"""Bytes of residual streams that may be kept."""

Metric = Callable[[Tensor], Tensor]
OnProgress = Callable[[int, int], None]


def run_cells(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    on_progress: OnProgress | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Returns the metric of every cell, as `run_plain` does, by the shortest way that is safe."""
    arguments = dict(forward_kwargs or {})
    with torch.no_grad():
        start: Restart | TowerRestart | None = Restart.of(model, inputs, cells, arguments)
        if start is None and len(cells) >= FEWEST:
            start = TowerRestart.of(model, inputs, [cell.interventions for cell in cells])
        if start is None:
            return run_plain(model, inputs, cells, metric, on_progress, forward_kwargs)
        scores = []
        for done, cell in enumerate(cells, start=1):
            scores.append(metric(start.run(cell, arguments)))
            if on_progress is not None:
                on_progress(done, len(cells))
    return scores


@dataclass(frozen=True, eq=False)
class Restart:
    """A clean pass, kept where cells start from."""

    model: Any
    inputs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    base: Sequence[Any]
    """Interventions that every cell begins with."""
    residuals: Mapping[int, Tensor]
    """The residual stream before a block, by its index, under `base`."""
    encoded: Sequence[Any] | None
    """What each call of the vision encoder returned; None where it was not called."""
    plain: Tensor
    """The logits of the clean pass (under `base`)."""

    @classmethod
    def of(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        cells: Sequence[Cell],
        arguments: Mapping[str, Any],
    ) -> "Restart | None":
        """Returns a start that was proved exact on these inputs, or None where there is none."""
        if len(cells) < FEWEST or model.is_hooked or model.hf_model.training:
            return None
        base = cells[0].base
        touched = layers_of(model, base)
        layers = [first_layer(model, cell) for cell in cells]
        if touched is None or None in layers:
            return None
        # What the base does at a block must be after the start.
        lowest = max(touched, default=-1)
        starts = {layer for layer in layers if layer is not None and layer > max(lowest, 0)}

        def proved() -> "Restart | None":
            made = cls._recorded(model, inputs, arguments, base, starts)
            return made if made._is_exact() else None

        try:
            return attempt(proved, "the model could not be restarted between its blocks")
        except GrowthError:
            return None  # what is wrong, if it is, shows in a plain pass

    @classmethod
    def _recorded(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        arguments: Mapping[str, Any],
        base: Sequence[Any],
        starts: set[int],
    ) -> "Restart":
        # A pass of its own, once a model: while the encoder replays, none may come between.
        model.block_outputs(lambda: model(inputs, **arguments))
        with recording(encoder_of(model)) as encoded:
            sites = [_site(layer) for layer in sorted(starts)]
            plain, cache = model.run_with_cache(inputs, sites, fwd_hooks=base, **arguments)
        each = max((cache[_site(layer)].nbytes for layer in starts), default=1)
        kept = spread(sorted(starts), max(1, BUDGET // each))
        residuals = {layer: cache[_site(layer)] for layer in kept}
        return cls(model, inputs, arguments, base, residuals, encoded or None, plain)

    def run(self, cell: Cell, arguments: Mapping[str, Any]) -> Tensor:
        """Returns the logits of a cell."""
        layer = first_layer(self.model, cell)
        below = [start for start in self.residuals if layer is not None and start <= layer]
        with replaying(encoder_of(self.model), self.encoded):
            if not below:
                return self.model.run_with_hooks(self.inputs, cell.interventions, **arguments)
            start = max(below)
            return self.model.run_from_layer(
                self.inputs, self.residuals[start], start, cell.own, **arguments
            )

    def _is_exact(self) -> bool:
        """Whether clean passes from the first and the last start give the plain one's logits.

        The first one runs twice, to catch replay that mutates the recorded tensors.
        """
        first, last = min(self.residuals, default=0), max(self.residuals, default=0)
        for layer in (first, last, first):
            with replaying(encoder_of(self.model), self.encoded):
                if layer:
                    residual = self.residuals[layer]
                    again = self.model.run_from_layer(
                        self.inputs, residual, layer, **self.arguments
                    )
                else:
                    again = self.model.run_with_hooks(self.inputs, self.base, **self.arguments)
            if not torch.equal(again, self.plain):
                return False
        return True


def spread(layers: Sequence[int], most: int) -> list[int]:
    """Returns at most so many of some layers, evenly spread, the first among them.

    >>> spread([1, 2, 3, 4, 5], 2)
    [1, 4]
    """
    step = -(-len(layers) // most) if layers else 1
    return list(layers[::step])


def _site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"
