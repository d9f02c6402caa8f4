"""What a cache reads of the model whose run it holds: final norm, head, and the maps that
end its parts.

A logit lens reads streams from inside a model as if they were the last one.  Models differ in what
they do then: a norm of their own kind, a scale of the logits, a soft cap.  So the streams go
through the model's own forward, in place of what its last block returns.  For direct logit
attribution the same is measured: which linear map the norm is at a fixed scale, and by what the
logits differ from the unembedding's output.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.anatomy.parts import Block
from hooked_vlm.anatomy.weights import Weights
from hooked_vlm.errors import (
    DataError,
    HookedVLMWarning,
    UnsupportedModelError,
    callers_level,
)
from hooked_vlm.hooks.linear_norm import LinearNorm
from hooked_vlm.hooks.output_parts import Summands, rounding
from hooked_vlm.hooks.stand_ins import skipping, standing_in
from hooked_vlm.model.instead import weight_of


_OF_LOGITS = frozenset({"logits_to_keep", "labels"})


def _weights_of(model: Any) -> Weights:
    """Returns a watch over the weights that caches read: one for a model and its modules."""
    lm = model.anatomy.lm
    paths = [lm.final_norm, model.anatomy.unembed]
    for block in lm.blocks:
        outs = (block.attn and block.attn.out, block.mlp and block.mlp.down)
        paths += [*outs, block.attn_out, block.mlp_out]
    modules = [model.hf_model.get_submodule(path) for path in dict.fromkeys(paths) if path]
    # Attention and MLPs that end in no norm are there whole: their own map is enough.
    small = [m for m in modules if not m._modules]
    watch = getattr(model, "_read_weights", None)
    if watch is None or list(watch.whole) != small:  # a module was replaced
        watch = model._read_weights = Weights(nn.ModuleList(small))
    return watch


class Readout:
    """The final norm and the head of a model, as they act in runs on some inputs.

    It keeps the model only as long as others do, since a cache that has it is often kept.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
        self._model = weakref.ref(model)
        self._given = {**inputs, **kwargs}
        # What changes which logits there are, or compares them, is left out.
        self.inputs = inputs
        if _OF_LOGITS & set(inputs):
            self.inputs = {name: x for name, x in inputs.items() if name not in _OF_LOGITS}
        self.kwargs = {name: x for name, x in kwargs.items() if name not in _OF_LOGITS}
        self._weights = _weights_of(model)
        self._state = self._weights.state()
        self._last: Tensor | None = None
        self._norms: dict[str, LinearNorm | None] = {}
        self._factor: float | None = None
        self._caps = False

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

    def keep_last(self, logits: Any) -> None:
        """Keeps the last position's logits of the run, if these are the run's logits.

        Hooks of the run may have changed them after the last block.
        """
        kept = {**self._given, "logits_to_keep": self._given.get("logits_to_keep", 0)}
        is_last = isinstance(kept["logits_to_keep"], int)
        if isinstance(logits, Tensor) and logits.ndim == 3 and is_last:
            self._last = logits[:, -1:].detach().clone()

    def compare_last(self, logits: Float[Tensor, "*batch d_vocab"]) -> None:
        """Warns where these are not the run's logits at the last position."""
        if self._last is None or self._last[:, 0].shape != logits.view(-1, logits.shape[-1]).shape:
            return
        kept = self._last[:, 0].to(logits)
        off = float((logits.view_as(kept) - kept).abs().max())
        if off > rounding(self._last.dtype) * float(kept.abs().max()):
            warnings.warn(
                f"The last slot of the lens is off the run's logits by {off:.2g}: a hook of the "
                "run acted after the last block, or the model did something else then.",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )

    def of_rows(self, rows: slice | Tensor) -> "Readout":
        """Returns the same for some prompts of the run."""
        made = copy.copy(self)
        made._last = None if self._last is None else self._last[rows]
        return made

    def _require_same_weights(self) -> None:
        """Raises `DataError` where the weights that are read are no longer those of the run."""
        model = self.model
        if _weights_of(model) is not self._weights or self._weights.state() != self._state:
            raise DataError(
                "The model's weights were changed after this cache's run, so its final norm, head "
                "and output maps are not those of the run. Run model.run_with_cache again."
            )

    @torch.no_grad()
    def logits(
        self, streams: Float[Tensor, "slot ..."], at: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "slot batch kept_pos d_vocab"]:
        """Returns the logits that the model gives for residual streams after its last block.

        `at` selects positions of `[slot, batch, pos, ...]`.  All slots go through one pass, as rows
        of a larger batch, with the selected positions alone.  Where a model brings in something
        else of the run there, or has several streams, each slot takes a pass with all positions.
        """
        self._require_same_weights()
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

    def norm(self, layer: int, mlp_input: bool) -> tuple[str, LinearNorm]:
        """Returns the norm before a part of a block, or the final one, at a fixed scale.

        Raises `UnsupportedModelError` where there is none, or another function.
        """
        self._require_same_weights()
        lm = self.model.anatomy.lm
        block: Block | None = lm.blocks[layer] if layer < len(lm.blocks) else None
        path = lm.final_norm if block is None else block.ln2 if mlp_input else block.ln1
        found = self._linear(path) if path and not (block and block.post_norm) else None
        if path is None or found is None:
            where = "after the last block" if block is None else f"in block {layer}"
            raise UnsupportedModelError(
                f"The norm {where} ({path}) is not linear at a fixed scale, or reads no residual "
                "stream, so parts of the stream cannot be followed through it. Use logit_lens()."
            )
        return path, found

    def _linear(self, path: str) -> LinearNorm | None:
        if path not in self._norms:
            width = self.model.cfg.d_model
            weights = next(iter(self.model.hf_model.get_submodule(path).parameters()), None)
            if weights is not None and weights.ndim == 1:  # the vision encoder has another width
                width = len(weights)
            try:
                found = LinearNorm.measured(lambda x: self.normed(path, x), width, self._device)
            except Exception:  # noqa: BLE001 - no norm: code of another kind of module
                found = None
            self._norms[path] = found
        return self._norms[path]

    @property
    def _device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def normed(self, path: str, stream: Float[Tensor, "*pos d"]) -> Float[Tensor, "*pos d"]:
        """Returns what a norm of the model makes of a stream, in float32."""
        return self._float_norm(path)(stream.float())

    def _float_norm(self, path: str) -> nn.Module:
        norm = copy.deepcopy(self.model.hf_model.get_submodule(path)).float().requires_grad_(False)
        norm._forward_hooks.clear()  # of others, which act on runs
        norm._forward_pre_hooks.clear()
        return norm

    def summands(self, kind: str, layer: int, tower: str | None) -> Summands | None:
        """Returns how attention (`"heads"`) or the MLP (`"neurons"`) of a block is summed.

        None where the block has no such part that one linear map ends.
        """
        self._require_same_weights()
        anatomy = self.model.anatomy
        block: Block = (anatomy.vision if tower else anatomy.lm).blocks[layer]
        if kind == "heads":
            path, out = block.attn and block.attn.out, block.attn_out
        else:
            path, out = block.mlp and block.mlp.down, block.mlp_out
        if path is None or out is None:
            return None
        module = self.model.hf_model.get_submodule(path)

        @torch.no_grad()
        def apply(x: Tensor) -> Tensor:
            with self.model.without_hooks():
                return module(x)

        # The module whose output is added may be a norm after the map.
        norm = None if f"{path}.".startswith(f"{out}.") else self._linear(out)
        return Summands(apply, norm, None if norm is None else lambda x: self.normed(out, x))

    @torch.no_grad()
    def directions(
        self, tokens: Tensor, stream: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "*pos d_model"], Float[Tensor, "*pos"]]:
        """Returns the directions of tokens' logits in the normed final stream, and their biases.

        `stream` is the run's, from which the factor between the unembedding and the logits is
        measured, once.  Raises `DataError` for ids that are no tokens.
        """
        model = self.model
        matrix = weight_of(model.hf_model, model.anatomy.unembed)
        if tokens.dtype.is_floating_point or bool(((tokens < 0) | (tokens >= len(matrix))).any()):
            raise DataError(
                f"tokens hold values from {tokens.min()} to {tokens.max()} of {tokens.dtype}; "
                f"expected ids of the vocabulary, 0 to {len(matrix) - 1}."
            )
        if self._factor is None:
            self._factor, self._caps = self._measured_factor(stream)
        if self._caps:
            warnings.warn(
                "The model caps its logits, which is not linear: attributions are of the logits "
                "before the cap (what hook_logits holds).",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )
        ids = tokens.to(matrix.device)
        bias = getattr(model.hf_model.get_submodule(model.anatomy.unembed), "bias", None)
        biases = matrix.new_zeros(ids.shape) if bias is None else bias[ids]
        return self._factor * matrix[ids].float(), self._factor * biases.float()

    def head(self, stream: Float[Tensor, "batch pos d_model"]) -> Callable[[Tensor], Tensor]:
        """Returns a function from final streams to logits (before a cap) that has gradients.

        `stream` is the run's, to measure with; raises what `directions` raises.
        """
        path, _ = self.norm(len(self.model.anatomy.lm.blocks), False)
        ids = torch.arange(self.model.cfg.d_vocab)
        matrix, biases = self.directions(ids, stream)
        norm = self._float_norm(path)
        return lambda streams: norm(streams.float()) @ matrix.T + biases

    def _measured_factor(self, stream: Tensor) -> tuple[float, bool]:
        """Returns what the model multiplies its unembedding's output by, and whether it caps it.

        Raises `UnsupportedModelError` where logits are no function of single outputs of the
        unembedding.
        """
        path, _ = self.norm(len(self.model.anatomy.lm.blocks), False)
        last = stream[:, -1:] if stream.ndim == 3 else stream[None, -1:]
        head = self.model.hf_model.get_submodule(self.model.anatomy.unembed)
        with self.model.without_hooks():
            plain = head(self.normed(path, last).to(head.weight.dtype)).double().flatten(0, -2)
        given = self._last
        if given is None or len(given) != len(plain):
            whole = stream[None] if stream.ndim == 3 else stream[None, None]
            given = self.logits(whole, lambda x: x[:, :, -1:])[0]
        given = given.double().flatten(0, -2)
        given = given[:, : plain.shape[-1]]
        allowed = max(1e-4, 2 * torch.finfo(head.weight.dtype).eps)
        most = allowed * float(given.abs().max())
        factor = float((given * plain).sum() / (plain * plain).sum())
        if float((factor * plain - given).abs().max()) <= most:
            return (1.0 if abs(factor - 1) < allowed else factor), False
        order = plain.argsort(-1)
        if bool((given.gather(-1, order).diff(dim=-1) >= -most).all()):
            return 1.0, True
        raise UnsupportedModelError(
            "The model's logits are not its unembedding's output for the final norm of its stream, "
            "times a number, so parts of the stream have no share in them. Use logit_lens()."
        )

    def token_id(self, text: str) -> int:
        """Returns the id of a text of one token; raises `DataError` for any other."""
        return self.model.to_single_token(text)

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
