"""Verifies that the parts of `cache.decompose_resid` sum to the residual stream."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.checks.laws import NONE, Finding, finding, quiet
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import VISION, count_layers
from hooked_vlm.model.vlm import HookedVLM


NAMES = ("*blocks.*.hook_*",)
"""The sites that a decomposition reads."""


def check_decomposition(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that the parts of each residual stream sum to it, or that an error says why not.

    The sum is compared before the middle layer and after the last one, in the language model
    and in the vision encoder.  The note has the reasons of the errors.
    """
    problems, notes, summed = [], [], 0
    with quiet():
        cache = model.run_with_cache(inputs, NAMES)[1]
    for tower in (None, VISION):
        n_layers = count_layers(f"{tower}.blocks" if tower else "blocks", model.sites)
        if not n_layers:
            continue
        for layer in (n_layers // 2, None):
            try:
                parts = cache.decompose_resid(layer, tower=tower)
            except HookedVLMError as error:
                notes.append(f"{tower or 'LM'}: {error}")
                continue
            summed += 1
            off = _off(cache, parts, tower, layer, n_layers)
            if not off <= 1:
                where = "after the last block" if layer is None else f"before block {layer}"
                stack = tower or "the language model"
                problems.append(f"parts of {stack} {where} miss it by {off:.1f} times the rounding")
    if not summed and not problems:
        return Finding("decomposition", NONE, "; ".join(dict.fromkeys(notes)))
    return finding("decomposition", problems, note="; ".join(dict.fromkeys(notes)))


def _off(
    cache: ActivationCache, parts: Any, tower: str | None, layer: int | None, n_layers: int
) -> float:
    """Returns the largest difference of the sum from the stream, in units of the allowed one.

    The parts of each row are added in one order here and in another one in the model, and each
    addition rounds in proportion to the largest value of the row.
    """
    after_all = layer is None or layer == n_layers
    whole: Tensor = (
        cache["resid_post", -1, tower] if after_all else cache["resid_pre", layer, tower]
    )
    total = parts.double().sum(0)
    largest = parts.double().abs().amax(0).amax(-1, keepdim=True)
    allowed = 4 * len(parts) * torch.finfo(whole.dtype).eps * largest.clamp(min=1e-6)
    return float(((total - whole).abs() / allowed).max())
