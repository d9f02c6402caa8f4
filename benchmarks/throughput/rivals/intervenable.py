"""pyvene 0.1.8: an `IntervenableModel` for each place, with the source's activations collected.

Its map of LLaVA names modules that today's transformers has elsewhere, so places are direct
references to modules, and the language model is wrapped alone and called on merged embeddings:
the vision encoder runs once for all cells.  The encoder itself is reached through the whole model,
where images are an axis of its activations and transformers needs no hooks of its own (before a
pass, pyvene removes every hook from a model).  Heads need its map of Llama.
"""

from typing import Any

import pyvene  # type: ignore[import-not-found]
import torch
from torch import Tensor

from benchmarks.common.parts import merged, twin, vision_path
from benchmarks.throughput.tasks import Cannot, Cell, Task


HEADS = "head_attention_value_output"
Place = tuple[int, str]
"""A layer and a component; the layer of a direct reference is in its name."""


class Intervenable:
    """Sweeps by interchange and addition."""

    def __init__(self, hf_model: Any, family: str) -> None:
        """Takes twins of the model; interventions are made when they are first needed."""
        self.family, self.head = family, hf_model.lm_head
        self.whole: Any = twin(hf_model)
        self.language: Any = twin(hf_model).model.language_model
        self.n_layers = len(self.language.layers)
        self.vision = vision_path(hf_model)
        self.made: dict[tuple, Any] = {}

    def run(self, task: Task) -> Tensor:
        """Returns the last position's logits `[cell, batch, d_vocab]`, from pixels on."""
        first = task.cells[0]
        self._check(first.stream)
        batch = len(task.clean["input_ids"])
        if first.stream == "vision":
            model = self.whole
            clean, source = (
                {**inputs, "use_cache": False, "logits_to_keep": 1}
                for inputs in (task.clean, task.source)
            )
        else:
            model = self.language
            clean = merged(self.whole, task.clean)
            source = merged(self.whole, task.source) if first.alpha is None else {}
        there = self._collected(model, source, task.cells, batch) if first.alpha is None else {}
        logits = []
        for cell in task.cells:
            out = self._intervened(model, clean, cell, there, batch)
            if model is self.whole:
                logits.append(out.logits[:, -1])
            else:
                logits.append(self.head(out.last_hidden_state[:, -1]))
        return torch.stack(logits)

    def _check(self, stream: str) -> None:
        if stream == "z" and self.family != "llava":
            raise Cannot("it has no map of this language model's heads")
        if stream == "vision" and self.family.startswith("qwen"):
            raise Cannot("it wants an axis of images, and all rows share one in this encoder")
        if stream == "vision" and self.family == "llava":
            raise Cannot("it removes the hooks by which transformers collects what LLaVA reads")

    def _collected(
        self, model: Any, source: dict[str, Any], cells: list[Cell], batch: int
    ) -> dict[Place, Tensor]:
        """Returns the source's activations at a task's source positions, from one pass."""
        places = list(dict.fromkeys(self._place(cell) for cell in cells))
        unit = "h.pos" if cells[0].stream == "z" else "pos"
        interventions = self._made(model, pyvene.CollectIntervention, places, unit)
        where = _located(unit, cells[0].sources, list(range(cells[0].n_heads)), batch)
        (_, found), _ = interventions(_own(source), unit_locations={"base": [where] * len(places)})
        return dict(zip(places, found, strict=True))

    def _intervened(
        self,
        model: Any,
        clean: dict[str, Any],
        cell: Cell,
        there: dict[Place, Tensor],
        batch: int,
    ) -> Any:
        place, unit = self._place(cell), "h.pos" if cell.stream == "z" else "pos"
        if cell.alpha is None:
            kind, source = pyvene.VanillaIntervention, there[place]
            if cell.stream == "z":
                source = source[:, [cell.head]]
        else:
            assert cell.direction is not None
            kind = pyvene.AdditionIntervention
            step = cell.alpha * cell.direction.to(clean["inputs_embeds"])
            source = step.expand(batch, len(cell.targets), -1)
        interventions = self._made(model, kind, [place], unit)
        where = _located(unit, cell.targets, [cell.head], batch)
        _, out = interventions(
            _own(clean),
            source_representations={interventions.sorted_keys[0]: source},
            unit_locations={"sources->base": ([where], [where])},
        )
        return out

    def _made(self, model: Any, kind: Any, places: list[Place], unit: str) -> Any:
        key = (model is self.whole, kind, tuple(places), unit)
        if key not in self.made:
            # An instance, because a class is asked for sizes that its maps do not have.
            rows = [
                pyvene.RepresentationConfig(layer, name, unit, 1, intervention=kind())
                for layer, name in places
            ]
            config = pyvene.IntervenableConfig(representations=rows)
            self.made[key] = pyvene.IntervenableModel(config, model)
            model.requires_grad_(True)  # it freezes weights, which are not its own here
        return self.made[key]

    def _place(self, cell: Cell) -> Place:
        if cell.stream == "z":
            return cell.layer, HEADS
        if cell.stream == "vision":
            return 0, f"model.{self.vision}[{cell.layer}].output"
        if cell.layer == self.n_layers:
            return 0, f"layers[{cell.layer - 1}].output"
        return 0, f"layers[{cell.layer}].input"


def _located(unit: str, positions: Tensor, heads: list[int], batch: int) -> list:
    """Returns positions as pyvene wants them for one intervention, the same in every prompt."""
    where = [positions.tolist()] * batch
    return where if unit == "pos" else [[heads] * batch, where]


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns inputs as pyvene can take them.

    It writes into what a block is given, so embeddings are a copy, and it takes the number of
    prompts from the first of the inputs.
    """
    if "inputs_embeds" not in inputs:
        return inputs
    return {"inputs_embeds": inputs["inputs_embeds"].clone()} | {
        name: value for name, value in inputs.items() if name != "inputs_embeds"
    }
