"""The hand-written rival: forward hooks in a loop over cells, written with care.

Everything that a careful author would compute once is: the vision encoder and the merging of
its tokens (the language model is called on its merged embeddings, with the positions that the
model made), the source run, and logits for the last position alone.  Every cell is then one
pass through all blocks, of all prompts of the batch together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tasks import Cell, Task, edited


class HookLoop:
    """Sweeps over a transformers Qwen2-VL or Gemma 3 by PyTorch's own hooks."""

    name = "hook-loop"

    def __init__(self, hf_model: nn.Module) -> None:
        """Finds the parts that hooks go on."""
        self.whole: Any = hf_model
        self.language: Any = hf_model.model.language_model  # type: ignore[union-attr]
        self.vision: Any = getattr(hf_model.model, "visual", None)  # type: ignore[union-attr]
        self.head: Any = hf_model.lm_head

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        if any(cell.stream == "vision" for cell in task.cells):
            return self._through_vision(task)
        clean = self._merged(task.clean)
        needed = {(c.stream, c.layer) for c in task.cells if c.alpha is None}
        there = self._recorded(self._merged(task.source), needed) if needed else {}
        return torch.stack(
            [self._logits(clean, cell, there.get((cell.stream, cell.layer))) for cell in task.cells]
        )

    def _merged(self, inputs: Any) -> dict[str, Any]:
        """Returns what the language model is called with, vision encoded and merged in."""
        found: dict[str, Any] = {}

        class Reached(Exception):  # noqa: N818 - no error: the pass ends here
            pass

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.update(kwargs)
            raise Reached

        handle = self.language.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.whole(**inputs, use_cache=False)
        except Reached:
            pass
        finally:
            handle.remove()
        return found

    def _module(self, stream: str, layer: int) -> nn.Module:
        layers = self.language.layers
        if stream == "z":
            return layers[layer].self_attn.o_proj
        return layers[layer] if layer < len(layers) else self.language.norm

    def _recorded(self, given: dict[str, Any], needed: set) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}
        handles = []
        for key in needed:

            def note(module: nn.Module, args: tuple, kwargs: dict, key: Any = key) -> None:
                found[key] = args[0] if args else kwargs["hidden_states"]

            module = self._module(*key)
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            self.language(**given)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _logits(self, given: dict[str, Any], cell: Cell, there: Tensor | None) -> Tensor:
        def write(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            here = args[0] if args else kwargs["hidden_states"]
            changed = (
                _by_head(here, there, cell) if cell.stream == "z" else edited(cell, here, there)
            )
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed}

        module = self._module(cell.stream, cell.layer)
        handle = module.register_forward_pre_hook(write, with_kwargs=True)
        try:
            hidden = self.language(**given).last_hidden_state
        finally:
            handle.remove()
        return self.head(hidden[:, -1])

    def _through_vision(self, task: Task) -> Tensor:
        blocks = self.vision.blocks
        there: dict[int, Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda module, args, output, i=i: there.__setitem__(i, output)
            )
            for i, block in enumerate(blocks)
        ]
        try:
            source = task.source
            self.vision(source["pixel_values"], grid_thw=source["image_grid_thw"])
        finally:
            for handle in handles:
                handle.remove()
        batch = len(task.clean["input_ids"])
        logits = []
        for cell in task.cells:

            def write(module: nn.Module, args: tuple, output: Tensor, cell: Cell = cell) -> Tensor:
                here, other = (x.unflatten(0, (batch, -1)) for x in (output, there[cell.layer]))
                return edited(cell, here, other).flatten(0, 1)

            handle = blocks[cell.layer].register_forward_hook(write)
            try:
                out = self.whole(**task.clean, use_cache=False, logits_to_keep=1)
                logits.append(out.logits[:, -1])
            finally:
                handle.remove()
        return torch.stack(logits)


def _by_head(here: Tensor, there: Tensor | None, cell: Cell) -> Tensor:
    size = here.shape[-1] // N_HEADS
    split = [x.unflatten(-1, (N_HEADS, size)) for x in (here, there) if x is not None]
    return edited(cell, split[0], split[-1]).flatten(-2)


N_HEADS = 8
"""Of the random models; heads are one axis in what their output map reads."""
