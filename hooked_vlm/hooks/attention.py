"""The attention function that serves all attention sites, active only in modules with a hook.

transformers looks up every attention function in a registry, by the name in the module's
config.  While a run uses an attention site, that one module gets a replacement of its config
with the name of our function and the tap.  All other modules, and the mask code of their
parents, are unchanged.  Rotated queries and keys are passed to the tap and then to the
model's own implementation.  Scores and patterns exist only in eager attention, so that layer
computes eager attention, bit for bit as transformers does.

The mask has the form of the model's own implementation: None (plain causal in SDPA), boolean,
two-dimensional (FlashAttention), or additive.  `additive_mask` converts each into eager's
form.  It raises where a missing mask could mean causal or not causal, because an attention
that silently loses causality gives wrong results.
"""

import math
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hooked_vlm.anatomy.source import signature_of
from hooked_vlm.errors import HookError, UnsupportedModelError, counted


NAME = "hooked_vlm"
# transformers passes a packed encoder's whole sequence to an implementation with "flash" in
# its name, and calls all others once per image; we need all images in one call.
PACKED_NAME = "hooked_vlm_flash_layout"

AttentionPart = Literal["rot_q", "rot_k", "v", "attn_scores", "pattern"]
"""The quantities of an attention that have a tap."""
Edits = dict[AttentionPart, Callable[[Any], Any]]


class AttentionTap:
    """The functions that act inside one attention module during a run, by quantity.

    Each function takes the tensor (for scores and patterns of a packed module, a list of
    tensors by chunk) and returns the tensor with which the computation continues.
    """

    def __init__(self, base: str, edits: Edits) -> None:
        self.base = base
        self.edits = edits

    @property
    def eager(self) -> bool:
        """Whether a function acts on scores or patterns, which need eager attention."""
        return bool(self.edits.keys() & {"attn_scores", "pattern"})

    def apply(self, part: AttentionPart, value: Any) -> Any:
        """Returns the result of this part's function, or the value itself without a function."""
        edit = self.edits.get(part)
        return value if edit is None else edit(value)


class _Name(str):
    """The registered name of our function, which also equals the name of the model's own.

    Some attention modules compare the name with "eager" or "sdpa" before they look it up, and
    compute something else when it is neither.
    """

    base: str

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.base == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class TappedConfig:
    """A module's config with our attention implementation and the tap; the rest is delegated."""

    def __init__(self, config: Any, name: str, tap: AttentionTap) -> None:
        self._config = config
        self._attn_implementation = _Name(name)
        self._attn_implementation.base = tap.base
        self.hooked_vlm_tap = tap

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while it is copied, or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def implementation(module: nn.Module) -> str:
    """Returns the name of a module's own attention implementation, tapped or not."""
    config: Any = module.config
    tap = getattr(config, "hooked_vlm_tap", None)
    return tap.base if tap else config._attn_implementation or "eager"


def tapped_config(module: nn.Module, edits: Edits, packed: bool) -> TappedConfig:
    """Returns the config that an attention module gets for the duration of a run.

    The module may already have a tap from another wrapper of the same model.  Then both act,
    the newer one first, as with PyTorch's prepended hooks.
    """
    config: Any = module.config
    outer = getattr(config, "hooked_vlm_tap", None)
    if outer is not None:
        edits = {**outer.edits, **{n: _chain(f, outer.edits.get(n)) for n, f in edits.items()}}
    tap = AttentionTap(implementation(module), edits)
    return TappedConfig(config, PACKED_NAME if packed else NAME, tap)


def _chain(first: Callable, second: Callable | None) -> Callable:
    return first if second is None else lambda value: second(first(value))


def hooked_attention(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_head"],
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention as the module's own implementation does, and runs its tap."""
    # 1. Rotated queries and keys, and values.
    config: Any = module.config
    tap: AttentionTap = config.hooked_vlm_tap
    query, key = tap.apply("rot_q", query), tap.apply("rot_k", key)
    value = tap.apply("v", value)
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None and _needs_bounds(module) and config._attn_implementation == PACKED_NAME:
        raise HookError(
            f"{type(module).__name__} packs the patches of all images into one sequence and gave "
            f"no image boundaries (arguments: {', '.join(kwargs)}; expected cu_seq_lens_q), so "
            "its attention would mix images. Install a version of transformers from "
            "docs/measured/compatibility.md, and report this."
        )
    # 2. Without scores or patterns, the model's own implementation computes the rest.
    if not tap.eager:
        function = _base_function(tap.base, module)
        options = {"scaling": scaling, "dropout": dropout}
        if bounds is None or "flash" in tap.base:
            return function(module, query, key, value, attention_mask, **options, **kwargs)
        options |= {n: v for n, v in kwargs.items() if not n.startswith(("cu_seq", "max_length"))}
        chunks = _chunks(bounds, query, key, value)
        return torch.cat([function(module, *c, None, **options)[0] for c in chunks], dim=1), None
    # 3. Scores and patterns: eager attention, verified against the model's own.
    _refuse_other_arithmetic(kwargs)
    options = {"scaling": scaling, "softcap": kwargs.get("softcap")}
    if bounds is None:
        mask = additive_mask(module, query, key, attention_mask, tap.base, **_mask_options(kwargs))
        _verify(module, (query, key, value), attention_mask, mask, kwargs, options)
        weights = scores(query, key, mask, **options, bias=kwargs.get("position_bias"))
        weights = tap.apply("attn_scores", weights)
        weights = tap.apply("pattern", pattern(weights, query.dtype, kwargs.get("sinks")))
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        return attend(weights, value), weights
    # 4. A packed encoder: the same, image by image.
    chunks = _chunks(bounds, query, key, value)
    by_chunk = tap.apply("attn_scores", [scores(q, k, None, **options) for q, k, _ in chunks])
    by_chunk = tap.apply("pattern", [pattern(weights, query.dtype) for weights in by_chunk])
    outs = [attend(weights, v) for weights, (_, _, v) in zip(by_chunk, chunks, strict=True)]
    return torch.cat(outs, dim=1), None


def _needs_bounds(module: nn.Module) -> bool:
    """Whether an attention has to be given image bounds (RADIO's takes none for one image)."""
    parameters = signature_of(type(module).forward).parameters
    return any("cu_seq" in name and p.default is p.empty for name, p in parameters.items())


def _chunks(bounds: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    lengths = bounds.diff().tolist()
    return list(zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True))


def _base_function(base: str, module: nn.Module) -> Callable:
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(base, own or _eager)


def _eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Computes transformers' eager attention, for modules whose file does not define it."""
    weights = pattern(scores(query, key, attention_mask, scaling), query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return attend(weights, value), weights


def _mask_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs.get(name) for name in ("sliding_window", "is_causal")}


def _refuse_other_arithmetic(kwargs: dict[str, Any]) -> None:
    extra = [name for name in ("s_aux", "cache") if kwargs.get(name) is not None]
    if extra:
        raise UnsupportedModelError(
            f"This attention uses {', '.join(extra)}, which the scores and pattern sites do not "
            "reproduce. Hook q, k, v or z instead."
        )


BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest allowed difference from the module's own attention, relative to its largest value.

Eager attention computes its softmax in float32 for every dtype, so float64 is no closer.
"""
_VERIFIED: set[Hashable] = set()


def _verify(
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    given_mask: Any,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Verifies our arithmetic against the module's own, once for each kind of call.

    A future attention may take a new argument that changes its scores (as sinks, soft-capping
    and position biases did), under any name.  The verification uses noise: queries, keys and
    values of the run may have been edited by hooks, and zeros would agree in any arithmetic.

    Raises `UnsupportedModelError` when our result differs.
    """
    # 1. The kind of call: module, implementation, dtype, device and arguments.
    query, key, value = qkv
    plain = (str, bool, int, float, type(None))
    named = {n: v if isinstance(v, plain) else type(v) for n, v in kwargs.items()}
    base = implementation(module)
    kind = (type(module), base, query.dtype, query.device.type, str(sorted(named.items(), key=str)))
    if kind in _VERIFIED or query.is_meta:
        return
    # 2. Compare our output with the module's own.
    query, key, value = _noise_like(query, key, value, options["scaling"])
    call = {"scaling": options["scaling"], "dropout": 0.0, **kwargs}
    with torch.no_grad():
        theirs = _base_function(base, module)(module, query, key, value, given_mask, **call)[0]
        weights = scores(query, key, mask, **options, bias=kwargs.get("position_bias"))
        ours = attend(pattern(weights, query.dtype, kwargs.get("sinks")), value)
        # Padding positions attend to no key, and implementations differ in the result.
        sees = weights.amax(dim=-1).transpose(1, 2) > torch.finfo(query.dtype).min / 2
        ours, theirs = (torch.where(sees[..., None], out, 0) for out in (ours, theirs))
        off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not off <= BOUNDS.get(query.dtype, 5e-2):
        raise UnsupportedModelError(
            f"The scores and pattern sites do not reproduce {type(module).__name__}: its "
            f"{base!r} attention, called with {', '.join(sorted(kwargs)) or 'no options'}, differs "
            f"from eager attention by {off:.2g} of the largest value. Hook q, k, v or z instead."
        )
    _VERIFIED.add(kind)


def _noise_like(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns noise of the given shapes, with scores of a standard deviation of 3."""
    random = torch.Generator(query.device).manual_seed(0)
    like = {"generator": random, "device": query.device, "dtype": query.dtype}
    width = query.shape[-1]
    factor = 3 / (math.sqrt(width) * (scaling or width**-0.5))
    made = [torch.randn(x.shape, **like) for x in (query, key, value)]
    return made[0] * factor, made[1], made[2]


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Repeats key or value heads to the number of query heads."""
    if x.shape[1] == n_heads:
        return x
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def scores(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Returns the attention scores before the softmax, with position bias and additive mask."""
    key = repeat_heads(key, query.shape[1])
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = torch.matmul(query, key.transpose(2, 3)) * factor
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = weights if bias is None else weights + bias
    return weights if mask is None else weights + mask


def pattern(
    weights: Float[Tensor, "batch head query key"],
    dtype: torch.dtype,
    sinks: Tensor | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Returns the attention pattern: a softmax over keys, computed in fp32.

    With `sinks`, each query has one more score in the softmax, so rows sum to less than one.
    """
    if sinks is not None:
        all_scores = torch.cat([weights, sinks], dim=-1).float()
        return nn.functional.softmax(all_scores, dim=-1)[..., :-1].to(dtype)
    return nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(dtype)


def attend(
    weights: Float[Tensor, "batch head query key"], value: Float[Tensor, "batch kv_head key d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Returns the values weighted by the pattern, with positions before heads."""
    out = torch.matmul(weights, repeat_heads(value, weights.shape[1]))
    return out.transpose(1, 2).contiguous()


def additive_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    base: str,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
) -> Tensor | None:
    """Returns the mask as eager attention adds it: 0 where allowed, the dtype's minimum elsewhere.

    `base` is the implementation the mask was made for.  Raises `HookError` where a causal
    attention got no mask, unless None means plain causal for `base`.
    """
    # 1. Masks that need no change, or only a conversion from boolean.
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    n_query, n_key = query.shape[2], key.shape[2]
    if mask is not None and not isinstance(mask, Tensor):
        raise HookError(
            f"Attention scores and patterns cannot be read from a {type(mask).__name__}, which "
            f"the {base!r} implementation uses. Load the model with attn_implementation='sdpa' "
            "or 'eager'."
        )
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask
    if mask is not None and mask.ndim == 4:
        return _as_additive(mask, query.dtype)
    if mask is None and (not causal or n_query == 1):
        return None
    if mask is None and base != "sdpa" and "flash" not in base:
        raise HookError(
            f"A causal attention over {counted(n_query, 'position')} got no mask from the {base!r} "
            "implementation, so its pattern would not be causal. Load the model with "
            "attn_implementation='sdpa' or 'eager'."
        )
    # 2. None or a two-dimensional padding mask: build the causal part here.
    allowed = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device)
    if causal:
        allowed = allowed.tril(n_key - n_query)
        if sliding_window is not None and "flash" in base:
            allowed = allowed.triu(n_key - n_query - sliding_window + 1)
    allowed = allowed[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, -n_key:].bool()
    return _as_additive(allowed, query.dtype)


def _as_additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


def _register() -> None:
    """Registers our attention and its masks; with only one of the two, causality is lost."""
    for name in (NAME, PACKED_NAME):
        AttentionInterface.register(name, hooked_attention)
        AttentionMaskInterface.register(name, eager_mask)


_register()
