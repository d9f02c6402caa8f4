"""What a pass of a growing batch asks of an allocator that caches blocks: counted, on the CPU.

    python -m benchmarks.allocator [--pairs 16] [--size 12x512] [--sweep strip] [--json FILE]

The tensors of a sweep are noted as they come and go, in passes as large as on a GPU.  `Caching` is
a model of the allocator that torch has for CUDA: best fit, segments that are split and merged, two
pools.  The sweep runs with and without the block that `engine.budget.reserve` has it keep.  What
operations use inside themselves is not seen, and no GPU is.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import TASKS
from benchmarks.throughput.timed import SIZES, model_of, tasks_for
from hooked_vlm.engine import budget


MIB = 2**20


@dataclass(eq=False)
class Block:
    """A part of a segment."""

    size: int
    is_free: bool = True


class Caching:
    """A model of torch's allocator for CUDA with its default settings."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[Block]]] = []
        """Whether each is of the pool for blocks of at most 1 MiB, and its blocks in order."""
        self.reserved = 0

    def take(self, size: int) -> tuple[list[Block], Block]:
        """Returns the smallest free block that is large enough, split, and its segment."""
        size = max(512, -(-size // 512) * 512)
        is_small = size <= MIB
        free = [
            (blocks, block)
            for small, blocks in self.segments
            if small == is_small
            for block in blocks
            if block.is_free and block.size >= size
        ]
        blocks, block = min(free, key=lambda found: found[1].size, default=(None, None))
        if blocks is None or block is None:
            block = Block(_segment(size))
            blocks = [block]
            self.segments.append((is_small, blocks))
            self.reserved += block.size
        rest = block.size - size
        if rest >= 512 if is_small else rest > MIB:
            blocks.insert(blocks.index(block) + 1, Block(rest))
            block.size = size
        block.is_free = False
        return blocks, block

    @staticmethod
    def give(blocks: list[Block], block: Block) -> None:
        """Frees a block of a segment, which merges with free neighbours."""
        block.is_free = True
        at = blocks.index(block)
        for low in (at, at - 1):
            if low >= 0 and all(x.is_free for x in blocks[low : low + 2]) and low + 1 < len(blocks):
                blocks[low].size += blocks.pop(low + 1).size


def _segment(size: int) -> int:
    """Returns what is asked of the device for a block."""
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


@dataclass
class Asked:
    """What a run asked for."""

    peak_live: int = 0
    """Bytes of all tensors that were alive at once."""
    sizes: set[int] = field(default_factory=set)
    """Of tensors above 1 MiB."""
    reserved: int = 0
    """Bytes that the allocator took of the device."""
    requests: int = 0
    """How often it did."""


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked, self.caching, self.live = Asked(), Caching(), 0
        self.found: dict[int, tuple[StorageWeakRef, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for key in [key for key, (storage, *_) in self.found.items() if storage.expired()]:
            _, size, place = self.found.pop(key)
            self.caching.give(*place)
            self.live -= size
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size and key not in given and key not in self.found:
                self.found[key] = StorageWeakRef(storage), size, self.caching.take(size)
                self.live += size
                if size > MIB:
                    self.asked.sizes.add(size)
        self.asked.peak_live = max(self.asked.peak_live, self.live)
        return made


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def asked_by(run: Callable[[], Any]) -> Asked:
    """Returns what a run asks of an allocator that has nothing yet."""
    with _Noting() as noting:
        run()
    noting.asked.reserved = noting.caching.reserved
    noting.asked.requests = len(noting.caching.segments)
    return noting.asked


@contextmanager
def as_on_a_gpu(*, reserving: bool) -> Iterator[None]:
    """Passes are as large as on a GPU within the block, and have a block kept for them or not."""
    before = budget.CACHED, budget.RESERVING
    budget.CACHED, budget.RESERVING = 2**60, ("cpu",) if reserving else ()
    try:
        yield
    finally:
        budget.CACHED, budget.RESERVING = before


def compared(sweep: Callable[[], Any]) -> dict[str, Asked]:
    """Returns what a sweep asks without and with the block that is kept for its passes."""
    found = {}
    for name, reserving in (("as it grows", False), ("one block kept", True)):
        with as_on_a_gpu(reserving=reserving):
            found[name] = asked_by(sweep)
    return found


def main() -> None:
    """Prints one row for each way."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--size", default="12x512", choices=SIZES)
    parser.add_argument("--sweep", default="strip", choices=TASKS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = model_of("llava", given.size)
    (task,) = tasks_for(model, (given.sweep,), given.pairs, "llava")
    ours = Ours(model, answers=8)
    with torch.no_grad():
        ours.run(task)  # its controls are made
        found = compared(lambda: ours.run(task))
    print(f"{given.size}, {given.sweep}, pairs: {given.pairs}; {ours.note}")
    print("| run | peak live, MB | sizes above 1 MiB | reserved, MB | requests |")
    print("|---|---:|---:|---:|---:|")
    for name, asked in found.items():
        live, reserved = (round(n / 1e6) for n in (asked.peak_live, asked.reserved))
        print(f"| {name} | {live} | {len(asked.sizes)} | {reserved} | {asked.requests} |")
    if given.json:
        rows = {
            name: {**vars(asked), "sizes": sorted(asked.sizes)} for name, asked in found.items()
        }
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
