"""Which sweeps the parts run, of which models, on how many pairs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.common.published import SETTINGS, Setting, tiny
from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.timed import task_on
from benchmarks.throughput.usual_loop import UsualLoop
from hooked_vlm import HookedVLM


SWEEPS = {
    "Qwen2-VL-7B": ("strip", "object", "final_token", "alpha"),
    "Gemma-3-4b": ("strip", "final_token"),
}
TOOLS = ("ours", "careful", "usual")
ANSWERS = 128
"""Tokens whose logits are compared: a sweep's metric needs a few, and copies no more."""


def setting_for(name: str, is_tiny: bool) -> Setting:
    """Returns the shapes of a model."""
    return tiny(name) if is_tiny else SETTINGS[name]


def pairs_for(name: str, is_tiny: bool) -> tuple[int, int]:
    """Returns how many pairs of prompts a batch has: a single one, and a large batch."""
    return (1, 2) if is_tiny else (1, 16) if name == "Qwen2-VL-7B" else (1, 8)


def dtype_for(is_tiny: bool) -> torch.dtype:
    """Returns the dtype of the weights; a CPU's products in bfloat16 are slow."""
    return torch.float32 if is_tiny else torch.bfloat16


def sweep_name(model: str, sweep: str, pairs: int) -> str:
    """Returns how rows and predictions name a sweep."""
    return f"{model} {sweep}, {pairs} pair{'s' * (pairs > 1)}"


class Careful(HookLoop):
    """The careful loop; it keeps the answers that are compared."""

    def run(self, task: Task) -> Tensor:
        """Returns the last position's first logits `[cell, batch, answer]`."""
        return super().run(task)[..., :ANSWERS]


class Usual(UsualLoop):
    """The usual loop; it keeps the answers that are compared."""

    def run(self, task: Task) -> Tensor:
        """Returns the last position's first logits `[cell, batch, answer]`."""
        return super().run(task)[..., :ANSWERS]


def tools_for(model: HookedVLM) -> dict[str, Ours | HookLoop]:
    """Returns what is compared, by name."""
    hf_model = model.hf_model
    return {
        "ours": Ours(model, answers=ANSWERS),
        "careful": Careful(hf_model),
        "usual": Usual(hf_model),
    }


def inputs_on(
    model: HookedVLM, setting: Setting, pairs: int, seed: int, device: str
) -> dict[str, Tensor]:
    """Returns prompts on a device, with pixels in the model's dtype."""
    found = {}
    for name, value in setting.inputs(model, pairs, seed).items():
        moved = value.to(device)
        found[name] = moved.to(model.cfg.dtype) if moved.is_floating_point() else moved
    return found


def tasks_for(
    model: HookedVLM, setting: Setting, names: tuple[str, ...], pairs: int, device: str, seed: int
) -> list[Task]:
    """Returns sweeps on the same pairs of prompts."""
    clean, source = (inputs_on(model, setting, pairs, 2 * seed + i, device) for i in (0, 1))
    return [task_of(model, setting, name, clean, source) for name in names]


def task_of(
    model: HookedVLM,
    setting: Setting,
    name: str,
    clean: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
) -> Task:
    """Returns one sweep over prompts of a setting."""
    return task_on(model, setting.family, name, clean, source, setting.first_image, setting.side)
