"""Removing what an activation holds: zero, a mean, or a vector of one's own in its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import InterventionError, RegionError, did_you_mean
from hooked_vlm.hooks.located import Located, rows_at, with_rows_at
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.tensors import require_usable
from hooked_vlm.interventions.base import _Intervention
from hooked_vlm.interventions.placing import (
    Placed,
    Places,
    inputs_of,
    is_visible,
    recorded_at,
)
from hooked_vlm.interventions.recording import Source
from hooked_vlm.regions.generated import generated_in


@checked(InterventionError, only_names=True)
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Ablate(_Intervention):
    """Removes what is at a place: zero it, or write means of other runs there.

    `to="zero"`, or a vector that every position gets, or `to="mean"` with a `reference`:
    the mean over all prompts and positions of `reference_at` (default: the same place) in
    a recorded run.  `to="position_mean"` keeps positions apart: each gets the mean over the
    reference's prompts at its own one.  To write single tokens of reference runs (the
    paper's recipe, protocol 2.6) use `Patch` with those runs as sources.
    """

    reads: ClassVar[str] = "reference"
    to: str | Tensor = "zero"
    reference: Source | None = None
    reference_at: Any = None

    def _places(
        self, places: Places, site: Site, inputs: Mapping[str, Any]
    ) -> tuple[Located, Located]:
        located = places.located(site, inputs, self.at)
        if isinstance(self.to, Tensor):
            require_usable("Ablate(to=…)", self.to, places.model.hf_model, InterventionError)
            by_head = bool(site.heads) or site.tap == "attention"
            if self.to.ndim > 1 + by_head and self.to.numel() != self.to.shape[-1]:
                raise InterventionError(
                    f"Ablate(to=…) was given a tensor of shape {tuple(self.to.shape)}; expected "
                    "one vector, which every position gets."
                )
            self._check_width(places.model, site, self.to.shape[-1] if self.to.ndim else 0)
            if not self.to.is_meta and not bool(self.to.isfinite().all()):
                raise InterventionError("Ablate(to=…) has values that are NaN or infinite.")
            return located, Located()
        kinds = ("zero", "mean", "position_mean")
        if not isinstance(self.to, str) or self.to not in kinds:
            raise InterventionError(
                f"Ablate(to={repr(self.to)[:80]}) is not known; use one of {', '.join(kinds)} or a "
                f"tensor.{did_you_mean(str(self.to), kinds)}"
            )
        if self.to == "zero":
            return located, Located()
        if self.reference is None:
            raise InterventionError(
                f"Ablate(to={self.to!r}) needs reference=record(model, inputs, …): the runs whose "
                "mean is written."
            )
        at = self.at if self.reference_at is None else self.reference_at
        if generated_in(at) or (generated_in(self.at) and self.to == "position_mean"):
            raise InterventionError(
                f"{self}: a reference has no generated tokens, so their mean is that of a place of "
                "its prompt. Use to='mean' with reference_at, such as LastToken() or TextTokens()."
            )
        reference = places.located(site, inputs_of(self.reference), at)
        sizes = sorted({len(inner) for _, inner in [*located, *reference]})
        if self.to == "position_mean" and len(sizes) != 1:
            raise RegionError(
                f"{self} keeps positions apart, and the place has {sizes} of them in different "
                "prompts. Give a place of one size, or use to='mean'."
            )
        return located, reference

    def _edit(self, placed: Placed) -> Callable[[Any], Any]:
        site, (located, reference) = placed.where, placed.located
        value = self._value(placed, reference)
        if self.to == "position_mean":
            value = repeat(value, "pos ... -> (prompt pos) ...", prompt=len(located))

        def edit(activation: Any) -> Any:
            index = located.index(self.heads, activation[0].device)
            old = rows_at(activation, index)
            if value.ndim:
                self._check_features(site, old.shape[-1], value.shape[-1])
            written = sent(value, old.device).to(old.dtype).expand_as(old)
            return with_rows_at(activation, index, written)

        return edit

    def _value(self, placed: Placed, reference: Located) -> Tensor:
        if isinstance(self.to, Tensor):
            return self.to
        if self.reference is None or self.to == "zero":
            return torch.zeros(())
        values = recorded_at(placed, self.reference)
        rows = rows_at(values, reference.index(self.heads, values[0].device))
        if placed.where.part == "attn_scores":
            rows = rows.where(is_visible(rows), torch.nan)
        if self.to == "position_mean":
            rows = rearrange(rows, "(prompt pos) ... -> prompt pos ...", prompt=len(reference))
        if placed.where.part != "attn_scores":
            return rows.mean(0)
        # The mean of what the model does not mask; keys that no query sees stay masked.
        return rows.nanmean(0).nan_to_num(nan=torch.finfo(rows.dtype).min)

    def __str__(self) -> str:
        to = self.to if isinstance(self.to, str) else "vector"
        return f"Ablate({self.site}, {self.at}, to {to})"
