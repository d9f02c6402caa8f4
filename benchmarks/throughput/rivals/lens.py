"""TransformerLens 4.3: `TransformerBridge`, `run_with_cache` and `run_with_hooks`.

Its patching helpers take no image, so cells are `run_with_hooks` in a loop.  Where positions
do not follow from the image (LLaVA, Gemma 3), the language model is called on merged embeddings,
which the bridge takes as its input, and the vision encoder runs once; else every cell runs it.
`start_at_layer` would save nothing: the blocks before it run all the same.
"""

import tempfile
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.model_bridge import (  # type: ignore[import-not-found]
    TransformerBridge,
)
from transformers import PreTrainedTokenizerFast

from benchmarks.common.parts import n_vision_read, twin
from benchmarks.throughput.tasks import Cannot, Cell, Task, edited, edited_rows


class TransformerLens:
    """Sweeps by hooks on a bridge."""

    def __init__(self, hf_model: Any, family: str) -> None:
        """Puts a bridge around a twin of the model."""
        self.family, self.n_layers = family, len(hf_model.model.language_model.layers)
        self.n_read = n_vision_read(hf_model)
        self.bridge: Any = bridged(twin(hf_model))
        self.inside = "blocks" if family.startswith("qwen") else "encoder_layers"

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        vision = any(cell.stream == "vision" for cell in task.cells)
        names = {self._name(cell): None for cell in task.cells if cell.alpha is None}
        there: Any = {}
        if names:
            short = {"stop_at_layer": 0} if vision else {"logits_to_keep": 1}
            _, there = self.bridge.run_with_cache(
                task.source["input_ids"],
                names_filter=list(names),
                use_cache=False,
                **_rest(task.source),
                **short,
            )
        first, rest = task.clean["input_ids"], _rest(task.clean)
        if not vision and not self.family.startswith("qwen"):
            first = self.bridge(first, stop_at_layer=0, use_cache=False, **rest)
            del rest["pixel_values"]
        logits = []
        for cell in task.cells:
            name = self._name(cell)

            def write(here: Tensor, hook: Any, cell: Cell = cell, name: str = name) -> Tensor:
                if cell.stream == "vision":
                    return self._rows(cell, here, there[name])
                return edited(cell, here, None if cell.alpha is not None else there[name])

            out = self.bridge.run_with_hooks(
                first, fwd_hooks=[(name, write)], use_cache=False, logits_to_keep=1, **rest
            )
            logits.append(out[:, -1])
        return torch.stack(logits)

    def _name(self, cell: Cell) -> str:
        if cell.stream == "z":
            return f"blocks.{cell.layer}.attn.hook_z"
        if cell.stream == "vision":
            if self._at_projector(cell):
                return "vision_projector.hook_in"
            return f"vision_encoder.{self.inside}.{cell.layer}.hook_out"
        if cell.layer == self.n_layers:
            return f"blocks.{cell.layer - 1}.hook_out"
        return f"blocks.{cell.layer}.hook_in"

    def _at_projector(self, cell: Cell) -> bool:
        """Whether a cell is written where the projector reads.

        transformers collects the block that LLaVA reads before the bridge's hook on it runs,
        and what that hook writes is lost.
        """
        return self.family == "llava" and cell.layer == self.n_read - 1

    def _rows(self, cell: Cell, here: Tensor, there: Tensor) -> Tensor:
        batch = len(here) if here.ndim == 3 else self._batch(here, cell)
        if not self._at_projector(cell):
            return edited_rows(cell, here, there, batch)
        changed = here.clone()  # the class's row is gone here
        changed[:, cell.targets - 1] = there[:, cell.sources - 1]
        return changed

    def _batch(self, here: Tensor, cell: Cell) -> int:
        assert cell.pairs is not None
        rows, cols = cell.pairs.shape
        return len(here) // (4 * rows * cols)


def bridged(hf_model: Any, tokenizer: Any = None) -> Any:
    """Returns a bridge that has moved into a model; raises `Cannot` where it does not take it.

    It is booted from a folder, without a hub.  Without a tokenizer it gets one of three words.
    """
    hf_model.config.architectures = [type(hf_model).__name__]
    with tempfile.TemporaryDirectory() as folder, mock.patch(INSTALLS, return_value=False):
        hf_model.config.save_pretrained(folder)
        try:
            return TransformerBridge.boot_transformers(
                folder,
                hf_model=hf_model,
                device=str(hf_model.device),
                tokenizer=tokenizer or _words(folder),
            )
        except (ValueError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
            why = " ".join(str(error).split()).split(". ")[0].split(" library")[0]
            raise Cannot(f"{why} ({type(hf_model).__name__})") from error


INSTALLS = "transformer_lens.model_bridge.sources.transformers.helpers._ensure_torchvision"
"""Runs `pip install torchvision` where the folder has no processor, which replaces torch itself."""


def _rest(inputs: Any) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "input_ids"}


def _words(folder: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of three words: the bridge does not start without one.

    It is saved and loaded, because the bridge makes another from where it came from.
    """
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
