"""Several interventions in one run: a `Chain` for users, a `Cell` for sweeps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.base import Edit, SiteName
from hooked_vlm.interventions.recording import Model, Recording


@dataclass(frozen=True, eq=False)
class Chain:
    """Several interventions, carried out in order (at one site: one after the other)."""

    parts: tuple[Any, ...]

    def __init__(self, *parts: Any) -> None:
        object.__setattr__(self, "parts", parts)

    def check(self, model: Model, inputs: Mapping[str, Any]) -> None:
        """Raises what is wrong with any part; runs nothing."""
        for part in self.parts:
            part.check(model, inputs)

    def hooks_for(self, model: Model, inputs: Mapping[str, Any]) -> list[Edit]:
        """Returns the hooks of all parts, in order."""
        return [hook for part in self.parts for hook in part.hooks_for(model, inputs)]

    def at_site(self, site: SiteName) -> "Chain":
        """Returns the same interventions, all at another site."""
        return Chain(*(part.at_site(site) for part in self.parts))

    def __str__(self) -> str:
        return f"Chain({', '.join(map(str, self.parts))})"


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
