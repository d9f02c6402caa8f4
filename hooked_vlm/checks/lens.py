"""Verifies that a logit lens reads streams as the model itself does."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_vlm.checks.laws import NONE, Finding, finding, quiet
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.model.vlm import HookedVLM


STREAMS = ("blocks.0.hook_resid_pre", "blocks.*.hook_resid_post")


def check_lens(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that the lens at the last slot gives the run's logits, and not at the first.

    A stream from the middle must give what `run_from_layer` gives for it after the last block, in
    models that do nothing to a single stream between that block and the final norm.
    """
    problems = []
    with quiet():
        logits, cache = model.run_with_cache(inputs, STREAMS)
        try:
            read = cache.logit_lens()
        except HookedVLMError as error:
            return Finding("lens", NONE, str(error))
        n_layers = model.cfg.n_layers
        streams = cache.accumulated_resid()
        assert isinstance(streams, Tensor)
        compares = streams.ndim == 4 and bool(
            (model.run_from_layer(inputs, streams[-1], n_layers) == logits).all()
        )
        plain = model.run_from_layer(inputs, streams[n_layers // 2], n_layers) if compares else None
    size = float(logits.abs().max())
    off = float((read[-1] - logits).abs().max()) / size
    if not off <= 1e-5:
        problems.append(f"the last slot differs from the logits by {off:.1e} of the largest")
    if plain is not None:
        off = float((read[n_layers // 2] - plain).abs().max()) / size
        if not off <= 1e-5:
            problems.append(f"slot {n_layers // 2} differs from run_from_layer by {off:.1e}")
    if bool((read[0] == read[-1]).all()):
        problems.append("the first slot gives the same as the last one")
    return finding("lens", problems)
