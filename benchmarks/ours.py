"""The library's own way to run a task: a `Sweep`."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.tasks import Cell, Task
from hooked_vlm import Ablate, HookedVLM, LastToken, Patch, Steer, Sweep
from hooked_vlm.regions import Region


class Ours:
    """Sweeps by one of the library's engines."""

    def __init__(self, model: HookedVLM, engine: str = "growing") -> None:
        self.model, self.engine = model, engine
        self.name = "hooked_vlm" if engine == "growing" else f"hooked_vlm, {engine}"
        self.note = ""

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        sweep = Sweep(
            task.clean,
            {"cell": range(len(task.cells))},
            make=lambda cell: self._intervention(task, task.cells[cell]),
            base=[] if task.removed is None else [Ablate("hook_merged_embed", at=task.removed)],
        )
        found = sweep.run(
            self.model,
            lambda logits: logits[:, -1],
            dims=("batch", "token"),
            engine=self.engine,
            logits_to_keep=1,
        )
        self.note = found.attrs["engine"]
        return torch.from_numpy(found.values)

    def _intervention(self, task: Task, cell: Cell) -> Any:
        if cell.alpha is not None:
            assert cell.direction is not None
            shape = self.model.grids(task.clean)[0][0].shape
            whole = Region.everything(shape)
            return Steer(cell.layer, at=whole, directions=cell.direction, alpha=cell.alpha)
        if cell.stream == "z":
            site = f"blocks.{cell.layer}.attn.hook_z"
            return Patch(site, at=LastToken(), heads=(cell.head,), source=task.source)
        if cell.stream == "vision":
            site = f"vision_encoder.blocks.{cell.layer}.hook_resid_post"
            return Patch(site, at=cell.pairs, source=task.source)
        at = LastToken() if cell.pairs is None else cell.pairs
        return Patch(cell.layer, at=at, source=task.source)
