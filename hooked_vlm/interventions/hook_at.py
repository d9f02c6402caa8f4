"""A hook function where an intervention is expected: `HookAt`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.errors import InterventionError, UnknownHookError, counted
from hooked_vlm.hooks.hook_point import require_hook_function
from hooked_vlm.hooks.names import resolve_name
from hooked_vlm.hooks.sites import Site
from hooked_vlm.interventions.placing import Edit, Places, SiteName, full_name
from hooked_vlm.model.base import HookedModel


@checked(InterventionError, but=("site", "fn"))
@dataclass(frozen=True, eq=False)
class HookAt:
    """A hook function as an intervention, so that sweeps take it: `fn(activation, hook)`.

    `first_position` is the first position of the prompt that `fn` reads or changes; what comes
    before is the clean run's, and a sweep need not compute it (there `fn` may be shown zeros).
    At sites of the vision encoder, and where the second axis is no position, it has no effect.

    >>> HookAt("blocks.1.hook_resid_pre", lambda activation, hook: activation * 2)
    HookAt(blocks.1.hook_resid_pre, <lambda>)
    """

    site: SiteName
    fn: Callable[..., Any]
    first_position: int = 0
    each_step: ClassVar[bool] = True

    @checked(UnknownHookError)
    def at_site(self, site: SiteName) -> "HookAt":
        """Returns the same function at another site."""
        return replace(self, site=site)

    def check(self, model: HookedModel, inputs: Mapping[str, Any]) -> None:
        """Raises `UnknownHookError` for a name of no site, and for a position out of range."""
        self.place(model, inputs)

    def hooks_for(self, model: HookedModel, inputs: Mapping[str, Any]) -> list[Edit]:
        """Returns the site's name and the function."""
        return self.place(model, inputs).hooks_for()

    def place(
        self, model: HookedModel, inputs: Mapping[str, Any], _places: Places | None = None
    ) -> "PlacedHook":
        """Returns the function bound to a model's site; nothing runs."""
        if not callable(self.fn):
            raise InterventionError(
                f"{shown(self.fn)} was given as a hook function; expected fn(activation, hook)."
            )
        require_hook_function(self.fn, InterventionError)
        site = model.sites[resolve_name(full_name(model, self.site), model.sites)]
        if not site.by_position:
            return PlacedHook(self, site, 0)
        ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
        if self.first_position < 0 or (ids is not None and self.first_position >= ids.shape[1]):
            length = "unknown many" if ids is None else ids.shape[1]
            raise InterventionError(
                f"first_position={self.first_position} of {self} is out of range: the prompts have "
                f"{counted(length, 'position')}, counted from 0."
            )
        return PlacedHook(self, site, self.first_position)

    def __repr__(self) -> str:
        return f"HookAt({self.site}, {getattr(self.fn, '__name__', type(self.fn).__name__)})"


@dataclass(frozen=True, eq=False)
class PlacedHook:
    """A hook function bound to a model's site."""

    part: HookAt
    where: Site
    first: int
    each_step: ClassVar[bool] = True

    @property
    def site(self) -> str:
        """The name of the site."""
        return self.where.name

    def hooks_for(self, *_: Any) -> list[Edit]:
        """Returns the site's name and the function."""
        return [(self.site, self.part.fn)]

    def __str__(self) -> str:
        return str(self.part)
