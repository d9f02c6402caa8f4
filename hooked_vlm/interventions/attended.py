"""An `Attend` bound to a model and inputs: what it makes of scores and patterns."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import GridError, HookedVLMWarning, InterventionError, callers_level
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.located import Located
from hooked_vlm.hooks.patch_order import VisionActivation, listed
from hooked_vlm.hooks.prompts import OnGenerated, OnPrompt
from hooked_vlm.inputs.rows import prompt_shape
from hooked_vlm.interventions.pairs_of_attention import Pairs
from hooked_vlm.interventions.placing import Edit, Placed, is_visible
from hooked_vlm.interventions.recording import Recording, record
from hooked_vlm.regions.generated import Generated


class _OnGeneratedQueries(OnGenerated):
    """A hook function on queries of generated tokens."""

    def __init__(
        self,
        attend: Callable[[Tensor, list[int], HookPoint, int], Tensor],
        places: tuple[Generated, ...],
        inputs: Mapping[str, Any],
        name: str,
    ) -> None:
        super().__init__(self._attended, places, inputs, name)
        self._attend = attend
        self._hook: HookPoint | None = None

    def __call__(self, activation: VisionActivation, hook: HookPoint) -> Any:
        self._hook = hook
        return super().__call__(activation, hook)

    def _attended(self, activation: Any, index: list[int]) -> Tensor:
        assert self._hook is not None
        return self._attend(activation, index, self._hook, self._end)


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedAttend(Placed):
    """An `Attend` bound to a model and inputs."""

    pairs: Pairs
    recorded_at: tuple[Located | None, Located | None] | None = None
    """Queries and keys in the run whose pattern is written; None for a tensor."""

    @property
    def first(self) -> int:
        """The first position, padding counted, that this changes."""
        return self.pairs.first

    def hooks_for(self, *_: Any) -> list[Edit]:
        """Returns the hooks that carry this out; a run that is not recorded yet is made.

        One acts on the prompt's queries, and one on those of generated tokens.
        """
        hooks: list[Edit] = []
        if not self.generated or any(len(inner) for _, inner in self.pairs.queries or ()):
            hooks.append((self.site, self._hook))
        if self.generated:
            given = self.generated, self.inputs, str(self)
            hooks.append((self.site, _OnGeneratedQueries(self._edited_generated, *given)))
        return hooks

    @cached_property
    def _hook(self) -> Callable[..., Any]:
        n_images = self._n_images if self.where.by_image else None
        if self.part.to is not None:
            _ = self._recorded  # a run of its own, before the one that this acts in
        return OnPrompt(self.edited, self.inputs, n_images)

    @property
    def _n_images(self) -> int | None:
        """The number of images, where each prompt has exactly one."""
        try:
            rows = self.places.rows(self.inputs)
        except GridError:  # which places need, and not the whole of a pattern
            return None
        return len(rows) if all(len(row.grids) == 1 for row in rows) else None

    def edited(self, activation: VisionActivation, hook: HookPoint, start: int = 0) -> Any:
        """Returns what an activation is under this intervention.

        `start` is the first position of queries, where not all of a prompt's are shown.
        """
        selected = self.pairs.selected(activation, hook, start)
        frozen = self._frozen(activation, start)
        values = listed(activation)
        made = [
            self._changed(x, where, to, start)
            for x, where, to in zip(values, selected, frozen, strict=True)
        ]
        self._warn_idle(values, selected)
        return made if isinstance(activation, list) else made[0]

    def _edited_generated(self, x: Tensor, index: list[int], hook: HookPoint, end: int) -> Tensor:
        """Returns an activation whose queries at `index` are changed; the prompt ends at `end`."""
        batch, length = prompt_shape(self.inputs) or (len(x), end)
        keys = torch.zeros(len(x), x.shape[-1], dtype=torch.bool)
        if self.pairs.keys is None:
            keys[:] = True
        for b, positions in self.pairs.keys or ():
            # Of beams and several sequences, the rows of a prompt follow one another.
            copies = len(x) // batch
            held = positions + (end - length) - hook.key_positions.start
            held = held[(held >= 0) & (held < x.shape[-1])]
            keys[b * copies : (b + 1) * copies, held] = True
        queries = torch.zeros(x.shape[-2], dtype=torch.bool)
        queries[index] = True
        selected = self.pairs.of_heads(queries[:, None] & keys[:, None], x.shape[1]).to(x.device)
        return self._changed(x, selected, None, 0)

    def _changed(self, x: Tensor, selected: Tensor, frozen: Tensor | None, start: int) -> Tensor:
        part = self.part
        if frozen is not None:
            return torch.where(selected, frozen, x)
        if part.scale is not None:
            return torch.where(selected, x * part.scale, x)
        visible = is_visible(x)
        taken = selected & visible
        if part.bias is not None:
            return torch.where(taken, x + part.bias, x)
        if part.score_scale is not None:
            return torch.where(taken, x * part.score_scale, x)
        self._require_left(taken, visible, start)
        return x.masked_fill(taken, torch.finfo(x.dtype).min)

    def _require_left(self, taken: Tensor, visible: Tensor, start: int) -> None:
        """Raises `InterventionError` for a query all of whose keys are masked."""
        if taken.is_meta:
            return
        emptied = taken.any(-1) & ~(visible & ~taken).any(-1)
        if bool(emptied.any()):
            where = emptied.nonzero()[0].tolist()
            raise InterventionError(
                f"{self} leaves query {where[-1] + start} of row {where[0]} no key: all those "
                "that it sees are masked, and a softmax over nothing has no value. Leave a "
                "key, or use scale=0.0, which takes attention away and gives it to no other key."
            )

    def _warn_idle(self, values: list[Tensor], selected: list[Tensor]) -> None:
        """Warns, once for a sweep, where keys come after all queries and none is seen."""
        doubtful = self.pairs.is_doubtful and not self.places.has_warned
        if not doubtful or any(x.is_meta for x in values):
            return
        is_score = self.where.part == "attn_scores"
        for x, where in zip(values, selected, strict=True):
            if bool(((is_visible(x) if is_score else x != 0) & where).any()):
                return
        self.places.has_warned = True
        warnings.warn(
            f"{self} changes nothing: its queries come before its keys (or are in other images), "
            "and the model itself masks such pairs. Exchange query and key. (Shown once for a "
            "sweep.)",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )

    # --- frozen patterns --------------------------------------------------------------------

    def _frozen(self, activation: VisionActivation, start: int) -> list[Any]:
        """Returns what is written, of each tensor's shape (or None where nothing is recorded)."""
        values = listed(activation)
        if self.part.to is None:
            return [None] * len(values)
        recorded = listed(self._recorded)
        if self.recorded_at and not self.where.by_image and self._moves:
            recorded = [self._aligned(recorded[0], values[0], start)]
        made = [x[..., start:, :].to(like) for x, like in zip(recorded, values, strict=False)]
        for x, like in zip(made, values, strict=False):
            if len(recorded) != len(values) or not _is_pattern_of(x, like):
                size = [*like.shape[:-2], like.shape[-2] + start, like.shape[-1]]
                raise InterventionError(
                    f"{self.part}: a pattern of shape {tuple(recorded[0].shape)} was recorded, and "
                    f"{self.site} has {tuple(size)}. Give one of the same prompts and images."
                )
        return made

    @cached_property
    def _recorded(self) -> VisionActivation:
        to = self.part.to
        if isinstance(to, Tensor):
            return to
        run = to if isinstance(to, Recording) else record(self.places.model, to, [self.site])
        return run.cache[self.site]

    @property
    def _moves(self) -> bool:
        """Whether queries or keys are elsewhere in the recorded run than here."""
        ours = (self.pairs.queries, self.pairs.keys)
        return any(
            not torch.equal(here, other[i % len(other)][1])
            for own, other in zip(ours, self.recorded_at or (), strict=True)
            if own is not None and other is not None
            for i, (_, here) in enumerate(own)
        )

    def _aligned(self, recorded: Tensor, like: Tensor, start: int) -> Tensor:
        """Returns a recorded pattern with its pairs moved to where they are here."""
        n_queries, n_keys = like.shape[-2] + start, like.shape[-1]
        moved = recorded.new_zeros(len(like), recorded.shape[1], n_queries, n_keys)
        for b in range(len(like)):
            source = recorded[b % len(recorded)]
            sizes = ((n_queries, source.shape[-2]), (n_keys, source.shape[-1]))
            (to_q, from_q), (to_k, from_k) = (
                self._matched(b, i, *size) for i, size in enumerate(sizes)
            )
            moved[b][:, to_q[:, None], to_k] = source[:, from_q[:, None], from_k]
        return moved

    def _matched(self, b: int, i: int, here: int, there: int) -> tuple[Tensor, Tensor]:
        """Returns the indices of prompt b's queries (or keys) here and in the recorded run."""
        own, other = (self.pairs.queries, self.pairs.keys)[i], (self.recorded_at or ())[i]
        if own is not None and other is not None:
            return own[b][1], other[b % len(other)][1]
        if here != there:
            raise InterventionError(
                f"{self.part}: all {('queries', 'keys')[i]} are written, {here} here and {there} "
                "in the recorded run. Give a place that both have, or prompts of one length."
            )
        return torch.arange(here), torch.arange(there)


def _is_pattern_of(recorded: Tensor, like: Tensor) -> bool:
    """Whether a pattern has an activation's shape, or is that of one prompt for all."""
    if recorded.ndim == like.ndim == 4 and len(recorded) == 1:
        return recorded.shape[1:] == like.shape[1:]
    return recorded.shape == like.shape
