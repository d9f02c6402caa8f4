"""Runs the blocks of the language model from a layer on."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hooked_vlm.errors import HookedVLMWarning, callers_level
from hooked_vlm.hooks.names import site_path
from hooked_vlm.hooks.prompts import require_generation
from hooked_vlm.hooks.stand_ins import (
    EMBEDDINGS,
    layer_index,
    noting,
    skipping,
    start_site,
    uncached,
)
from hooked_vlm.inputs.prepared import together
from hooked_vlm.model.said import warn_unran


def run_from(
    model: Any,
    inputs: Mapping[str, Any],
    residual: Tensor,
    layer: int,
    fwd_hooks: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Returns the logits of LM blocks `layer` and above; see `HookedVLM.run_from_layer`."""
    # 1. A function that writes the residual stream at `layer`, and those of the user above.
    blocks = [model.hf_model.get_submodule(b.path) for b in model.anatomy.lm.blocks]
    layer = layer_index(layer, len(blocks), "layer")
    kwargs = {**uncached(model.hf_model), **kwargs}
    tuples = model.block_outputs(lambda: model.forward(inputs, **kwargs))
    site = start_site(model.sites, layer, len(blocks))
    start = (site, lambda here, hook: residual.to(here.device, copy=True))
    pairs = model._pairs(fwd_hooks, together(inputs, kwargs))
    require_generation(pairs)
    below = {("lm", i) for i in range(layer)}
    skipped = {name for name, _ in pairs if site_path(name)[:2] in below}
    lost: set[str] = set()
    run = [
        (name, noting(fn, name, lost) if name in EMBEDDINGS else fn)
        for name, fn in pairs
        if name not in skipped
    ]
    # 2. Run with the blocks below `layer` replaced, then warn about functions without effect.
    with model.turn(), skipping(blocks[:layer], tuples[:layer]):
        logits = model.run_with_hooks(inputs, [start, *run], **kwargs)
    warn_unran(skipped)
    if lost:
        warnings.warn(
            f"The write to {', '.join(sorted(lost))} has no effect: the run starts "
            f"from the residual stream that was given for layer {layer}. Write to "
            f"{site}, or change `residual`.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
    return logits
