"""Writing activations of another run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import InterventionError, RegionError, counted
from hooked_vlm.hooks.sites import Site
from hooked_vlm.interventions.base import _Intervention
from hooked_vlm.interventions.indexing import Located, locate_pairs, rows_at, with_rows_at
from hooked_vlm.interventions.placing import Placed, Places, inputs_of, recorded_at
from hooked_vlm.interventions.recording import Source
from hooked_vlm.regions.pairs import CellPairs


@checked(InterventionError, only_names=True)
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

    def _edit(self, placed: Placed) -> Callable[[Any], Any]:
        targets, sources = placed.located
        values = recorded_at(placed, self.source)
        taken = rows_at(values, sources.index(self.heads, values[0].device))

        def edit(activation: Any) -> Any:
            here = activation[0]
            # Rows of keys, at patterns, are as long as the prompt.
            self._check_features(placed.where, here.shape[-1], taken.shape[-1])
            index = targets.index(self.heads, here.device)
            return with_rows_at(activation, index, taken.to(here.device, here.dtype))

        return edit

    def _places(
        self, places: Places, site: Site, inputs: Mapping[str, Any]
    ) -> tuple[Located, Located]:
        source_inputs = inputs_of(self.source)
        if isinstance(self.at, CellPairs):
            rows, others = places.rows(inputs), places.rows(source_inputs)
            targets, sources = locate_pairs(site, self.at, rows, others)
        else:
            source_at = self.at if self.source_at is None else self.source_at
            targets = places.located(site, inputs, self.at)
            sources = places.located(site, source_inputs, source_at)
        if len(sources) == 1 and len(targets) > 1:
            sources = Located(sources * len(targets))
        if len(sources) != len(targets):
            raise InterventionError(
                f"{self} writes {counted(len(targets), 'prompt or image', 'prompts or images')} "
                f"from a source that has {len(sources)}. Give a source of the same batch size, or "
                "of one."
            )
        for b, ((_, target), (_, source)) in enumerate(zip(targets, sources, strict=True)):
            if len(target) != len(source):
                raise RegionError(
                    f"{self} would write {counted(len(target), 'position')} from {len(source)} in "
                    f"prompt {b}. Give places of equal size; nothing is broadcast."
                )
        return targets, sources

    def __str__(self) -> str:
        where = self.at if self.source_at is None else f"{self.at} from {self.source_at}"
        return f"Patch({self.site}, {where})"
