"""Which sweeps the parts run, of which models, on how many pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common.published import SETTINGS, Setting, tiny
from benchmarks.gpu.given import Given
from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.timed import task_on
from benchmarks.throughput.usual_loop import UsualLoop
from hooked_vlm import HookedVLM
from hooked_vlm.errors import counted


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


def pairs_for(name: str, is_tiny: bool, questions: int) -> tuple[int, int]:
    """Returns how many pairs of images a batch has: a single one, and a large batch.

    The number of prompts of the large batch does not depend on the questions about each image.
    """
    prompts = 2 if is_tiny else 16 if name == "Qwen2-VL-7B" else 8
    return 1, (2 if is_tiny else prompts // questions)


def dtype_for(is_tiny: bool) -> torch.dtype:
    """Returns the dtype of the weights; a CPU's products in bfloat16 are slow."""
    return torch.float32 if is_tiny else torch.bfloat16


def sweep_name(what: str, pairs: int, questions: int) -> str:
    """Returns how rows and predictions name sweeps on some pairs of images."""
    asked = f" × {questions} questions" if questions > 1 else ""
    return f"{what}, {counted(pairs, 'pair')}{asked}"


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
    given: Given, model: HookedVLM, setting: Setting, pairs: int, seed: int, questions: int = 1
) -> dict[str, Tensor]:
    """Returns prompts on the device, with pixels in the model's dtype."""
    found = {}
    for name, value in setting.inputs(model, pairs, seed, questions).items():
        moved = value.to(given.device)
        found[name] = moved.to(model.cfg.dtype) if moved.is_floating_point() else moved
    return found


def tasks_for(
    given: Given,
    model: HookedVLM,
    setting: Setting,
    names: Sequence[str],
    pairs: int,
    seed: int = 0,
) -> list[Task]:
    """Returns sweeps on the same pairs of images, with as many questions as are asked for."""
    clean, source = (
        inputs_on(given, model, setting, pairs, 2 * seed + i, given.questions) for i in (0, 1)
    )
    at = setting.first_image, setting.side, given.questions
    return [task_on(model, setting.family, name, clean, source, *at) for name in names]
