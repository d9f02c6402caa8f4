"""Moving activations along directions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.directions import added, with_scaled_projections
from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import is_number
from hooked_vlm.errors import InterventionError, did_you_mean
from hooked_vlm.hooks.located import Located, rows_at, with_rows_at
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.tensors import require_usable
from hooked_vlm.interventions.base import _Intervention
from hooked_vlm.interventions.placing import Placed, Places
from hooked_vlm.model.base import HookedModel


@checked(InterventionError, only_names=True)
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
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

    def _places(self, places: Places, site: Site, inputs: Mapping[str, Any]) -> tuple[Located]:
        self._check_values(places.model)
        if not isinstance(self.mode, str) or self.mode not in ("add", "project"):
            raise InterventionError(
                f"Steer(mode={shown(self.mode)}) is not known; use 'add' or 'project'."
                f"{did_you_mean(str(self.mode), ('add', 'project'))}"
            )
        if self.mode == "add" and len(self._rows) != 1:
            raise InterventionError(
                f"Steer(mode='add') moves along one direction, and {len(self._rows)} were given. "
                "Chain one Steer for each, or use mode='project'."
            )
        self._check_width(places.model, site, self._rows.shape[-1])
        return (places.located(site, inputs, self.at),)

    def _check_values(self, model: HookedModel) -> None:
        """Raises `InterventionError` for directions or an alpha that are no numbers."""
        given = self.directions
        wrong = not isinstance(given, Tensor) or given.ndim not in (1, 2) or given.is_complex()
        if wrong or not given.numel():
            shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
            raise InterventionError(
                f"Steer(directions=…) was given a {type(given).__name__}{shape}; expected a tensor "
                "[d_model] or [direction, d_model]. Use torch.stack for a list of vectors."
            )
        if not is_number(self.alpha) or not math.isfinite(self.alpha):
            raise InterventionError(
                f"Steer(alpha={shown(self.alpha)}) was given; expected a finite number."
            )
        require_usable("Steer(directions=…)", given, model.hf_model, InterventionError)
        if not given.is_meta and not bool(given.isfinite().all()):
            raise InterventionError(
                "Steer(directions=…) has values that are NaN or infinite. Give finite directions."
            )

    @property
    def _rows(self) -> Tensor:
        return self.directions if self.directions.ndim == 2 else self.directions[None]

    def _edit(self, placed: Placed) -> Callable[[Any], Any]:
        site, (located,), rows = placed.where, placed.located, self._rows

        def edit(activation: Any) -> Any:
            if self.alpha == 0:
                return activation
            index = located.index(self.heads, activation[0].device)
            old = rows_at(activation, index)
            self._check_features(site, old.shape[-1], rows.shape[-1])
            if self.mode == "add":
                return with_rows_at(activation, index, added(old, rows[0], self.alpha))
            return with_rows_at(activation, index, with_scaled_projections(old, rows, self.alpha))

        return edit

    def __str__(self) -> str:
        return f"Steer({self.site}, {self.at}, {self.mode}, alpha={self.alpha:g})"
