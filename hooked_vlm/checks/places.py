"""Verifies that appended tokens are what a generation computes, and caches cut to a place."""

from typing import Any

import torch

from hooked_vlm.checks.answers import NEAR, greedy
from hooked_vlm.checks.laws import NONE, Finding, finding, quiet
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import Answer, LastToken


def check_append(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies that an answer appended to its prompt has the logits of its generation's steps.

    The steps run with a key-value cache, the appended inputs in one pass.  The cache of that pass,
    cut to the answer, has the stream of these positions.
    """
    with quiet():
        given: Any = model.generate(inputs, **greedy(model))
        steps = getattr(given, "logits", None)
        if steps is None or "input_ids" not in inputs:
            return Finding("append", NONE, "its generation gives no logits")
        start = inputs["input_ids"].shape[1]
        new = given.sequences[:, -len(steps) :]
        if not torch.allclose(model(inputs)[:, -1], steps[0], **NEAR):
            return Finding("append", NONE, "its generate changes the prompt")
        if not _is_repeatable(model, inputs, steps):
            return Finding("append", NONE, "transformers' steps differ from passes of the whole")
        try:
            longer = model.append(inputs, new.tolist())  # a tensor would be cut at padding tokens
        except HookedVLMError as error:
            return Finding("append", NONE, str(error)[:200])
        site = "hook_logits"
        logits, cache = model.run_with_cache(longer, [site])
        # Some models put their image before the prompt, so positions count from the end.
        found, expected = logits[:, -len(steps) - 1 : -1], torch.stack(steps, 1)
        problems = []
        if found.shape != expected.shape or not torch.allclose(found, expected, **NEAR):
            gap = float((found - expected).abs().nan_to_num().max())
            problems.append(f"logits of an appended answer are off by {gap:.1e}")
        if logits.shape[1] != start + len(steps):
            return finding("append", problems, note="logits have other positions than the prompt")
        for place, stop in ((Answer(), len(steps)), (LastToken(), 1)):
            position = longer.positions(place)[0]
            if position.tolist() != list(range(start + len(steps) - stop, start + len(steps))):
                problems.append(f"{place} is at {position.tolist()}")
            if not torch.equal(cache.at(place)[site], cache[site][:, position]):
                problems.append(f"the cache at {place} is of other positions")
    return finding("append", problems)


def _is_repeatable(model: HookedVLM, inputs: Inputs, steps: Any) -> bool:
    """Whether transformers gives the same logits without a key-value cache, where it can."""
    try:
        plain: Any = model.generate(inputs, use_cache=False, **greedy(model))
    except Exception:  # noqa: BLE001 - some architectures cannot generate without a cache
        return True
    found, expected = torch.stack(plain.logits), torch.stack(steps)
    return found.shape == expected.shape and torch.allclose(found, expected, **NEAR)
