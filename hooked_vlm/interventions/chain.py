"""Several interventions in one run: a `Chain` for users, a `Cell` for sweeps."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.displayed import OneLine, html_block, html_opened
from hooked_vlm.arguments.kinds import is_whole
from hooked_vlm.errors import InterventionError, UnknownHookError, counted
from hooked_vlm.hooks.names import select_names
from hooked_vlm.hooks.of_interventions import hooks_of
from hooked_vlm.hooks.prompts import require_generation
from hooked_vlm.interventions.base import _Bound
from hooked_vlm.interventions.hook_at import HookAt, PlacedHook
from hooked_vlm.interventions.placing import Edit, Placed, Places, SiteName
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.model.base import HookedModel


@dataclass(frozen=True, eq=False, repr=False)
class Chain(OneLine):
    """Several interventions, carried out in order (at one site: one after the other)."""

    parts: tuple[Any, ...]

    @checked(InterventionError)
    def __init__(self, *parts: Any) -> None:
        for part in parts:
            if not hasattr(part, "hooks_for"):
                raise InterventionError(
                    f"Chain was given {shown(part)}; expected interventions, such as Patch(…)."
                )
        object.__setattr__(self, "parts", parts)

    def check(self, model: HookedModel, inputs: Mapping[str, Any]) -> None:
        """Raises what is wrong with any part; runs nothing."""
        for part in self.parts:
            if hasattr(part, "check"):
                part.check(model, inputs)

    def hooks_for(self, model: HookedModel, inputs: Mapping[str, Any]) -> list[Edit]:
        """Returns the hooks of all parts, in order."""
        return [hook for part in self.parts for hook in hooks_of(part, model, inputs)]

    @checked(UnknownHookError)
    def at_site(self, site: SiteName) -> "Chain":
        """Returns the same interventions, all at another site."""
        for part in self.parts:
            if not hasattr(part, "at_site"):
                raise UnknownHookError(
                    f"{shown(part)} cannot be moved to another site: its class has no "
                    "at_site(site). Write the method, or make the Chain anew."
                )
        return Chain(*(part.at_site(site) for part in self.parts))

    def _repr_html_(self) -> str:
        parts = [html_opened(str(number), part) for number, part in enumerate(self.parts)]
        return html_block(f"Chain of {counted(len(self.parts), 'part')}", *parts)

    def __str__(self) -> str:
        return f"Chain({', '.join(map(str, self.parts))})"


@dataclass(frozen=True, eq=False)
class Cell:
    """One combination of a sweep's axes: where it is, and what is done there."""

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

    def placed(self, model: HookedModel, inputs: Mapping[str, Any], places: Places) -> "Cell":
        """Returns the cell with every intervention checked and located, those in chains too.

        Raises what is wrong with any of them; nothing runs.
        """
        base, own = (
            tuple(x for part in flattened(these) for x in _placed(part, model, inputs, places))
            for these in (self.base, self.own)
        )
        return Cell(self.coords, (*base, *own), len(base))

    def with_sources(self, recorded: Mapping[int, Recording]) -> "Cell":
        """Returns the cell with its interventions reading recorded runs (by `id` of the inputs)."""
        return replace(self, interventions=tuple(_reading(i, recorded) for i in self.interventions))


def flattened(interventions: Iterable[Any]) -> Iterator[Any]:
    """Yields every single intervention in the order in which they act, those in chains too."""
    for intervention in interventions:
        if isinstance(intervention, Chain):
            yield from flattened(intervention.parts)
        else:
            yield intervention


def is_located(intervention: Any) -> bool:
    """Returns whether the site and the first position of an intervention are known.

    They are not for one of the user's own, whatever names its class has.
    """
    return isinstance(intervention, Placed | PlacedHook)


def source_of(intervention: Any) -> tuple[str, Any]:
    """Returns the field of an intervention that names another run, and that run (or None)."""
    part = intervention.part if isinstance(intervention, Placed) else intervention
    if not isinstance(part, _Bound):  # what a user's own class calls its source is its own
        return "", None
    name = getattr(part, "reads", "source")
    source = getattr(part, name, None)
    # A frozen pattern may be a tensor as well, which needs no run.
    return name, source if isinstance(source, Recording | Mapping) else None


def _placed(part: Any, model: HookedModel, inputs: Mapping[str, Any], places: Places) -> list[Any]:
    """Returns an intervention checked and located; one of the user's own may be several hooks."""
    if isinstance(part, _Bound | HookAt):
        placed = part.place(model, inputs, places)
        if getattr(placed, "generated", ()):
            require_generation(placed.hooks_for())
        return [placed]
    if not hasattr(part, "hooks_for"):
        raise InterventionError(
            f"{shown(part)} is no intervention: give Patch, Ablate, Steer, Attend, Chain, HookAt, "
            "a pair (name, function), or an object with hooks_for(model, inputs)."
        )
    if hasattr(part, "check"):
        part.check(model, inputs)
    first = getattr(part, "first_position", None)
    hooks = hooks_of(part, model, inputs)  # verifies what it returns
    if first is None:
        return [part]  # it may act anywhere: it runs by hooks
    if not is_whole(first):
        raise InterventionError(
            f"{type(part).__name__}.first_position is {shown(first)}; expected a whole number, or "
            "None where it is not known."
        )
    return [
        HookAt(site, fn, int(first)).place(model, inputs)
        for names, fn in hooks
        for site in select_names(names, model.hook_names)
    ]


def _reading(intervention: Any, recorded: Mapping[int, Recording]) -> Any:
    if isinstance(intervention, Chain):
        return Chain(*(_reading(part, recorded) for part in intervention.parts))
    name, source = source_of(intervention)
    if source is None or id(source) not in recorded:
        return intervention
    change = {name: recorded[id(source)]}
    if isinstance(intervention, Placed):
        return intervention.reading(**change)
    return replace(intervention, **change)
