"""Changing what attention reads: knocking it out, weighting it, freezing its pattern."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Count, is_number, is_whole
from hooked_vlm.errors import (
    InterventionError,
    RegionError,
    UnknownHookError,
    counted,
)
from hooked_vlm.inputs.tensors import require_usable
from hooked_vlm.interventions.attended import PlacedAttend
from hooked_vlm.interventions.base import _Bound, check_heads
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.pairs_of_attention import (
    Pairs,
    attention_site,
    keys_of,
    queries_of,
    reads_encoder,
)
from hooked_vlm.interventions.placing import Places, inputs_of
from hooked_vlm.interventions.recording import Recording, Source
from hooked_vlm.model.base import HookedModel
from hooked_vlm.regions.generated import Generated, generated_in


ON_SCORES = ("mask", "bias", "score_scale")
KINDS = ("scale", *ON_SCORES, "to")


@checked(InterventionError, only_names=True)
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
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

    Keys that the model itself masks stay masked.  In a generation it acts on the prompt's queries;
    `query=Generated()` is those of the answer, and `LastToken() | Generated()` all that predict it.
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
    ) -> PlacedAttend:
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
        generated = self._generated(kind)
        if isinstance(self.to, Recording | Mapping):
            theirs = inputs_of(self.to)
            found = (
                queries_of(places, site, theirs, self.query),
                keys_of(places, site, theirs, self.key),
            )
            self._check_same_sizes(pairs, found)
            return PlacedAttend(self, site, inputs, (), places, pairs=pairs, recorded_at=found)
        return PlacedAttend(self, site, inputs, (), places, generated, pairs=pairs)

    def _generated(self, kind: str) -> tuple[Generated, ...]:
        """Returns the generated tokens among the queries."""
        found = generated_in(self.query)
        if generated_in(self.key) or (found and kind == "to"):
            raise InterventionError(
                f"{self}: generated tokens are queries of scale=, mask=, bias= and score_scale=, "
                "whose keys are places of the prompt. Use a hook function for others: "
                "hook.positions and hook.key_positions say where it is."
            )
        return found

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
        what = f"{value}" if isinstance(value, bool | float | int) else "a recorded pattern"
        query, key = ("all" if at is None else at for at in (self.query, self.key))
        return f"Attend({self.site}, {query} to {key}, {kind}={what})"
