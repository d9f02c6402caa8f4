"""Interventions: what is written, where, and from what, as printable data.

A `Patch` writes activations of another run, an `Ablate` removes what is there, a `Steer`
moves it along directions; a `Chain` does several, in order.  Each names a site and a
place (a `Region` of an image, the last token, a span of text), says nothing of any
particular model until it is run, and can be moved to another site with `at_site`, which
is what a sweep does.  Use one wherever a hook is taken:

    model.run_with_hooks(inputs, [Patch(site, at=region, source=other_run)])

Everything that can be checked before a forward pass is checked by `place`, which binds an
intervention to a model and inputs (see `placing`): names, sizes, grids, shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.arguments.kinds import is_whole
from hooked_vlm.errors import InterventionError, UnknownHookError
from hooked_vlm.hooks.sites import Site
from hooked_vlm.interventions.indexing import all_rows
from hooked_vlm.interventions.placing import Edit, Placed, Places, SiteName, by_query, site_of
from hooked_vlm.model.base import HookedModel
from hooked_vlm.regions.generated import generated_in


class _Bound(OneLine):
    """What all interventions have in common: what follows from `place`."""

    site: Any

    def place(self, model: HookedModel, inputs: Mapping[str, Any], places: Any = None) -> Placed:
        """Returns this bound to a model and inputs, all checks made; nothing runs."""
        raise NotImplementedError

    @checked(UnknownHookError)
    def at_site(self, site: SiteName) -> Any:
        """Returns the same intervention at another site."""
        return replace(self, site=site)  # type: ignore[type-var]

    @checked(InterventionError)
    def check(self, model: HookedModel, inputs: Mapping[str, Any]) -> None:
        """Raises what is wrong with this for a model and some inputs; runs nothing."""
        self.place(model, inputs)

    @checked(InterventionError)
    def hooks_for(self, model: HookedModel, inputs: Mapping[str, Any]) -> list[Edit]:
        """Returns the hook that carries this out on some inputs, all checks made.

        A source that is not recorded yet is run here.
        """
        return self.place(model, inputs).hooks_for()


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class _Intervention(_Bound):
    """What interventions share that write at one place of a site."""

    site: SiteName = field(kw_only=False)
    at: Any = None
    """A Region, LastToken(), Span(…), …; None is every position of the prompt.  `Generated()` is
    the tokens after it, in a generation.  At attention scores and patterns it is where queries are:
    whole rows are written."""
    heads: tuple[int, ...] | None = None
    """At sites with a head axis: the heads to act on; None is all of them."""

    def place(
        self, model: HookedModel, inputs: Mapping[str, Any], places: Places | None = None
    ) -> Placed:
        """Returns this intervention bound to a model and inputs: checked and located once.

        Nothing runs.  `places` are shared between interventions on the same inputs, so that
        each place is located once.
        """
        places = places or Places(model)
        site = by_query(site_of(model, self.site))
        check_heads(self.heads, model, site)
        located = self._places(places, site, inputs)
        return Placed(self, site, inputs, located, places, generated_in(self.at))

    def _places(self, places: Places, site: Site, inputs: Mapping[str, Any]) -> tuple:
        """Returns where to write (and to read), having checked everything else as well."""
        raise NotImplementedError

    def _edit(self, placed: Placed) -> Callable[[Any], Any]:
        raise NotImplementedError

    def _generated_at(self, placed: Placed, rows: int, index: tuple[int, ...]) -> tuple:
        """Returns where to write (and to read) generated tokens of a pass, in all its rows."""
        return (all_rows(rows, index), *placed.located[1:])

    def _check_width(self, model: HookedModel, site: Site, width: int) -> None:
        self._check_features(site, self._features(model, site), width)

    def _features(self, model: HookedModel, site: Site) -> int | None:
        """Returns the size of a site's last axis, or None where the config does not have it."""
        axis = site.axes.split()[-1].replace("d_vision", "d_model")
        return getattr(site.stack(model.cfg), axis, None)

    def _check_features(self, site: Site, expected: int | None, width: int) -> None:
        # None: how many features the projector reads is known when they are there.
        if expected is not None and width != expected:
            raise InterventionError(
                f"{site.name} has {expected} features, and {width} were given: {self}. Take "
                "vectors from activations of this site."
            )


def check_heads(heads: Any, model: HookedModel, site: Site) -> None:
    """Raises `InterventionError` for heads that a site does not have."""
    if heads is None:
        return
    if not isinstance(heads, tuple) or not heads or not all(map(is_whole, heads)):
        raise InterventionError(
            f"heads={heads!r} was given; expected a tuple of one or more whole numbers, "
            "or None for all heads."
        )
    if not site.heads and site.tap != "attention":
        raise InterventionError(
            f"{site.name} has axes [{site.axes}]: there are no heads to choose."
        )
    tower = site.stack(model.cfg)
    n_heads = tower.n_key_value_heads if "kv_head" in site.axes else tower.n_heads
    wrong = [head for head in heads if not 0 <= head < n_heads]
    if wrong:
        raise InterventionError(f"{site.name} has heads 0 to {n_heads - 1}; {wrong} were given.")
