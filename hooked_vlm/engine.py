"""Executing the cells of a sweep: plainly, one hooked forward pass each.

This is the definition that any faster way of executing a sweep is tested against.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.interventions.chain import Cell


def run_plain(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Callable[[Tensor], Tensor],
    on_progress: Callable[[int, int], None] | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Returns the metric of every cell, from one forward pass under its hooks each."""
    scores = []
    with torch.no_grad():
        for done, cell in enumerate(cells, start=1):
            logits = model.run_with_hooks(inputs, cell.interventions, **(forward_kwargs or {}))
            scores.append(metric(logits))
            if on_progress is not None:
                on_progress(done, len(cells))
    return scores
