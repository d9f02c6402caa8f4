"""Writing activations of another run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.directions import orthonormalise
from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import is_whole
from hooked_vlm.errors import InterventionError, RegionError, counted
from hooked_vlm.hooks.located import Located, rows_at, with_rows_at
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.tensors import require_usable
from hooked_vlm.interventions.base import _Intervention
from hooked_vlm.interventions.indexing import all_rows, locate_pairs
from hooked_vlm.interventions.placing import (
    Placed,
    Places,
    SiteName,
    inputs_of,
    recorded_at,
    source_site_of,
)
from hooked_vlm.interventions.recording import Source
from hooked_vlm.model.base import HookedModel
from hooked_vlm.regions.generated import Generated, generated_in
from hooked_vlm.regions.pairs import CellPairs


@checked(InterventionError, only_names=True)
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Patch(_Intervention):
    """Writes activations of another run: at `at`, those that the source has at `source_at`.

    Prompt b is written from the source's prompt b (or from its only one).  `source_at`
    defaults to `at`; both places must have equally many positions in every prompt, taken
    in order.  With `at` a `CellPairs` (see `swap_pairs`), cells are written pair by pair.

    `source_site` is where the source is read, if it is another site than the one written to: a
    layer above or below, as in Patchscopes (Ghandeharioun et al. 2024).  `neurons` are the features
    (of the last axis) that are written, all others stay.  `subspace` are rows that span the
    directions that are written: the activation keeps what is orthogonal to them, as in interchange
    interventions on a subspace (Geiger et al. 2024); rows need not be orthonormal.

    At generated tokens (`at=Generated()`), `source_at` is one position of the source's prompt,
    which each of these tokens gets.

    Raises `RegionError` for places of unequal size and for a source whose images have
    another grid, `InterventionError` for a source of another batch size, for sites of different
    widths, and for neurons or a subspace that the site does not have.
    """

    source: Source
    source_at: Any = None
    source_site: SiteName | None = None
    neurons: tuple[int, ...] | None = None
    subspace: Float[Tensor, "direction d"] | None = None

    def _edit(self, placed: Placed) -> Callable[[Any], Any]:
        targets, sources = placed.located
        values = recorded_at(placed, self.source)
        taken = rows_at(values, sources.index(self.heads, values[0].device))
        basis = None if self.subspace is None else orthonormalise(self.subspace, center=False)

        def edit(activation: Any) -> Any:
            here = activation[0]
            # Rows of keys, at patterns, are as long as the prompt.
            self._check_features(placed.where, here.shape[-1], taken.shape[-1])
            index = targets.index(self.heads, here.device)
            new = taken.to(here.device, here.dtype)
            if self.neurons is not None or basis is not None:
                new = self._partly(rows_at(activation, index), new, basis)
            return with_rows_at(activation, index, new)

        return edit

    def _partly(self, old: Tensor, new: Tensor, basis: Tensor | None) -> Tensor:
        """Returns what is written where only some features or directions are."""
        if self.neurons is not None:
            chosen = torch.tensor(self.neurons, device=old.device)
            self._check_neurons(old.shape[-1])
            return old.index_copy(-1, chosen, new[..., chosen])
        if basis is None:
            return new
        wide = torch.promote_types(old.dtype, torch.float32)
        rows = basis.to(old.device, wide)
        change = (new.to(wide) - old.to(wide)) @ rows.T @ rows
        return (old.to(wide) + change).to(old.dtype)

    def _check_parts(self, model: HookedModel, site: Site, source_site: Site) -> None:
        """Raises `InterventionError` for neurons, directions or a source that do not fit a site."""
        width = self._features(model, site)
        other = self._features(model, source_site)
        if width is not None and other is not None and width != other:
            raise InterventionError(
                f"{self} writes {width} features at {site.name} from {other} at "
                f"{source_site.name}. Give a source_site of the same width."
            )
        if self.source_site is not None and _heads(model, site) != _heads(model, source_site):
            raise InterventionError(
                f"{self} writes {site.name} with {_said_heads(model, site)} from "
                f"{source_site.name} with {_said_heads(model, source_site)}. Give a source_site "
                "with as many heads; nothing is broadcast."
            )
        if self.neurons is not None and self.subspace is not None:
            raise InterventionError(
                "Patch was given neurons and a subspace; give one of them. Neurons span a "
                "subspace of their own: rows of the identity."
            )
        if self.neurons is not None and width is not None:
            self._check_neurons(width)
        if self.subspace is not None:
            require_usable("Patch(subspace=…)", self.subspace, model.hf_model, InterventionError)
            wrong = self.subspace.ndim != 2 or not self.subspace.numel()
            if wrong or not bool(self.subspace.isfinite().all()):
                raise InterventionError(
                    f"Patch(subspace=…) has shape {tuple(self.subspace.shape)}; expected finite "
                    "rows [direction, d] that span the directions to write."
                )
            if not bool(self.subspace.any()):
                raise InterventionError(
                    f"Patch(subspace=…) has {counted(len(self.subspace), 'row')}, all zero: they "
                    "span no direction, so nothing would be written. Give at least one row that "
                    "is not zero."
                )
            self._check_width(model, site, self.subspace.shape[-1])

    def _check_neurons(self, width: int) -> None:
        chosen = self.neurons
        whole = isinstance(chosen, tuple | list) and all(map(is_whole, chosen))
        in_range = whole and all(0 <= n < width for n in chosen)  # type: ignore[union-attr]
        if not chosen or not in_range or len(set(chosen)) < len(chosen):
            raise InterventionError(
                f"{self} was given neurons={shown(chosen)}; expected different numbers from 0 to "
                f"{width - 1}."
            )

    def _places(
        self, places: Places, site: Site, inputs: Mapping[str, Any]
    ) -> tuple[Located, Located]:
        source_inputs = inputs_of(self.source)
        source_site = source_site_of(places.model, self, site)
        self._check_parts(places.model, site, source_site)
        if isinstance(self.at, CellPairs):
            rows, others = places.rows(inputs), places.rows(source_inputs)
            targets, sources = locate_pairs(site, self.at, rows, others)
            if source_site != site:
                _, sources = locate_pairs(source_site, self.at, rows, others)
        else:
            source_at = self.at if self.source_at is None else self.source_at
            targets = places.located(site, inputs, self.at)
            sources = places.located(source_site, source_inputs, source_at)
        if len(sources) == 1 and len(targets) > 1:
            sources = Located(sources * len(targets))
        if len(sources) != len(targets):
            raise InterventionError(
                f"{self} writes {counted(len(targets), 'prompt or image', 'prompts or images')} "
                f"from a source that has {len(sources)}. Give a source of the same batch size, or "
                "of one."
            )
        if generated_in(self.at):
            self._require_one_each(sources)
            return targets, sources
        for b, ((_, target), (_, source)) in enumerate(zip(targets, sources, strict=True)):
            if len(target) != len(source):
                raise RegionError(
                    f"{self} would write {counted(len(target), 'position')} from {len(source)} in "
                    f"prompt {b}. Give places of equal size; nothing is broadcast."
                )
        return targets, sources

    def _require_one_each(self, sources: Located) -> None:
        if not isinstance(self.at, Generated) or generated_in(self.source_at):
            raise InterventionError(
                f"{self}: generated tokens are written from a position of a prompt. Give a Patch "
                "of their own, at=Generated(), with source_at a place such as LastToken()."
            )
        for b, (_, source) in enumerate(sources):
            if len(source) != 1:
                raise RegionError(
                    f"{self} would write each generated token from "
                    f"{counted(len(source), 'position')} in prompt {b}. Give source_at a place of "
                    "one position, such as LastToken()."
                )

    def _generated_at(self, placed: Placed, rows: int, index: tuple[int, ...]) -> tuple:
        # The copies of a prompt that a generation makes follow one another.
        sources = placed.located[1]
        copies = rows // len(sources)
        taken = ((outer, inner.expand(len(index))) for outer, inner in sources)
        repeated = Located(pair for pair in taken for _ in range(copies))
        return all_rows(rows, index), repeated

    def __str__(self) -> str:
        where = str(self.at) if self.source_at is None else f"{self.at} from {self.source_at}"
        parts = [str(self.site), where]
        if self.source_site is not None:
            parts.append(f"read at {self.source_site}")
        if self.neurons is not None:
            parts.append(f"neurons {shown(self.neurons)}")
        if self.subspace is not None:
            parts.append(f"a subspace of {counted(len(self.subspace), 'direction')}")
        return f"Patch({', '.join(parts)})"


def _heads(model: HookedModel, site: Site) -> int:
    """Returns the number of heads of a site's activation; 0 where it has none."""
    axes = site.axes.split()
    if "kv_head" in axes:
        return site.stack(model.cfg).n_key_value_heads
    return site.stack(model.cfg).n_heads if "head" in axes else 0


def _said_heads(model: HookedModel, site: Site) -> str:
    return counted(_heads(model, site), "head")
