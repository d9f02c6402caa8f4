"""Verifies that direct logit attribution sums to the logits, by parts and by heads."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.checks.laws import NONE, Finding, finding
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import site_path
from hooked_vlm.model.vlm import HookedVLM


LEAVES = ("hook_z", "hook_post", "hook_logits", "_out")
"""Ends of the names of sites that attributions read, beside residual streams."""


def check_attribution(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that what parts, heads and neurons add to a difference of logits sums to it.

    The difference is that of the last position's largest and smallest logit.  Where the model caps
    its logits, it is that of the unembedding's output.  The note has the reasons of errors.
    """
    problems, notes, summed = [], [], 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for name in model.sites if name.endswith(LEAVES) or "resid" in name]
        names = [name for name in names if not site_path(name).is_vision]
        logits, cache = model.run_with_cache(inputs, names)
        for kind in ("parts", "heads", "neurons"):
            try:
                off = _off(kind, logits, cache)
            except HookedVLMError as error:
                notes.append(f"{kind}: {error}")
                continue
            summed += 1
            if not off <= 1e-4:
                problems.append(f"{kind} miss the logits by {off:.1e} of the largest")
    if not summed:
        return Finding("attribution", NONE, "; ".join(notes))
    return finding("attribution", problems, note="; ".join(notes))


def _off(kind: str, logits: Tensor, cache: ActivationCache) -> float:
    """Returns the largest difference of a sum from the logits, as a share of the largest logit."""
    options: dict[str, Any] = {"pos_slice": -1}
    if kind == "parts":
        stack = cache.decompose_resid(**options)
    elif kind == "heads":
        stack = cache.stack_head_results(incl_remainder=True, **options)
    else:
        stack = cache.stack_neuron_results(neuron_slice=slice(3), incl_remainder=True, **options)
    assert isinstance(stack, Tensor)
    last = logits[:, -1]
    pair = last.argmax(-1), last.argmin(-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = cache.logit_attrs(stack, *pair, pos_slice=-1).sum(0)
    total = total + cache.logit_bias(*pair, pos_slice=-1)
    if any("caps its logits" in str(w.message) for w in caught):
        last = cache["hook_logits"][:, -1]
    top, low = (last.gather(1, ids[:, None])[:, 0] for ids in pair)
    return float((total - (top - low)).abs().max()) / float(last.abs().max())
