"""What jobs are given: a model, two pictures' inputs, places, tokens, a direction."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_vlm import HookedVLM, Region
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.squares import draw


MODELS = ("tiny-gemma-3", "tiny-qwen2-vl")
QUESTION = "The color of the square to the left of the green square is "
WINDOW = 64
"""Gemma's sliding window: smaller than the image, part of which is then out of sight."""
Item = tuple[Any, str]


@dataclass(frozen=True, eq=False)
class World:
    """What a job is given: the same for every tool, but for `model`."""

    model: Any
    """The tool's model."""
    inputs: Any
    """One prompt with a picture, as a mapping from names to tensors (ours: `Inputs`)."""
    other: Any
    """The same prompt with another picture."""
    region: Region
    """A box of the image."""
    box: Tensor
    """The same as positions in the prompt."""
    cells: Tensor
    """The positions of all visual tokens, `[row, col]`."""
    image_token: int
    token: int
    wrong: int
    direction: Tensor
    prepare: Any
    """Takes items, returns the tensors of a batch."""
    items: Sequence[Item]
    folder: Path
    layer: int = 2  # one with a sliding window, in Gemma
    head: int = 1
    window: tuple[int, ...] = (1, 2, 3)
    site: str = "blocks.2.hook_resid_post"

    @property
    def ids(self) -> Tensor:
        """The prompt's token ids, for tools that take them first."""
        return self.inputs["input_ids"]

    @property
    def rest(self) -> dict[str, Tensor]:
        """What else the model takes."""
        return {name: value for name, value in self.inputs.items() if name != "input_ids"}

    @property
    def other_ids(self) -> Tensor:
        """Token ids of the prompt with the other picture."""
        return self.other["input_ids"]

    @property
    def other_rest(self) -> dict[str, Tensor]:
        """What else the model takes with the other picture."""
        return {name: value for name, value in self.other.items() if name != "input_ids"}

    @property
    def greedy(self) -> dict[str, Any]:
        """How answers are generated: four tokens, the most probable ones."""
        return {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def of(self, model: Any, folder: Path) -> "World":
        """Returns the same for another tool's model."""
        fields = {**vars(self), "model": model, "folder": folder}
        return World(**fields)


def build(name: str) -> HookedVLM:
    """Returns a shipped model with a narrow window and gains of norms that matter.

    Its gains are near 1, where an error in them would not show.
    """
    shipped = HookedVLM.from_pretrained(name)
    original: Any = shipped.hf_model
    config = copy.deepcopy(original.config)
    text = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
    hf_model: Any = type(original)._from_config(config, attn_implementation="eager")
    hf_model.load_state_dict(original.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in hf_model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return HookedVLM(hf_model.eval(), shipped.processor, name=name)


def world(name: str, folder: Path) -> World:
    """Returns the world of a model, `model` being ours."""
    model = build(name)
    squares = geometry_for(12, token_px=16)
    first = draw(["red", "green", "blue"], "horizontal", squares)
    second = draw(["blue", "green", "red"], "horizontal", squares)
    inputs = model.prepare(first, QUESTION)
    region = inputs.grid.box(16, 80, 48, 112, rule="any")
    red, blue = (model.to_single_token(color) for color in ("red", "blue"))
    generator = torch.Generator().manual_seed(1)
    return World(
        model=model,
        inputs=inputs,
        other=model.prepare(second, QUESTION),
        region=region,
        box=inputs.positions(region)[0],
        cells=inputs.grid.positions,
        image_token=int(inputs["input_ids"][0, inputs.grid.positions[0, 0]]),
        token=red,
        wrong=blue,
        direction=torch.randn(model.cfg.d_model, generator=generator),
        prepare=lambda items: dict(model.prepare(*map(list, zip(*items, strict=True)))),
        items=[(first, QUESTION), (second, QUESTION)] * 2,
        folder=folder,
    )
