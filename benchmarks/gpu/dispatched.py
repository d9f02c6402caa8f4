"""Counts what a run asks of torch: operations, bytes of what is no product, and waits by line."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


ROOT = Path(__file__).parents[2]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "scaled_dot_product")
WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique")
"""Operations after which the host has to know a value of the device."""
COPIES = ("_to_copy", "copy_")
FREE = ("empty", "new_empty", "empty_like", "detach", "alias", "lift_fresh", "_unsafe_view")
"""Operations without a kernel, beside views."""


class Dispatched(TorchDispatchMode):
    """A `with` block that counts what runs on a device; all of it runs as ever."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.operations = 0
        self.waits = 0
        self.bytes = 0
        self.lines: Counter[str] = Counter()
        """Waits by the line that they come from."""

    @property
    def own(self) -> int:
        """Waits that come from this repository and not from transformers."""
        return sum(n for line, n in self.lines.items() if not line.startswith("transformers"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if func.is_view or name in FREE:
            return made
        tensors = [*_tensors((args, kwargs or {})), *_tensors(made)]
        devices = {x.device.type for x in tensors}
        if self.device not in devices:
            return made
        self.operations += 1
        if not any(product in name for product in PRODUCTS):
            self.bytes += sum(map(_moved, tensors))
        crossed = len(devices) > 1
        if name.lstrip("_").startswith(tuple(w.lstrip("_") for w in WAITS)) or (
            name in COPIES and crossed
        ):
            self.waits += 1
            self.lines[_line()] += 1
        return made


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _moved(tensor: Tensor) -> int:
    """Returns a tensor's bytes; what is shown several times along an axis is read once."""
    numbers = 1
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if step else 1
    return numbers * tensor.element_size()


def _line() -> str:
    """Returns the innermost line of this repository or of transformers, as `file:number`."""
    frame = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "transformers" in file.parts:
            return f"transformers {file.name}:{frame.f_lineno}"
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
