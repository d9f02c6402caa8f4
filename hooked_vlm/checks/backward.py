"""Verifies that cached gradients are those of tensors that a hook function adds by hand."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.checks.laws import NONE, Finding, finding, quiet
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.names import GRADIENT
from hooked_vlm.hooks.patch_order import listed
from hooked_vlm.model.vlm import HookedVLM


_BOUND = 1e-3
"""Largest difference, relative to a site's largest gradient, of two backward passes in float32."""


def check_backward(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies the gradient at every writable site against that of a zero added there.

    Both are of one score, over all logits, in one pass each.
    """
    names = [name for name, site in model.sites.items() if not site.read_only]
    with quiet():
        try:
            _, cache = model.run_with_cache(inputs, names, incl_bwd=True, metric=_score)
        except HookError as error:  # a model that passes no gradient on
            return Finding("backward", NONE, str(error))
        expected = _by_hand(model, inputs, names)
    problems, flowing = [], 0
    for name, parts in expected.items():
        found = listed(cache[name + GRADIENT])
        if [g.shape for g in found] != [p.shape for p in parts]:
            problems.append(f"{name}: gradients of other shapes than the activation")
            continue
        size = max(float(part.abs().max()) for part in parts)
        off = max(float((g - p).abs().max()) for g, p in zip(found, parts, strict=True))
        flowing += size > 0
        if not off <= _BOUND * size:
            problems.append(f"{name}: differs by {off:.1e}, the largest is {size:.1e}")
    if not flowing:
        problems.append("no gradient anywhere")
    return finding("backward", problems, note=f"{flowing} of {len(expected)} sites have one")


def _score(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1).sum()


def _by_hand(
    model: HookedVLM, inputs: Mapping[str, Any], names: list[str]
) -> dict[str, list[Tensor]]:
    """Returns the gradients of zeros that hook functions add at all sites, by image if listed."""
    zeros: dict[str, list[Tensor]] = {}
    listed_at: set[str] = set()

    def add(value: Any, hook: HookPoint) -> Any:
        new = [torch.zeros_like(part, requires_grad=True) for part in listed(value)]
        zeros[hook.name] = zeros.get(hook.name, []) + new
        if isinstance(value, list):
            listed_at.add(hook.name)
            return [part + zero for part, zero in zip(value, new, strict=True)]
        return value + new[0]

    with torch.enable_grad():
        score = _score(model.run_with_hooks(inputs, [(name, add) for name in names]))
        flat = [zero for parts in zeros.values() for zero in parts]
        found = iter(torch.autograd.grad(score, flat, allow_unused=True))
    gradients = {
        name: [torch.zeros_like(z) if (g := next(found)) is None else g for z in parts]
        for name, parts in zeros.items()
    }
    # Calls of a module that runs once for each image follow one another in the cache.
    return {
        name: parts if name in listed_at or len(parts) == 1 else _joined(parts)
        for name, parts in gradients.items()
    }


def _joined(parts: list[Tensor]) -> list[Tensor]:
    images = [image for part in parts for image in part]
    return [torch.stack(images)] if len({image.shape for image in images}) == 1 else images
