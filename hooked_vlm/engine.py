"""Executing the cells of a sweep: plainly, one hooked forward pass each.

This is the definition that any faster way of executing a sweep is tested against.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.interventions import Ablate, Chain
from hooked_vlm.recordings import Recording


@dataclass(frozen=True, eq=False)
class Cell:
    """One combination of a sweep's axes: where it stands, and what is done there."""

    coords: tuple[Any, ...]
    interventions: tuple[Any, ...]
    n_base: int = 0
    """How many of the interventions, from the first on, all cells have in common."""

    @property
    def base(self) -> tuple[Any, ...]:
        """The interventions that all cells begin with."""
        return self.interventions[: self.n_base]

    @property
    def own(self) -> tuple[Any, ...]:
        """The interventions of this cell alone."""
        return self.interventions[self.n_base :]

    def with_sources(self, recorded: Mapping[int, Recording]) -> "Cell":
        """Returns the cell with its interventions reading recorded runs (by `id` of the inputs)."""
        return replace(self, interventions=tuple(_sourced(i, recorded) for i in self.interventions))


def parts_of(interventions: Sequence[Any]) -> Iterator[Any]:
    """Yields every single intervention, those inside chains too."""
    pending = list(interventions)
    while pending:
        part = pending.pop()
        inner = getattr(part, "parts", None)
        if inner is None:
            yield part
        else:
            pending += inner


def source_of(intervention: Any) -> tuple[str, Any]:
    """Returns the field of an intervention that names another run, and that run (or None)."""
    name = "reference" if isinstance(intervention, Ablate) else "source"
    return name, getattr(intervention, name, None)


def _sourced(intervention: Any, recorded: Mapping[int, Recording]) -> Any:
    if isinstance(intervention, Chain):
        return Chain(*(_sourced(part, recorded) for part in intervention.parts))
    name, source = source_of(intervention)
    if source is not None and id(source) in recorded:
        return replace(intervention, **{name: recorded[id(source)]})
    return intervention


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
