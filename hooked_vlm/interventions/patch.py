"""Writing activations of another run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import InterventionError, RegionError, counted
from hooked_vlm.hooks.sites import Site
from hooked_vlm.interventions.base import _Intervention
from hooked_vlm.interventions.indexing import (
    Located,
    all_rows,
    locate_pairs,
    rows_at,
    with_rows_at,
)
from hooked_vlm.interventions.placing import Placed, Places, inputs_of, recorded_at
from hooked_vlm.interventions.recording import Source
from hooked_vlm.regions.generated import Generated, generated_in
from hooked_vlm.regions.pairs import CellPairs


@checked(InterventionError, only_names=True)
@dataclass(frozen=True, eq=False, kw_only=True)
class Patch(_Intervention):
    """Writes activations of another run: at `at`, those that the source has at `source_at`.

    Prompt b is written from the source's prompt b (or from its only one).  `source_at`
    defaults to `at`; both places must have equally many positions in every prompt, taken
    in order.  With `at` a `CellPairs` (see `swap_pairs`), cells are written pair by pair.

    At generated tokens (`at=Generated()`), `source_at` is one position of the source's prompt,
    which each of these tokens gets.

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
        where = self.at if self.source_at is None else f"{self.at} from {self.source_at}"
        return f"Patch({self.site}, {where})"
