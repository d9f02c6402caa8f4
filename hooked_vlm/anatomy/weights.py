"""Whether a model's weights or buffers were written to, replaced or moved."""

from collections.abc import Hashable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.wrappers import modules_of


SAMPLED = 2**12
"""Values of all weights of the host together that are looked at."""
MOST = 16
"""Values of one tensor that are looked at."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Weights:
    """A model's weights and buffers, with a state that changes when they do.

    Noticed are tensors that another one replaces, all that torch counts as written, and, of tensors
    on the CPU, what changes any of a few values (`weight.data.mul_(2)` gives no new version).

    Not noticed are writes through `.data`, or to weights made in inference mode, that leave these
    values as they are, or that are to tensors on a GPU: reading values there would make the host
    wait for the device.
    """

    def __init__(self, whole: nn.Module) -> None:
        """Watches the weights and buffers of a module."""
        self.whole = whole
        self._known: dict[int, tuple[Any, int, int, Any]] = {}
        """By `id`: the tensor (held weakly, as ids are given again), its number, its address and
        some of its values."""
        self._n_seen = 0

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy keeps: what is known of tensors is not of the copy's."""
        return {**vars(self), "_known": {}}

    def state(self) -> Hashable:
        """Returns what changes whenever a weight or a buffer is replaced or written to."""
        tensors = list(_tensors_of(self.whole))
        each = min(MOST, max(1, SAMPLED // max(1, len(tensors))))
        known, found = {}, []
        for x in tensors:
            entry = known[id(x)] = self._entry(x, each)
            _, number, address, sample = entry
            version = 0 if x.is_inference() else x._version
            values = None if sample is None else sample.tobytes()
            found.append((number, address, version, x.dtype, x.device, values))
        self._known = known  # tensors that are no longer the model's are not held by a sample
        return tuple(found)

    def _entry(self, x: Tensor, each: int) -> tuple[Any, int, int, Any]:
        """Returns what is kept of a tensor, from an earlier call unless it is another one now."""
        known = self._known.get(id(x))
        is_plain = type(x) in (Tensor, nn.Parameter)  # others may have no memory of their own
        address = x.data_ptr() if is_plain else 0
        if known is not None and known[0]() is x:
            if known[2] == address:
                return known
            number = known[1]
        else:
            self._n_seen += 1
            number = self._n_seen
        return ref(x), number, address, _sample(x, each) if is_plain else None


def _tensors_of(whole: nn.Module) -> Iterator[Tensor]:
    for module in modules_of(whole):
        for held in (module._parameters, module._buffers):
            yield from (x for x in held.values() if x is not None)


def _sample(x: Tensor, each: int) -> Any:
    """Returns a view of some values of a tensor on the CPU, or None."""
    kind = _INTEGERS.get(x.element_size())  # numpy knows no bfloat16
    if x.device.type != "cpu" or not x.is_contiguous() or kind is None or not x.numel():
        return None
    flat = x.detach().view(-1).view(kind)
    return flat[:: -(-len(flat) // each)].numpy()
