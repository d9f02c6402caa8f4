"""The library's own way to run a task: a `Sweep`."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.throughput.tasks import Cell, Task
from hooked_vlm import Ablate, HookedVLM, LastToken, Patch, Steer, Sweep, shared_runs
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.plan import Explanation, costs_of


class Ours:
    """Sweeps by one of the library's engines."""

    def __init__(
        self, model: HookedVLM, engine: str = "growing", answers: int | None = None
    ) -> None:
        """With `answers`, `run` returns the logits of so many tokens of the vocabulary."""
        self.model, self.engine, self.answers = model, engine, answers
        self.name = "hooked_vlm" if engine == "growing" else f"hooked_vlm, {engine}"
        self.note = ""

    def run(self, task: Task, memory: int | None = None) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        found = self._sweep(task).run(
            self.model,
            lambda logits: logits[:, -1, : self.answers],
            dims=("batch", "token"),
            engine=self.engine,
            memory=memory,
            logits_to_keep=1,
        )
        self.note = found.attrs["engine"]
        return torch.from_numpy(found.values)

    def planned(self, task: Task) -> Explanation:
        """Returns the operations that running a task takes."""
        return self._sweep(task).plan(self.model).explain(logits_to_keep=1)

    def loop_operations(self, task: Task) -> float:
        """Returns the operations that a careful loop takes: a whole pass for each cell, images
        encoded once, the vocabulary for one position."""
        costs, (batch, length) = costs_of(self.model, task.clean), task.clean["input_ids"].shape
        images = costs.vision / task.questions
        blocks, head = costs.rows(batch, length, length), batch * costs.head
        n_cells, source = len(task.cells), any(cell.alpha is None for cell in task.cells)
        if task.cells[0].stream == "vision":
            return costs.vision + n_cells * float(costs.vision + blocks + head)
        return images + n_cells * float(blocks + head) + source * (images + blocks)

    def keeping(self) -> AbstractContextManager:
        """Lets tasks share encoded images, sources and clean runs, within a `with` block."""
        return shared_runs(self.model)

    def _sweep(self, task: Task) -> Sweep:
        return Sweep(
            task.clean,
            {"cell": range(len(task.cells))},
            make=lambda cell: self._intervention(task, task.cells[cell]),
            base=[] if task.removed is None else [Ablate("hook_merged_embed", at=task.removed)],
        )

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
