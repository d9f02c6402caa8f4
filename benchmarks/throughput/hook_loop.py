"""The hand-written rival: forward hooks in a loop over cells, written with care.

Everything that a careful author would compute once is: the vision encoder and the merging of
its tokens (the language model is called on its merged embeddings, with the positions that the
model made), the source run, and logits for the last position alone.  Every cell is then one
pass through all blocks, of all prompts of the batch together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.parts import merged, pixels, vision_path
from benchmarks.throughput.tasks import Cell, Task, edited, edited_heads, edited_rows


class HookLoop:
    """Sweeps over a transformers model by PyTorch's own hooks."""

    name = "hook-loop"

    def __init__(self, hf_model: nn.Module) -> None:
        """Finds the parts that hooks go on."""
        self.whole: Any = hf_model
        self.language: Any = hf_model.model.language_model  # type: ignore[union-attr]
        self.blocks: Any = self.whole.model.get_submodule(vision_path(hf_model))
        self.head: Any = hf_model.lm_head
        self._kept: dict[Any, Any] | None = None

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        if any(cell.stream == "vision" for cell in task.cells):
            return self._through_vision(task)
        clean = self._merged(task.clean, task.questions)
        if task.zeroed is not None:
            embeds = clean["inputs_embeds"].clone()
            embeds[:, task.zeroed] = 0
            clean = {**clean, "inputs_embeds": embeds}
        there = self._sources(
            task, lambda: self.language(**self._merged(task.source, task.questions))
        )
        return torch.stack(
            [self._logits(clean, cell, there.get((cell.stream, cell.layer))) for cell in task.cells]
        )

    def _module(self, stream: str, layer: int) -> nn.Module:
        layers = self.language.layers
        if stream == "z":
            return layers[layer].self_attn.o_proj
        return layers[layer] if layer < len(layers) else self.language.norm

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Lets tasks on the same inputs share merged embeddings and the source's activations."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _merged(self, inputs: Any, questions: int) -> dict[str, Any]:
        key = ("merged", id(inputs))
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        return self._keep(key, merged(self.whole, inputs, questions))

    def _keep(self, key: Any, value: Any) -> Any:
        if self._kept is not None:
            self._kept[key] = value
        return value

    def _sources(self, task: Task, run: Callable[[], Any]) -> dict[tuple[str, int], Tensor]:
        """Returns what the source run has where the task's cells write it, by stream and layer."""
        needed = {(c.stream, c.layer) for c in task.cells if c.alpha is None}
        kept = (self._kept or {}).get(("source", id(task.source)), {})
        if needed <= kept.keys():
            return kept
        return self._keep(("source", id(task.source)), {**kept, **self._recorded(needed, run)})

    def _recorded(
        self, needed: set[tuple[str, int]], run: Callable[[], Any]
    ) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}
        handles = []
        for key in needed:

            def note(module: nn.Module, args: tuple, kwargs: dict, key: Any = key) -> None:
                found[key] = args[0] if args else kwargs["hidden_states"]

            module = self._module(*key)
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _logits(self, given: dict[str, Any], cell: Cell, there: Tensor | None) -> Tensor:
        with self.writing(cell, there):
            hidden = self.language(**given).last_hidden_state
        return self.head(hidden[:, -1])

    @contextmanager
    def writing(self, cell: Cell, there: Tensor | None) -> Iterator[None]:
        """Carries out a cell on whatever passes run inside the `with` block."""

        def write(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            here = args[0] if args else kwargs["hidden_states"]
            change = edited_heads if cell.stream == "z" else edited
            changed = change(cell, here, there)  # type: ignore[arg-type]
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed}

        module = self._module(cell.stream, cell.layer)
        handle = module.register_forward_pre_hook(write, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _through_vision(self, task: Task) -> Tensor:
        there: dict[int, Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda module, args, output, i=i: there.__setitem__(i, output)
            )
            for i, block in enumerate(self.blocks)
        ]
        try:
            self.whole.model.get_image_features(**pixels(task.source))
        finally:
            for handle in handles:
                handle.remove()
        batch = len(task.clean["input_ids"])
        logits = []
        for cell in task.cells:

            def write(module: nn.Module, args: tuple, output: Tensor, cell: Cell = cell) -> Tensor:
                return edited_rows(cell, output, there[cell.layer], batch)

            # In front: transformers collects the block that LLaVA reads by a hook of its own.
            handle = self.blocks[cell.layer].register_forward_hook(write, prepend=True)
            try:
                out = self.whole(**task.clean, use_cache=False, logits_to_keep=1)
                logits.append(out.logits[:, -1])
            finally:
                handle.remove()
        return torch.stack(logits)
