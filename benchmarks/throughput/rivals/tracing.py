"""nnsight 0.8: traces, in which what comes before the edited block is skipped.

Image prompts cannot be batched over invokes, so cells are traces in a loop, each of the whole
batch.  Clean and source activations are saved once; a cell's trace then skips every block before
the edited one with its clean output (`.skip`), and the edited one with the edited output, so that
only what comes after is computed.  The language model is traced alone, on what the model calls it
with, so that the vision encoder runs once for all cells.
"""

from typing import Any

import torch
from nnsight import NNsight, save  # type: ignore[import-not-found]
from torch import Tensor

from benchmarks.common.parts import n_vision_read, twin, vision_path
from benchmarks.throughput.tasks import Cell, Task, edited, edited_heads, edited_rows


class Tracing:
    """Sweeps by traces."""

    def __init__(self, hf_model: Any, _family: str) -> None:
        """Wraps twins of the model and of its language model."""
        self.whole: Any = NNsight(twin(hf_model))
        self.language: Any = NNsight(twin(hf_model).model.language_model)
        self.head = hf_model.lm_head
        self.n_layers = len(hf_model.model.language_model.layers)
        self.n_read = n_vision_read(hf_model)
        self.blocks: Any = self.whole.model
        for part in vision_path(hf_model).split("."):
            self.blocks = getattr(self.blocks, part)

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        if any(cell.stream == "vision" for cell in task.cells):
            return self._through_vision(task)
        given = self._merged(task.clean)
        slots = max(cell.layer for cell in task.cells)
        clean = [given["inputs_embeds"], *self._streams(given, slots)]
        there: list[Tensor] = []
        if any(cell.alpha is None for cell in task.cells):
            source = self._merged(task.source)
            if any(cell.stream == "z" for cell in task.cells):
                there = self._heads(source)
            else:
                there = [source["inputs_embeds"], *self._streams(source, slots)]
        return torch.stack([self._logits(given, cell, clean, there) for cell in task.cells])

    def _merged(self, inputs: Any) -> dict[str, Any]:
        """Returns what the language model is called with, vision encoded and merged in."""
        with self.whole.trace(**inputs, use_cache=False) as tracer:
            called = self.whole.model.language_model.inputs.save()
            tracer.stop()
        return dict(called[1])

    def _streams(self, given: dict[str, Any], n: int) -> list[Tensor]:
        """Returns what the first `n` blocks give."""
        found: list[Tensor] = []
        if n:
            with self.language.trace(**given) as tracer:
                found = save([self.language.layers[i].output for i in range(n)])
                tracer.stop()
        return found

    def _heads(self, given: dict[str, Any]) -> list[Tensor]:
        """Returns what the output map of every attention reads."""
        with self.language.trace(**given) as tracer:
            found = save(
                [self.language.layers[i].self_attn.o_proj.input for i in range(self.n_layers)]
            )
            tracer.stop()
        return found

    def _logits(
        self, given: dict[str, Any], cell: Cell, clean: list[Tensor], there: list[Tensor]
    ) -> Tensor:
        layer, layers = cell.layer, self.language.layers
        if cell.stream == "z":
            with self.language.trace(**given):
                for i in range(layer):
                    layers[i].skip(clean[i + 1])
                output_map = layers[layer].self_attn.o_proj
                output_map.input = edited_heads(cell, output_map.input, there[layer])
                hidden = self.language.output.last_hidden_state.save()
            return self.head(hidden[:, -1])
        changed = edited(cell, clean[layer], there[layer] if there else None)
        if not layer:
            given = {**given, "inputs_embeds": changed}
        with self.language.trace(**given):
            for i in range(layer):
                layers[i].skip(clean[i + 1] if i + 1 < layer else changed)
            hidden = self.language.output.last_hidden_state.save()
        return self.head(hidden[:, -1])

    def _through_vision(self, task: Task) -> Tensor:
        clean, there = self._rows(task.clean), self._rows(task.source)
        batch = len(task.clean["input_ids"])
        logits = []
        for cell in task.cells:
            changed = edited_rows(cell, clean[cell.layer], there[cell.layer], batch)
            with self.whole.trace(**task.clean, use_cache=False, logits_to_keep=1):
                for i in range(cell.layer + 1):
                    self.blocks[i].skip(clean[i] if i < cell.layer else changed)
                found = self.whole.output.logits.save()
            logits.append(found[:, -1])
        return torch.stack(logits)

    def _rows(self, inputs: Any) -> list[Tensor]:
        """Returns what every block of the vision encoder that is read gives."""
        with self.whole.trace(**inputs, use_cache=False) as tracer:
            found = save([self.blocks[i].output for i in range(self.n_read)])
            tracer.stop()
        return found
