"""The tuned lens: an affine map for each slot, trained so that streams read as the last one.

A logit lens reads a stream from inside a model as if it were the last one, though its directions
may mean something else there.  A tuned lens translates it first, by a map of its own for each slot
(Belrose et al. 2023).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.arguments.kinds import Count, File
from hooked_vlm.errors import DataError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.cut import PosSlice
from hooked_vlm.hooks.files import write_tensors
from hooked_vlm.inputs.rows import rows_of
from hooked_vlm.model.readout import Readout
from hooked_vlm.model.vlm import HookedVLM


HELD_OUT = 0.1
"""Share of positions that are not trained on."""
_STREAMS = ("*blocks.0.hook_resid_pre", "blocks.*.hook_resid_pre", "blocks.*.hook_resid_post")


@checked(DataError)
@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(OneLine):
    """An affine map for each slot below the last: `stream + stream @ weights.T + biases`.

    >>> from PIL import Image
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 96)), "What is this?")
    >>> lens = TunedLens.fit(model, [inputs], steps=2)
    >>> _, cache = model.run_with_cache(inputs, "blocks.*resid*")
    >>> lens.logits(cache, pos_slice=-1).shape
    torch.Size([7, 1, 556])
    """

    weights: Float[Tensor, "slot d_model d_model"]
    biases: Float[Tensor, "slot d_model"]
    divergence: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """On held-out positions, in nats by slot: Kullback-Leibler divergence of what is read from the
    final distribution, by the `logit_lens` and by the `tuned_lens`."""

    @classmethod
    @checked(DataError, but=("batches",))
    def fit(
        cls,
        model: HookedVLM,
        batches: Sequence[Mapping[str, Any]],
        *,
        steps: Count = 300,
        batch: Count = 256,
        learning_rate: float = 1e-3,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "TunedLens":
        """Returns a lens trained on all positions of some inputs, padding left out.

        The loss is the divergence of the final distribution from the one that is read, summed over
        slots; Adam, with a linear decay of the rate.  The streams of all inputs are kept in memory:
        their positions times slots times `d_model`.  `on_progress` gets steps done and their
        number.

        Raises `DataError` for no inputs, and `UnsupportedModelError` for a model whose logits are
        not its unembedding's output for its final norm, times a number.
        """
        if not batches:
            raise DataError("TunedLens.fit was given no inputs; expected some of model.prepare.")
        # 1. Streams of all positions, of which some are held out.
        streams, read = _collected(model, batches)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(streams.shape[1], generator=draw)
        n_held = max(1, int(HELD_OUT * len(order)))
        if len(order) - n_held < 1:
            raise DataError("TunedLens.fit needs at least two positions.")
        held, trained = streams[:, order[:n_held]], streams[:, order[n_held:]]
        # 2. Train: the maps begin as the identity, which is the logit lens.
        n_slots, _, width = (len(streams) - 1, *streams.shape[1:])
        weights = streams.new_zeros(n_slots, width, width).requires_grad_()
        biases = streams.new_zeros(n_slots, width).requires_grad_()
        optimizer = torch.optim.Adam([weights, biases], lr=learning_rate)
        with torch.enable_grad():
            for step in range(steps):
                rows = torch.randint(
                    trained.shape[1], (min(batch, trained.shape[1]),), generator=draw
                )
                loss = _divergence(read, trained[:, rows], weights, biases).sum()
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if on_progress is not None:
                    on_progress(step + 1, steps)
        # 3. What it gives on positions that it has not seen, beside the logit lens.
        weights, biases = weights.detach(), biases.detach()
        with torch.no_grad():
            plain = _divergence(read, held, torch.zeros_like(weights), torch.zeros_like(biases))
            tuned = _divergence(read, held, weights, biases)
        found = {"logit_lens": plain.tolist(), "tuned_lens": tuned.tolist()}
        return cls(weights, biases, found)

    @checked(DataError)
    def logits(
        self, cache: ActivationCache, pos_slice: PosSlice = None
    ) -> Float[Tensor, "slot ..."]:
        """Returns what `cache.logit_lens` returns, for translated streams.

        The last slot is that of the logit lens: the run's logits.  Raises `DataError` for a cache
        of a model with other sizes.
        """
        streams = cache.accumulated_resid()
        assert isinstance(streams, Tensor)
        if len(streams) != len(self.weights) + 1 or streams.shape[-1] != self.weights.shape[-1]:
            raise DataError(
                f"The cache has {len(streams)} slots of width {streams.shape[-1]}, and this lens "
                f"{len(self.weights) + 1} of {self.weights.shape[-1]}. It belongs to another model."
            )
        below = _translated(streams[:-1].float(), self.weights, self.biases).to(streams.dtype)
        return cache.read_streams(torch.cat([below, streams[-1:]]), pos_slice)

    @checked(DataError)
    def save(self, path: File) -> None:
        """Writes the lens to a safetensors file, as a whole or not at all."""
        about = {"divergence": json.dumps(dict(self.divergence))}
        tensors = {"weights": self.weights.cpu(), "biases": self.biases.cpu()}
        write_tensors(tensors, path, about, "lens")

    @classmethod
    @checked(DataError)
    def load(cls, path: File) -> "TunedLens":
        """Returns the lens that `save` wrote; raises `DataError` for another file."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["divergence"])
                return cls(file.get_tensor("weights"), file.get_tensor("biases"), about)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise DataError(
                f"'{path}' is not a file of TunedLens.save: {str(error)[:120]}. Fit a lens first."
            ) from None


def _collected(
    model: HookedVLM, batches: Sequence[Mapping[str, Any]]
) -> tuple[Float[Tensor, "slot row d_model"], Callable[[Tensor], Tensor]]:
    """Returns the streams of all positions that are no padding, and the head that reads them."""
    found: list[Tensor] = []
    read: Callable[[Tensor], Tensor] | None = None
    with torch.no_grad():
        for inputs in batches:
            _, cache = model.run_with_cache(inputs, _STREAMS)
            streams = cache.accumulated_resid()
            assert isinstance(streams, Tensor)
            if read is None:
                assert isinstance(cache.readout, Readout)
                read = cache.readout.head(streams[-1])
            found += [streams[:, b, row.real] for b, row in enumerate(rows_of(inputs, None, False))]
    assert read is not None
    return torch.cat(found, dim=1).float(), read


def _translated(streams: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    moved = einsum(streams, weights, "slot ... d, slot out d -> slot ... out")
    return streams + moved + biases.view(len(biases), *[1] * (streams.ndim - 2), -1)


def _divergence(
    read: Callable[[Tensor], Tensor], streams: Tensor, weights: Tensor, biases: Tensor
) -> Float[Tensor, " slot"]:
    """Returns the mean divergence, over rows, of each slot's distribution from the final one."""
    final = read(streams[-1]).float().log_softmax(-1)
    found = read(_translated(streams[:-1], weights, biases)).float().log_softmax(-1)
    return (final.exp() * (final - found)).sum(-1).mean(-1)
