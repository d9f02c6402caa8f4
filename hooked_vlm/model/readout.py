"""What a model makes of a residual stream after its last block: its own final norm and head.

A logit lens reads streams from inside a model as if they were the last one.  Models differ in what
they do then: a norm of their own kind, a scale of the logits, a soft cap.  So the streams go
through the model's own forward, in place of what its last block returns.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import UnsupportedModelError
from hooked_vlm.hooks.stand_ins import skipping, standing_in


class Readout:
    """The final norm and the head of a model, as they act in runs on some inputs.

    It keeps the model only as long as others do, since a cache that has it is often kept.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
        self._model = weakref.ref(model)
        self.inputs = inputs
        self.kwargs = {name: x for name, x in kwargs.items() if name != "logits_to_keep"}

    @property
    def model(self) -> Any:
        """The model of the run; raises `UnsupportedModelError` where it is gone."""
        model = self._model()
        if model is None:
            raise UnsupportedModelError(
                "The model of this cache's run is gone, and with it its final norm and head. Keep "
                "the model as long as its caches are read."
            )
        return model

    @torch.no_grad()
    def logits(
        self, streams: Float[Tensor, "slot ..."], at: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "slot batch kept_pos d_vocab"]:
        """Returns the logits that the model gives for residual streams after its last block.

        `at` selects positions of `[slot, batch, pos, ...]`.  All slots go through one pass, as rows
        of a larger batch, with the selected positions alone.  Where a model brings in something
        else of the run there, or has several streams, each slot takes a pass with all positions.
        """
        if streams.ndim == 4:
            chosen = at(streams)
            rows = rearrange(chosen, "slot batch pos d -> (slot batch) pos d")
            try:
                logits = self._after_blocks(rows)
            except (RuntimeError, ValueError):  # something of the run (labels) has its rows
                logits = None
            if logits is not None and logits.shape[:2] == rows.shape[:2]:
                return rearrange(logits, "(slot batch) pos v -> slot batch pos v", slot=len(chosen))
        return at(torch.stack([self._after_blocks(stream) for stream in streams]))

    def _after_blocks(self, stream: Tensor) -> Tensor:
        """Returns the logits of a pass whose last block returns `stream`; the others do nothing."""
        model = self.model
        *blocks, last = [model.hf_model.get_submodule(b.path) for b in model.anatomy.lm.blocks]

        def run() -> Tensor:
            return model.forward(self.inputs, **self.kwargs)

        *lengths, length = model.block_outputs(run)
        with (
            model.turn(),
            model.without_hooks(),
            skipping(blocks, lengths),
            standing_in(last, _returning(stream, length)),
        ):
            return run()


def _returning(rows: Tensor, length: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (rows, *[None] * (length - 1)) if length else rows

    return forward
