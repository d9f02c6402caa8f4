"""What a page shows of one run: attention, logit lens, effects of patches, and probe maps.

Slots count the residual stream: slot 0 is the input of block 0, slot l the output of block l-1.
Every function returns labelled arrays of full precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import DataError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.attention_maps import attention_maps
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep, final_logits


TOP = 5
"""Most probable words of a slot that are kept."""
LENS_BYTES = 2**28
"""Bytes of logits that are held at once, about."""


@dataclass(frozen=True)
class SlotProbes:
    """Fitted classifiers by slot, which a page applies to every cell of its picture.

    >>> from hooked_vlm import LinearProbe
    >>> probe = LinearProbe(n_steps=3).fit(torch.randn(20, 8), ["left", "right"] * 10)
    >>> SlotProbes({0: probe}).classes
    ('left', 'right')
    """

    by_slot: Mapping[int, Any]
    """Classifiers with `predict_proba` and `classes_`, as scikit-learn's, on the stream of a slot;
    all with the same classes."""
    accuracy: Mapping[int, float] = field(default_factory=dict)
    """The accuracy of each on held-out examples, where it is known."""
    about: str = ""
    """What they were fitted to, in one sentence."""

    def __post_init__(self) -> None:
        usable = bool(self.by_slot) and all(
            hasattr(probe, "predict_proba") and hasattr(probe, "classes_")
            for probe in self.by_slot.values()
        )
        if not usable or len({tuple(map(str, p.classes_)) for p in self.by_slot.values()}) != 1:
            raise DataError(
                f"SlotProbes was given the slots {list(self.by_slot)}; expected at least one slot, "
                "and for each a fitted classifier with predict_proba and the same classes."
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(str(name) for name in next(iter(self.by_slot.values())).classes_)


def attention(
    model: Any, inputs: Any, grid: TokenGrid, layers: Sequence[int] | None
) -> dict[str, xr.DataArray]:
    """Returns the attention of every position to the picture's cells, and each map's sum."""
    maps = attention_maps(model, inputs, None, grid=grid, layers=layers)
    return {"attention": maps, "attention_share": maps.sum(("row", "col"))}


def lens_passes(model: Any, length: int) -> int:
    """Returns in how many passes the lens of all positions is read."""
    return -(-length // _lens_positions(model))


def _lens_positions(model: Any) -> int:
    slots = model.cfg.n_layers + 1
    return max(1, LENS_BYTES // (4 * slots * model.cfg.d_vocab))


def lens(
    model: Any,
    cache: ActivationCache,
    length: int,
    slots: Sequence[int],
    ids: Sequence[int],
    stepped: Callable[[], None],
) -> dict[str, xr.DataArray]:
    """Returns what the logit lens reads at every slot and position.

    `lens` has the probabilities of the answers `[slot, pos, answer]`; `top_ids` and
    `top_probabilities` are the most probable tokens `[slot, pos, rank]`.
    """
    size, parts = _lens_positions(model), []
    for start in range(0, length, size):
        positions = list(range(start, min(start + size, length)))
        read = cache.logit_lens(pos_slice=positions)[list(slots), 0].float().softmax(-1)
        best = read.topk(min(TOP, read.shape[-1]), dim=-1)
        own = read[..., torch.as_tensor(ids, device=read.device)]
        parts.append([part.cpu().numpy() for part in (own, best.values, best.indices)])
        stepped()
    own, values, indices = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
    where = {"slot": list(slots)}
    return {
        "lens": xr.DataArray(own, where, ("slot", "pos", "answer")),
        "top_probabilities": xr.DataArray(values, where, ("slot", "pos", "rank")),
        "top_ids": xr.DataArray(indices, where, ("slot", "pos", "rank")),
    }


def effects(
    model: Any,
    inputs: Any,
    source: Any,
    places: Sequence[Region],
    slots: Sequence[int],
    ids: Sequence[int],
    on_progress: Callable[[int, int], None],
) -> xr.DataArray:
    """Returns by how much an edit of each place at each slot changes the answers' log odds.

    Dimensions are `(slot, place, answer)`.  With a `source`, the place gets the activations of that
    run; without one, the mean over all cells of the picture at that slot.
    """

    def make(slot: int, place: int) -> Any:
        return edit(slot, places[place], inputs, source)

    sweep = Sweep(inputs, {"slot": list(slots), "place": range(len(places))}, make)
    with torch.no_grad():
        clean = log_odds(final_logits(model(inputs, logits_to_keep=1)), ids).cpu().numpy()
        scores = sweep.run(
            model,
            lambda logits: log_odds(final_logits(logits), ids),
            dims=("batch", "answer"),
            on_progress=on_progress,
            logits_to_keep=1,
        )
    # Before xarray 2025.11 a difference has no attributes.
    return (scores - clean[0]).assign_attrs(scores.attrs).isel(batch=0)


def edit(slot: int, place: Region, inputs: Any, source: Any) -> Patch | Ablate:
    """Returns the edit of a place: the source's activations, or the mean over all cells."""
    if source is not None:
        return Patch(slot, at=place, source=source)
    whole = Region.everything(place.shape)
    return Ablate(slot, at=place, to="mean", reference=inputs, reference_at=whole)


def log_odds(
    logits: Float[Tensor, "*batch d_vocab"], ids: Sequence[int]
) -> Float[Tensor, "*batch answer"]:
    """Returns the log odds of single tokens against all others of the vocabulary together.

    >>> log_odds(torch.zeros(1, 3), [0])
    tensor([[-0.6931]])
    """
    wide = logits.float()
    own = [
        wide[..., i]
        - wide.index_fill(-1, torch.tensor([i], device=wide.device), -torch.inf).logsumexp(-1)
        for i in ids
    ]
    return torch.stack(own, -1)


def probe_maps(
    cache: ActivationCache, sites: Mapping[int, str], grid: TokenGrid, probes: SlotProbes
) -> xr.DataArray:
    """Returns the probability of each class in each cell: `(slot, class, row, col)`."""
    positions = grid.positions.flatten()
    maps = []
    for slot, probe in probes.by_slot.items():
        stream = cache[sites[slot]][0, positions.to(cache[sites[slot]].device)].float().cpu()
        read = np.asarray(probe.predict_proba(stream.numpy()))
        maps.append(read.T.reshape(len(probes.classes), grid.rows, grid.cols))
    where = {"slot": list(probes.by_slot), "class": list(probes.classes)}
    return xr.DataArray(np.stack(maps), where, ("slot", "class", "row", "col"))
