"""The loop that most people write: the whole model under a hook, once for each cell.

What the source run had is kept; nothing else is.  Every cell encodes the images again and
computes the logits of all positions, as `model(**inputs).logits` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.tasks import Cell, Task


class UsualLoop(HookLoop):
    """Sweeps over a transformers model by PyTorch's own hooks, without further thought."""

    name = "usual-loop"

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        if any(cell.stream == "vision" for cell in task.cells):
            return self._through_vision(task)
        there = self._sources(task, lambda: self.whole(**task.source, use_cache=False))
        return torch.stack(
            [self._whole(task, cell, there.get((cell.stream, cell.layer))) for cell in task.cells]
        )

    def _whole(self, task: Task, cell: Cell, there: Tensor | None) -> Tensor:
        with self._zeroed(task.zeroed), self.writing(cell, there):
            return self.whole(**task.clean, use_cache=False).logits[:, -1]

    @contextmanager
    def _zeroed(self, tokens: Tensor | None) -> Iterator[None]:
        if tokens is None:
            yield
            return

        def zero(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            embeds = kwargs["inputs_embeds"].clone()
            embeds[:, tokens] = 0
            return args, {**kwargs, "inputs_embeds": embeds}

        handle = self.language.register_forward_pre_hook(zero, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
