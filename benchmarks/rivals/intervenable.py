"""pyvene 0.1.8: an `IntervenableModel` for each place, with activations of the source collected.

Its map of LLaVA names modules that today's transformers has elsewhere, so places are direct
references to modules, and the language model is wrapped alone and called on merged embeddings:
the vision encoder runs once for all cells.  The encoder itself is reached through the whole model,
where images are an axis of its activations.  Heads need its map of Llama.
"""

from typing import Any

import pyvene  # type: ignore[import-not-found]
import torch
from torch import Tensor

from benchmarks.hook_loop import HookLoop
from benchmarks.parts import twin, vision_path
from benchmarks.tasks import Cannot, Cell, Task


HEADS = "head_attention_value_output"


class Intervenable:
    """Sweeps by interchange and addition."""

    def __init__(self, hf_model: Any, family: str) -> None:
        """Takes twins of the model; interventions are made when they are first needed."""
        self.family = family
        self.whole: Any = twin(hf_model)
        self.language: Any = twin(hf_model).model.language_model
        self.loop = HookLoop(self.whole)
        self.n_layers = len(self.language.layers)
        self.vision = vision_path(hf_model)
        self.made: dict[tuple, Any] = {}

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        raise Cannot("")
