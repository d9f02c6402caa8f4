"""Changing what attention reads: knocking it out, weighting it, freezing its pattern."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Count, is_number, is_whole
from hooked_vlm.errors import (
    HookedVLMWarning,
    InterventionError,
    RegionError,
    UnknownHookError,
    callers_level,
    counted,
)
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.patch_order import VisionActivation, listed
from hooked_vlm.hooks.prompts import OnPrompt
from hooked_vlm.inputs.tensors import require_usable
from hooked_vlm.interventions.base import _Bound, check_heads
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.indexing import Located
from hooked_vlm.interventions.pairs_of_attention import (
    Pairs,
    attention_site,
    keys_of,
    queries_of,
    reads_encoder,
)
from hooked_vlm.interventions.placing import Placed, Places, inputs_of, is_visible
from hooked_vlm.interventions.recording import Recording, Source, record
from hooked_vlm.model.base import HookedModel


ON_SCORES = ("mask", "bias", "score_scale")
KINDS = ("scale", *ON_SCORES, "to")


@checked(InterventionError, only_names=True)
@dataclass(frozen=True, eq=False, kw_only=True)
class Attend(_Bound):
    """Changes how queries attend to keys in one attention module, such as `"blocks.2.attn"`.

    `query` and `key` are places, as everywhere: a `Region`, `LastToken()`, `Span(…)`,
    `Positions(…)`; None is all.  Their pairs are changed, in all heads or in `heads`, by one of:

    - `mask=True`: scores become the lowest number before the softmax, so that the other keys of the
      query share the attention (attention knockout, Geva et al. 2023).
    - `scale=0.0`: weights after the softmax times a number; the other keys keep theirs.
    - `score_scale=1.5`: scores before the softmax times a number (ScalingVis and AdaptVis, Chen et
      al. 2025).
    - `bias=-2.0`: a number added to scores before the softmax.
    - `to=…`: weights of another run: a `Recording`, inputs, or a tensor `[batch, head, query, key]`
      (freezing).  Where prompts differ, pairs are taken in order, as by `Patch`.

    Keys that the model itself masks stay masked.  In a generation it acts on the prompt's queries.
    In the vision encoder, queries and keys are patches of one image.

    Raises `InterventionError` for not exactly one of these, for a module without scores and pattern
    that can be written, for a frozen pattern of another shape, and while running for `mask=True`
    where a query is left without a key.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM, LastToken
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64), "red"), "What is this?")
    >>> knockout = Attend("blocks.2.attn", query=LastToken(), key=inputs.grid.all(), mask=True)
    >>> print(knockout)
    Attend(blocks.2.attn, last token to image (24 of 4x6 cells: rows 0-3, columns 0-5), mask=True)
    >>> logits = model.run_with_hooks(inputs, [knockout])
    """

    reads: ClassVar[str] = "to"
    site: str = field(kw_only=False)
    """The name of an attention module: a hook name without its last part."""
    query: Any = None
    key: Any = None
    heads: tuple[int, ...] | None = None
    scale: float | None = None
    mask: bool = False
    bias: float | None = None
    score_scale: float | None = None
    to: Source | Tensor | None = None

    @checked(InterventionError)
    def at_layers(self, layers: Iterable[int]) -> Chain:
        """Returns the same in the attention of each of some layers, as one intervention.

        >>> print(Attend("blocks.0.attn", scale=2.0).at_layers([1, 2]))
        Chain(Attend(blocks.1.attn, all to all, scale=2.0),
        Attend(blocks.2.attn, all to all, scale=2.0))
        """
        numbers = list(layers)
        if not numbers or not all(map(is_whole, numbers)):
            raise InterventionError(
                f"layers={shown(layers)} was given; expected one or more numbers of layers."
            )
        if not isinstance(self.site, str) or not re.search(r"\bblocks\.-?\d+\.", self.site):
            raise UnknownHookError(
                f"{self.site!r} has no layer that could be replaced; expected a name such as "
                "'blocks.0.attn'."
            )
        named = (re.sub(r"\bblocks\.-?\d+\.", f"blocks.{i}.", self.site) for i in numbers)
        return Chain(*(self.at_site(name) for name in named))

    @checked(InterventionError)
    def window(self, layer: int, width: Count, n_layers: Count) -> Chain:
        """Returns the same in `width` layers around one, those that a model of `n_layers` has.

        They are `layer - width // 2` and those after it, as in Geva et al. (2023).

        >>> len(Attend("blocks.0.attn", mask=True).window(1, 5, n_layers=6).parts)
        4
        """
        if not 0 <= layer < n_layers:
            raise InterventionError(
                f"layer={layer} was given; a model of {counted(n_layers, 'layer')} has 0 to "
                f"{n_layers - 1}."
            )
        first = layer - width // 2
        return self.at_layers(range(max(first, 0), min(first + width, n_layers)))

    def place(
        self, model: HookedModel, inputs: Mapping[str, Any], places: Places | None = None
    ) -> "PlacedAttend":
        """Returns this bound to a model and inputs, all checks made; nothing runs."""
        places = places or Places(model)
        kind = self._kind()
        site = attention_site(model, self.site, "attn_scores" if kind in ON_SCORES else "pattern")
        check_heads(self.heads, model, site)
        queries = queries_of(places, site, inputs, self.query)
        keys = keys_of(places, site, inputs, self.key)
        cross = reads_encoder(model, site)
        pairs = Pairs(site, inputs, queries, keys, self.heads, cross)
        if kind == "to":
            self._check_frozen(model)
        else:
            self._check_number(kind)
        if isinstance(self.to, Recording | Mapping):
            theirs = inputs_of(self.to)
            found = (
                queries_of(places, site, theirs, self.query),
                keys_of(places, site, theirs, self.key),
            )
            self._check_same_sizes(pairs, found)
            return PlacedAttend(self, site, inputs, (), places, pairs, found)
        return PlacedAttend(self, site, inputs, (), places, pairs)

    def _given(self) -> list[str]:
        # By identity: a scale of 0.0 equals False.
        values = {name: getattr(self, name) for name in KINDS}
        return [n for n, value in values.items() if value is not None and value is not False]

    def _kind(self) -> str:
        given = self._given()
        if self.mask is not True and self.mask is not False:
            raise InterventionError(
                f"Attend(mask={shown(self.mask)}) was given; expected True or False. For a mask of "
                "your own use query= and key=, or a hook function."
            )
        if len(given) != 1:
            raise InterventionError(
                f"Attend was given {' and '.join(given) or 'nothing to do'}; expected one of "
                "mask=True, scale=…, score_scale=…, bias=… and to=…. Chain one Attend for each."
            )
        return given[0]

    def _check_number(self, kind: str) -> None:
        value = getattr(self, kind)
        if kind != "mask" and (not is_number(value) or not math.isfinite(value)):
            hint = " To take a key away use mask=True." if kind == "bias" else ""
            raise InterventionError(
                f"Attend({kind}={shown(value)}) was given; expected a finite number.{hint}"
            )

    def _check_frozen(self, model: HookedModel) -> None:
        if not isinstance(self.to, Tensor):
            inputs_of(self.to)  # type: ignore[arg-type]
            return
        require_usable("Attend(to=…)", self.to, model.hf_model, InterventionError)
        if self.to.ndim not in (3, 4) or not self.to.is_floating_point():
            raise InterventionError(
                f"Attend(to=…) was given a tensor {tuple(self.to.shape)} of {self.to.dtype}; "
                "expected a pattern [batch, head, query, key] of floating point, as cached."
            )
        if not self.to.is_meta and not bool(self.to.isfinite().all()):
            raise InterventionError("Attend(to=…) has values that are NaN or infinite.")

    def _check_same_sizes(self, pairs: Pairs, theirs: tuple[Any, Any]) -> None:
        for name, ours, other in (
            ("query", pairs.queries, theirs[0]),
            ("key", pairs.keys, theirs[1]),
        ):
            if ours is None:
                continue
            if len(other) not in (1, len(ours)):
                raise InterventionError(
                    f"{self} freezes {counted(len(ours), 'prompt or image', 'prompts or images')} "
                    f"to a run that has {len(other)}. Give a run of the same batch size, or of one."
                )
            for i, (_, positions) in enumerate(ours):
                found = other[i % len(other)][1]
                moved = pairs.site.by_image and not torch.equal(positions, found)
                if len(positions) != len(found) or moved:
                    raise RegionError(
                        f"{self}: {name} is {counted(len(positions), 'position')} here and "
                        f"{len(found)} in the run that is written. Give places of equal size; in "
                        "the vision encoder, images of one size."
                    )

    def __str__(self) -> str:
        kind = next(iter(self._given()), "nothing")
        value = getattr(self, kind, None)
        told = f"{value}" if isinstance(value, bool | float | int) else "a recorded pattern"
        query, key = ("all" if at is None else at for at in (self.query, self.key))
        return f"Attend({self.site}, {query} to {key}, {kind}={told})"


@dataclass(frozen=True, eq=False)
class PlacedAttend(Placed):
    """An `Attend` bound to a model and inputs."""

    pairs: Pairs
    recorded_at: tuple[Located | None, Located | None] | None = None
    """Queries and keys in the run whose pattern is written; None for a tensor."""

    @property
    def first(self) -> int:
        """The first position, padding counted, that this changes."""
        return self.pairs.first

    @cached_property
    def _hook(self) -> Callable[..., Any]:
        rows = [] if not self.where.by_image else self.places.rows(self.inputs)
        one_each = bool(rows) and all(len(row.grids) == 1 for row in rows)
        if self.part.to is not None:
            _ = self._recorded  # a run of its own, before the one that this acts in
        return OnPrompt(self.edited, self.inputs, len(rows) if one_each else None)

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

    def _changed(self, x: Tensor, selected: Tensor, frozen: Tensor | None, start: int) -> Tensor:
        part: Attend = self.part
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
        """Warns, once for a sweep, where no query sees any of the keys."""
        if self.places.has_warned or any(x.is_meta for x in values):
            return
        is_score = self.where.part == "attn_scores"
        seen = [
            ((is_visible(x) if is_score else x != 0) & where).any()
            for x, where in zip(values, selected, strict=True)
        ]
        if any(bool(one) for one in seen):
            return
        self.places.has_warned = True
        warnings.warn(
            f"{self} changes nothing: no query sees any of its keys there. Keys after a query, "
            "before a sliding window, in another window or in another image are masked by the "
            "model itself. Exchange query and key, or choose other layers. (Shown once for a "
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
