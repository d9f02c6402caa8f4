"""Interventions: what is written, where, and from what, as printable data.

A `Patch` writes activations of another run, an `Ablate` removes what is there, a `Steer`
moves it along directions; a `Chain` does several, in order.  Each names a site and a
place (a `Region` of an image, the last token, a span of text), says nothing of any
particular model until it is run, and can be moved to another site with `at_site`, which
is what a sweep does.  Use one wherever a hook is taken:

    model.run_with_hooks(inputs, [Patch(site, at=region, source=other_run)])

Everything that can be checked before a forward pass is: names, sizes, grids, shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.directions import add, scale_projections
from hooked_vlm.errors import InterventionError, RegionError, did_you_mean
from hooked_vlm.guarded import guarded, require_made_for
from hooked_vlm.hooks.names import VISION, resolve_name, slot_name
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.prepare import rows_of
from hooked_vlm.places import (
    Located,
    index_of,
    locate,
    locate_pairs,
    needs_text,
    rows_at,
    with_rows_at,
)
from hooked_vlm.recordings import Model, Recording, Source, record
from hooked_vlm.regions.pairs import CellPairs
from hooked_vlm.regions.positions import PromptRow


SiteName = str | int
"""A hook name, or the number of a slot of the LM's residual stream (slot 0: block 0's input)."""

Edit = tuple[str, Callable[..., Any]]


def site_of(model: Model, name: SiteName) -> Site:
    """Returns a model's site by name or slot, or raises `InterventionError` for a read-only one."""
    if isinstance(name, int):
        name = slot_name(name, model.cfg.n_layers)
    site = model.sites[resolve_name(name, model.sites)]
    if site.read_only:
        raise InterventionError(f"{site.name} cannot be written: {site.read_only}.")
    return site


@dataclass(frozen=True, eq=False, kw_only=True)
class _Intervention:
    """What all interventions share: a site, a place there, and how they become a hook."""

    site: SiteName = field(kw_only=False)
    at: Any = None
    """A Region, LastToken(), Span(…), …; None is every position."""
    heads: tuple[int, ...] | None = None
    """At sites with a head axis: the heads to act on; None is all of them."""

    def at_site(self, site: SiteName) -> Any:
        """Returns the same intervention at another site."""
        return replace(self, site=site)

    def check(self, model: Model, inputs: Mapping[str, Any]) -> None:
        """Raises what is wrong with this for a model and some inputs; runs nothing."""
        self.site_and_places(model, inputs)

    def first_position(self, model: Model, inputs: Mapping[str, Any]) -> int:
        """Returns the first position, padding counted, that this changes in any prompt."""
        _, (targets, *_) = self.site_and_places(model, inputs)
        return min((int(inner.min()) for _, inner in targets if len(inner)), default=0)

    def hooks_for(self, model: Model, inputs: Mapping[str, Any]) -> list[Edit]:
        """Returns the hook that carries this out on some inputs, all checks made.

        A source that is not recorded yet is run here.
        """
        site, places = self.site_and_places(model, inputs)
        edit = self._edit(model, site, *places)
        return [(site.name, guarded(edit, inputs, site, _rows(model, inputs, None)))]

    def site_and_places(self, model: Model, inputs: Mapping[str, Any]) -> tuple[Site, tuple]:
        site = site_of(model, self.site)
        self._check_heads(model, site)
        return site, self._places(model, site, inputs)

    def _places(self, model: Model, site: Site, inputs: Mapping[str, Any]) -> tuple:
        """Returns where to write (and to read), having checked everything else as well."""
        raise NotImplementedError

    def _edit(self, model: Model, site: Site, *places: Any) -> Callable[[Any], Any]:
        raise NotImplementedError

    def _check_heads(self, model: Model, site: Site) -> None:
        if self.heads is None:
            return
        if not site.heads and site.tap != "attention":
            raise InterventionError(
                f"{site.name} has axes [{site.axes}]: there are no heads to choose."
            )
        tower = model.cfg.vision if site.name.startswith(VISION) else model.cfg
        n_heads = tower.n_key_value_heads if "kv_head" in site.axes else tower.n_heads
        wrong = [head for head in self.heads if not 0 <= head < n_heads]
        if wrong:
            raise InterventionError(
                f"{site.name} has heads 0 to {n_heads - 1}; {wrong} were given."
            )

    def _located(self, site: Site, model: Model, inputs: Mapping[str, Any], at: Any) -> Located:
        return locate(site, at, _rows(model, inputs, at))

    def _check_width(self, model: Model, site: Site, width: int) -> None:
        tower = model.cfg.vision if site.name.startswith(VISION) else model.cfg
        axis = site.axes.split()[-1].replace("d_vision", "d_model")
        self._check_features(site, getattr(tower, axis, None), width)

    def _check_features(self, site: Site, expected: int | None, width: int) -> None:
        # None: how many features the projector reads is known when they are there.
        if expected is not None and width != expected:
            raise InterventionError(
                f"{site.name} has {expected} features, and {width} were given: {self}. Take "
                "vectors from activations of this site."
            )


def _rows(model: Model, inputs: Mapping[str, Any], place: Any) -> list[PromptRow]:
    return rows_of(inputs, model.grids(inputs), needs_text(place))


def _recorded(model: Model, source: "Source", site: Site) -> Any:
    """Returns what a source has at a site, checked to be of its prompts (or images)."""
    run = source if isinstance(source, Recording) else record(model, source, [site.name])
    values = run.cache[site.name]
    require_made_for(site, values, run.inputs, _rows(model, run.inputs, None))
    return values


def _inputs_of(source: "Source") -> Mapping[str, Any]:
    return source.inputs if isinstance(source, Recording) else source


@dataclass(frozen=True, eq=False, kw_only=True)
class Patch(_Intervention):
    """Writes activations of another run: at `at`, those that the source has at `source_at`.

    Prompt b is written from the source's prompt b (or from its only one).  `source_at`
    defaults to `at`; both places must have equally many positions in every prompt, taken
    in order.  With `at` a `CellPairs` (see `swap_pairs`), cells are written pair by pair.

    Raises `RegionError` for places of unequal size and for a source whose images have
    another grid, `InterventionError` for a source of another batch size.
    """

    source: Source
    source_at: Any = None

    def _edit(
        self, model: Model, site: Site, targets: Located, sources: Located
    ) -> Callable[[Any], Any]:
        values = _recorded(model, self.source, site)
        taken = rows_at(values, index_of(sources, self.heads, values[0].device))

        def edit(activation: Any) -> Any:
            here = activation[0]
            index = index_of(targets, self.heads, here.device)
            return with_rows_at(activation, index, taken.to(here.device, here.dtype))

        return edit

    def _places(
        self, model: Model, site: Site, inputs: Mapping[str, Any]
    ) -> tuple[Located, Located]:
        source_inputs = _inputs_of(self.source)
        if isinstance(self.at, CellPairs):
            rows, others = (_rows(model, i, None) for i in (inputs, source_inputs))
            targets, sources = locate_pairs(site, self.at, rows, others)
        else:
            source_at = self.at if self.source_at is None else self.source_at
            targets = self._located(site, model, inputs, self.at)
            sources = self._located(site, model, source_inputs, source_at)
        if len(sources) == 1 and len(targets) > 1:
            sources = sources * len(targets)
        if len(sources) != len(targets):
            raise InterventionError(
                f"{self} writes {len(targets)} prompts (or images) from a source that has "
                f"{len(sources)}. Give a source of the same batch size, or of one."
            )
        for b, ((_, target), (_, source)) in enumerate(zip(targets, sources, strict=True)):
            if len(target) != len(source):
                raise RegionError(
                    f"{self} would write {len(target)} positions from {len(source)} in prompt {b}. "
                    "Give places of equal size; nothing is broadcast."
                )
        return targets, sources

    def __str__(self) -> str:
        where = self.at if self.source_at is None else f"{self.at} from {self.source_at}"
        return f"Patch({self.site}, {where})"


@dataclass(frozen=True, eq=False, kw_only=True)
class Ablate(_Intervention):
    """Removes what is at a place: zero it, or write means of other runs there.

    `to="zero"`, or a vector that every position gets, or `to="mean"` with a `reference`:
    the mean over all prompts and positions of `reference_at` (default: the same place) in
    a recorded run.  `to="position_mean"` keeps positions apart: each gets the mean over the
    reference's prompts at its own one.  To write single tokens of reference runs (the
    paper's recipe, protocol 2.6) use `Patch` with those runs as sources.
    """

    to: str | Tensor = "zero"
    reference: Source | None = None
    reference_at: Any = None

    def _places(
        self, model: Model, site: Site, inputs: Mapping[str, Any]
    ) -> tuple[Located, Located]:
        located = self._located(site, model, inputs, self.at)
        if isinstance(self.to, Tensor):
            self._check_width(model, site, self.to.shape[-1] if self.to.ndim else 0)
            return located, []
        kinds = ("zero", "mean", "position_mean")
        if self.to not in kinds:
            raise InterventionError(
                f"Ablate(to={self.to!r}) is not known; use one of {', '.join(kinds)} or a tensor."
                f"{did_you_mean(self.to, kinds)}"
            )
        if self.to == "zero":
            return located, []
        if self.reference is None:
            raise InterventionError(
                f"Ablate(to={self.to!r}) needs reference=record(model, inputs, …): the runs whose "
                "mean is written."
            )
        at = self.at if self.reference_at is None else self.reference_at
        reference = self._located(site, model, _inputs_of(self.reference), at)
        sizes = sorted({len(inner) for _, inner in [*located, *reference]})
        if self.to == "position_mean" and len(sizes) != 1:
            raise RegionError(
                f"{self} keeps positions apart, and the place has {sizes} of them in different "
                "prompts. Give a place of one size, or use to='mean'."
            )
        return located, reference

    def _edit(
        self, model: Model, site: Site, located: Located, reference: Located
    ) -> Callable[[Any], Any]:
        value = self._value(model, site, reference)
        if self.to == "position_mean":
            value = value.repeat(len(located), *(1 for _ in value.shape[1:]))

        def edit(activation: Any) -> Any:
            index = index_of(located, self.heads, activation[0].device)
            old = rows_at(activation, index)
            if value.ndim:
                self._check_features(site, old.shape[-1], value.shape[-1])
            return with_rows_at(activation, index, value.to(old.device, old.dtype).expand_as(old))

        return edit

    def _value(self, model: Model, site: Site, reference: Located) -> Tensor:
        if isinstance(self.to, Tensor):
            return self.to
        if self.reference is None or self.to == "zero":
            return torch.zeros(())
        values = _recorded(model, self.reference, site)
        rows = rows_at(values, index_of(reference, self.heads, values[0].device))
        if self.to == "mean":
            return rows.mean(0)
        return rows.unflatten(0, (len(reference), -1)).mean(0)

    def __str__(self) -> str:
        to = self.to if isinstance(self.to, str) else "vector"
        return f"Ablate({self.site}, {self.at}, to {to})"


@dataclass(frozen=True, eq=False, kw_only=True)
class Steer(_Intervention):
    """Moves activations along directions (paper, section 5.4; protocol 2.6, E7).

    `mode="add"` is the formula as written, `h + alpha * w`, for one direction;
    `mode="project"` the one the published experiment ran, `h + alpha * sum_k <h, w_k> w_k /
    |w_k|^2`, over the rows of `directions` (pass them through `orthonormalise` to count
    shared axes once).  `alpha=0` changes nothing, bit for bit.
    """

    directions: Float[Tensor, "direction d_model"] | Float[Tensor, " d_model"]
    alpha: float
    mode: str = "add"

    def _places(self, model: Model, site: Site, inputs: Mapping[str, Any]) -> tuple[Located]:
        if self.mode not in ("add", "project"):
            raise InterventionError(
                f"Steer(mode={self.mode!r}) is not known; use 'add' or 'project'."
                f"{did_you_mean(self.mode, ('add', 'project'))}"
            )
        if self.mode == "add" and len(self._rows) != 1:
            raise InterventionError(
                f"Steer(mode='add') moves along one direction, and {len(self._rows)} were given. "
                "Chain one Steer for each, or use mode='project'."
            )
        self._check_width(model, site, self._rows.shape[-1])
        return (self._located(site, model, inputs, self.at),)

    @property
    def _rows(self) -> Tensor:
        return self.directions if self.directions.ndim == 2 else self.directions[None]

    def _edit(self, _model: Model, site: Site, located: Located) -> Callable[[Any], Any]:
        rows = self._rows

        def edit(activation: Any) -> Any:
            if self.alpha == 0:
                return activation
            index = index_of(located, self.heads, activation[0].device)
            old = rows_at(activation, index)
            self._check_features(site, old.shape[-1], rows.shape[-1])
            if self.mode == "add":
                return with_rows_at(activation, index, add(old, rows[0], self.alpha))
            return with_rows_at(activation, index, scale_projections(old, rows, self.alpha))

        return edit

    def __str__(self) -> str:
        return f"Steer({self.site}, {self.at}, {self.mode}, alpha={self.alpha:g})"


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
