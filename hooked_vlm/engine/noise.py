"""How far apart two right ways of computing the same logits are: the bound of a control.

Passes of other shapes add in another order, and every rounding on the way is amplified by the
blocks above.  How much depends on the dtype, on the depth of the model, and on how matrix products
are computed (TF32, autocast), so it is measured: how far the logits move where the blocks' input is
changed by one rounding, and where each prompt is run twice in one batch.
"""

from collections.abc import Mapping
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.clean_run import asked
from hooked_vlm.engine.fingerprints import arithmetic, remember, ways_of_attending
from hooked_vlm.engine.stages import prompt_mask
from hooked_vlm.hooks.hook_point import HookPoint


BOUNDS = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By dtype, as a share of the largest logit: in half precision the highest bound there is, else the
lowest.  The highest of float32 is that of float16, whose mantissa TF32 has."""
TIMES = 3.0
"""How many times the measured noise two passes may be apart."""
FIRST = "blocks.0.hook_resid_pre"

_MANTISSAS = {"high": 2**-11, "tf32": 2**-11, "medium": 2**-8, "bf16": 2**-8}
"""Half the distance of neighbouring numbers by the precision of matrix products in float32."""


def bound_for(
    model: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any], dtype: Any, off: float
) -> float:
    """Returns the bound that a difference of `off` is compared with, both over the largest logit.

    `dtype` is that of the logits.  Noise is measured, once for a model and an arithmetic, only
    where the difference is larger than the least bound.
    """
    dtype = _coarsest(model, dtype)
    least, most = limits(dtype)
    if off <= least:
        return least
    kind = ("noise", dtype, arithmetic(model.device), ways_of_attending(model))
    with torch.no_grad():
        noise = remember(model, kind, partial(_measured, model, inputs, arguments, dtype))
    return most if noise is None else min(most, max(least, TIMES * noise))


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """Returns the lowest and the highest bound of a dtype.

    >>> limits(torch.float32), limits(torch.bfloat16)
    ((5e-05, 0.02), (0.0078125, 0.05))
    """
    given = BOUNDS.get(dtype, BOUNDS[torch.bfloat16])
    if dtype == torch.float32:
        return given, BOUNDS[torch.float16]
    eps = torch.finfo(dtype).eps
    return min(given, max(eps, 1e-9)), given


def _coarsest(model: Any, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the largest roundings on the way to logits of some dtype."""
    autocast, _ = arithmetic(model.device)
    used = [x for x in (dtype, model.cfg.dtype, autocast) if x is not None and x.is_floating_point]
    return max(used, key=lambda x: torch.finfo(x).eps)


def _measured(
    model: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any], dtype: torch.dtype
) -> float | None:
    """Returns the larger of the two differences; None where neither can be had."""
    given, arguments = asked(inputs), {**arguments}
    compared = partial(at_tokens, inputs=inputs, arguments=arguments)

    def rounded() -> float:
        edited = model.run_with_hooks(given, [(FIRST, _one_rounding(model, dtype))], **arguments)
        return apart(compared(edited), compared(plain))

    def doubled() -> float:
        twice = model(_twice(given), **arguments)[: len(plain)]
        return apart(compared(twice), compared(plain))

    found = []
    try:
        plain = attempt(lambda: model(given, **arguments), "a plain run failed")
        for measure in (rounded, doubled):
            found.append(attempt(measure, "noise could not be measured"))
    except (GrowthError, torch.OutOfMemoryError):
        pass  # inputs that cannot be put one after the other, for one
    return max(found, default=None)


def apart(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of logits, as a share of the largest logit.

    Infinite where there is nothing to compare: all expected logits are NaN, or 0.
    """
    # Some models set the logits of tokens that must not come to the least number there is.
    counts = expected > torch.finfo(expected.dtype).min / 2
    largest = float(expected[counts].abs().max()) if counts.any() else 0.0
    return float((found - expected)[counts].abs().max()) / largest if largest else inf


def at_tokens(logits: Tensor, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Tensor:
    """Returns logits `[batch, pos, d_vocab]` without those at padding: `[token, d_vocab]`.

    They are returned as they are where nothing says which positions are padding.  What a model
    gives at padding means nothing, and depends on how many keys a pass has: in eager attention a
    position that sees none attends to all alike.
    """
    mask = prompt_mask(inputs)
    if mask is None or mask.ndim != 2:
        return logits
    # As models of transformers cut their stream: a number of last positions, or an index.
    keep = arguments.get("logits_to_keep", 0)
    index = slice(-keep, None) if isinstance(keep, int) else torch.as_tensor(keep).to(mask.device)
    is_token = mask[:, index] != 0
    if is_token.shape != logits.shape[:2]:
        return logits
    return logits[is_token.to(logits.device)]


def _one_rounding(model: Any, dtype: torch.dtype) -> Any:
    """Returns a hook function that changes each value by as much as one rounding may."""
    unit = torch.finfo(dtype).eps / 2
    if dtype == torch.float32:
        unit = _MANTISSAS.get(arithmetic(model.device)[1], unit)

    def fn(x: Tensor, hook: HookPoint) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        return (x.double() * (1 + unit * drawn.sign())).to(x.dtype)

    return fn


def _twice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns inputs with all prompts, and all images, once more after them."""
    return {
        name: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x
        for name, x in inputs.items()
    }
