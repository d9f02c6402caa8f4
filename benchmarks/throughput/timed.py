"""The models and prompts that sweeps are timed on: random ones of two sizes, and the shipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import built
from benchmarks.common.parts import n_vision_read
from benchmarks.throughput.tasks import Task, make_task
from hooked_vlm import HookedVLM, zoo


SIZES = {"12x512": (12, 512), "24x1024": (24, 1024), "2x64": (2, 64)}
"""Blocks and width of a random language model; the last is for trying a benchmark out."""
SHIPPED = {"tiny-qwen2-vl": ("qwen2-vl", 224), "tiny-gemma-3": ("gemma-3", 192)}
"""Models that come with the package: their families, and the pixels a side of their images."""
SIDE, LENGTH, FIRST = 12, 184, 5
"""Of prompts for random models: tokens a side of the image, tokens, and the image's second one."""


@dataclass(frozen=True)
class Timed:
    """A model to time sweeps on."""

    name: str
    family: str
    model: HookedVLM

    @classmethod
    def of(cls, name: str, family: str) -> "Timed":
        """Returns a shipped model, or a random one of a family, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if name in SHIPPED:
            hf_model, processor = zoo.load(name)
            wrapped = HookedVLM(hf_model.to(device), processor, name=name)  # type: ignore[arg-type]
            return cls(name, SHIPPED[name][0], wrapped)
        return cls(name, family, model_of(family, name))

    def tasks(
        self, names: Sequence[str], batch: int, first: int = 0, questions: int = 1
    ) -> list[Task]:
        """Returns the named sweeps over `batch` pairs of prompts, `questions` about each image."""
        if self.name not in SHIPPED:
            return tasks_for(self.model, names, batch, self.family, first, questions)
        prepared = [self._prepared(batch, seed, questions) for seed in (first, first + 1)]
        grid = self.model.grids(prepared[0])[0][0]
        clean, source = (self._moved(inputs) for inputs in prepared)
        start, side = int(grid.positions.min()), grid.shape[0]
        return [task_on(self.model, self.family, n, clean, source, start, side) for n in names]

    def _prepared(self, batch: int, seed: int, questions: int) -> Mapping[str, Tensor]:
        dice = torch.Generator().manual_seed(seed)
        side = SHIPPED[self.name][1]
        noise = torch.randint(0, 256, (batch, side, side, 3), generator=dice, dtype=torch.uint8)
        pictures = [Image.fromarray(noise[i // questions].numpy()) for i in range(batch)]
        sides = ("left", "right", "top", "bottom")
        asked = [f"Which colour is on the {sides[i % questions % 4]}?" for i in range(batch)]
        return self.model.prepare(pictures, asked)

    def _moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.model.device) for name, x in inputs.items()}


def model_of(family: str, size: str) -> HookedVLM:
    """Returns a random model of one of the `SIZES`, on the GPU where there is one."""
    layers, width = SIZES[size]
    made = built.build(family, (layers, 6), width=width, vocab=32000, side=2 * SIDE)
    return HookedVLM(made.to("cuda" if torch.cuda.is_available() else "cpu"), name=size)


def tasks_for(
    model: HookedVLM,
    names: Sequence[str],
    batch: int,
    family: str,
    first: int = 0,
    questions: int = 1,
) -> list[Task]:
    """Returns the named tasks on a random model, with inputs of their own."""
    clean, source = (
        {
            name: value.to(model.device)
            for name, value in built.make_inputs(
                family, batch, seed, side=2 * SIDE, length=LENGTH, questions=questions
            ).items()
        }
        for seed in (first, first + 1)
    )
    return [task_on(model, family, name, clean, source, FIRST - 1, SIDE) for name in names]


def task_on(
    model: HookedVLM,
    family: str,
    name: str,
    clean: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    first_image: int,
    side: int,
) -> Task:
    """Returns one sweep over prompts with an image of `side` tokens a side."""
    return make_task(
        name,
        clean,
        source,
        n_layers=model.cfg.n_layers,
        n_vision=n_vision_read(model.hf_model),
        n_heads=model.cfg.n_heads,
        width=model.cfg.d_model,
        first_image=first_image,
        side=side,
        family=family,
    )
