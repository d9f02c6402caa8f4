"""An intervention: activations of a place are multiplied by a factor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hooked_vlm import place_index
from hooked_vlm.errors import InterventionError


@dataclass(frozen=True)
class Scale:
    """Multiplies the activations of a place at a site by a factor."""

    site: str | int
    factor: float
    at: Any = None

    def hooks_for(
        self, model: Any, inputs: Mapping[str, Any]
    ) -> list[tuple[str | int, Callable[..., Any]]]:
        """Returns the site and the function that scales there; raises for an unknown place."""
        if self.factor < 0:
            raise InterventionError(f"{self} has a negative factor. Give 0 or more.")
        index = place_index(model, inputs, self.site, self.at)

        def scale(activation: Tensor, hook: Any) -> Tensor:
            changed = activation.clone()
            changed[index] = changed[index] * self.factor
            return changed

        return [(self.site, scale)]

    def at_site(self, site: str | int) -> "Scale":
        """Returns the same at another site."""
        return replace(self, site=site)
