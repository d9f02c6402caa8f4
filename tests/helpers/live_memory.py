"""The bytes of all tensors that are alive at once: a count that no allocator blurs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.found = {k: (ref, n) for k, (ref, n) in self.found.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.found.values()))
        return made


def peak_live(run: Callable[[], Any]) -> int:
    """Returns the most bytes that tensors made in a run held at once; what an op uses inside
    itself is not seen."""
    with _Live() as live:
        run()
    return live.peak
