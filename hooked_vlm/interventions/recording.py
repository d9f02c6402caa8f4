"""Runs that interventions read from: activations, with the inputs that say where they are."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.errors import InterventionError, UnknownHookError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import NamesFilter, last_block, site_path
from hooked_vlm.hooks.stand_ins import encoder_of, ending_encoded, uncached
from hooked_vlm.model.base import HookedModel
from hooked_vlm.model.gradients import without_probes
from hooked_vlm.model.vlm import HookedVLM


@checked(InterventionError)
@dataclass(frozen=True, eq=False, repr=False)
class Recording(OneLine):
    """One run's activations, with the inputs that say where in them everything is."""

    inputs: Mapping[str, Any]
    cache: ActivationCache


Source = Recording | Mapping[str, Any]
"""A recorded run, or the inputs of a run to be made."""


@checked(UnknownHookError)
def record(model: HookedModel, inputs: Mapping[str, Any], names: NamesFilter) -> Recording:
    """Runs a model on some inputs and returns the named activations with those inputs.

    The pass ends after the last block of the language model that is named, or after the vision
    encoder where all sites are in its blocks, and keeps no key-value cache.  Functions of open
    `model.hooks` blocks act on it as on any run, but `bwd_hooks` do not: it keeps no graph.
    """
    options: dict[str, Any] = {}
    ending: AbstractContextManager[None] = nullcontext()
    if isinstance(model, HookedVLM):
        last, lm = last_block(names), model.anatomy.lm
        # After all blocks it ends before the final norm: no vocabulary is computed.
        if last is not None and last < len(lm.blocks) - (lm.final_norm is None):
            options["stop_at_layer"] = last + 1
        options |= uncached(model.hf_model)
        if options.get("stop_at_layer") == 0 and _is_in_encoder(names):
            ending = ending_encoded(encoder_of(model), inputs)
    with torch.no_grad(), without_probes(model), ending:
        return Recording(inputs, model.run_with_cache(inputs, names, **options)[1])


def require_stream(cache: ActivationCache, name: str) -> None:
    """Raises `InterventionError` for a stream that a cache has only on the other side of a block.

    The stream after a block is the one before the next, but not where a model adds something
    between them (DeepStack), which a cache cannot tell: so neither stands for the other.
    """
    other = _beside(name)
    if other is not None and other in cache and name not in cache:
        raise InterventionError(
            f"The source has '{other}', and '{name}' is read. They are one stream in most models, "
            "but not where features are added between blocks (DeepStack). Record the one that is "
            f"read: record(model, inputs, '{name}'); or read the other: Patch(…, "
            f"source_site='{other}')."
        )


def _beside(name: str) -> str | None:
    """Returns the site of the same stream on the other side of the gap between two blocks."""
    path = site_path(name)
    if path.layer is None or path.leaf not in ("hook_resid_pre", "hook_resid_post"):
        return None
    stack = name.rsplit("blocks.", 1)[0]
    if path.leaf == "hook_resid_post":
        return f"{stack}blocks.{path.layer + 1}.hook_resid_pre"
    return f"{stack}blocks.{path.layer - 1}.hook_resid_post" if path.layer else None


def _is_in_encoder(names: NamesFilter) -> bool:
    """Whether all sites are named, and lie in blocks of the vision encoder."""
    given = [names] if isinstance(names, str) else names
    if given is None or callable(given):
        return False
    return all(name.startswith("vision_encoder.blocks.") for name in given)
