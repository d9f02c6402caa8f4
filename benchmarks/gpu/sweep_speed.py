"""Parts 4 and 6: sweeps of models of published shapes with random weights, beside both loops."""

import torch
from torch import Tensor

from benchmarks.common.published import Setting
from benchmarks.gpu.given import Given
from benchmarks.gpu.turns import Turns, apart, in_turns, peak
from benchmarks.gpu.workload import (
    SWEEPS,
    TOOLS,
    dtype_for,
    inputs_on,
    pairs_for,
    setting_for,
    sweep_name,
    tasks_for,
    tools_for,
)
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import Task
from hooked_vlm import HookedVLM
from hooked_vlm.errors import counted


LATE = "not run: too little time left"
TIMES_NOISE = 4
"""How many times the noise answers may be apart: the noise is of one clean run, and answers are
the largest difference over many cells."""


def qwen(given: Given) -> None:
    """Part 4."""
    run(given, "Qwen2-VL-7B")


def gemma(given: Given) -> None:
    """Part 6."""
    run(given, "Gemma-3-4b")


def run(given: Given, name: str) -> None:
    """Notes seconds, ratios, answers and memory of each sweep, on a single pair and on many."""
    setting = setting_for(name, given.tiny)
    model = setting.build(given.device, dtype_for(given.tiny))
    tools = tools_for(model)
    noise = noise_of(given, model, setting)
    given.note(f"{name}: noise of a clean run in a batch of two", noise)
    if given.on_gpu:
        given.note(f"{name}: weights, bytes", torch.cuda.memory_allocated())
    for i, pairs in enumerate(pairs_for(name, given.tiny, given.questions)):
        tasks = tasks_for(given, model, setting, SWEEPS[name], pairs, i)
        for k, task in enumerate(tasks):
            what = sweep_name(f"{name} {task.name}", pairs, given.questions)
            todo = len(tasks) - k + len(tasks) * (1 - i)
            if given.left < 10:
                given.note(what, LATE)
                continue
            # What is left is shared out; a single pair takes little of it.
            seconds = given.left / todo / 3 * (0.3 if i == 0 else 1)
            runs = {who: lambda tool=tool, t=task: tool.run(t) for who, tool in tools.items()}
            with torch.no_grad():
                found = in_turns(given, runs, seconds)
            note_turns(given, what, found, noise)
            note_engine(given, what, tools["ours"])
            if given.on_gpu:
                note_memory(given, what, tools, task)


def noise_of(given: Given, model: HookedVLM, setting: Setting) -> float:
    """Returns how far a prompt's logits are apart by itself and in a batch of two.

    It is a share of the largest logit: what other shapes of the same products do to the bits.
    """
    both = inputs_on(given, model, setting, 2, 0)
    one = {name: x[: len(x) // 2] for name, x in both.items()}
    with torch.no_grad():
        alone, beside = (model(inputs, logits_to_keep=1)[:1] for inputs in (one, both))
    return apart(alone, beside)


def note_turns(given: Given, what: str, found: Turns, noise: float) -> None:
    """Notes the seconds of each tool, their ratios, and how far answers are apart."""
    if not found.n:
        given.note(what, LATE)
        return
    for tool in TOOLS:
        given.note(f"{what}: {tool}, s", found.median(tool), note=counted(found.n, "turn"))
    for tool in TOOLS[1:]:
        given.note(f"{what}: {tool} ÷ ours", found.ratio(tool, "ours"))
    most = max(TIMES_NOISE * noise, 1e-5)
    for tool in TOOLS[1:]:
        given.note(f"{what}: apart from {tool}", found.apart("ours", tool), most=most)


def note_engine(given: Given, what: str, ours: object) -> None:
    """Notes which engine ran; on a GPU it must be the growing batch."""
    assert isinstance(ours, Ours)
    is_growing = ours.note.startswith("growing") if given.on_gpu else None
    given.note(f"{what}: engine", ours.note, correct=is_growing)


def note_memory(given: Given, what: str, tools: dict, task: Task) -> None:
    """Notes the peak beside the weights, and what the allocator reserves."""
    for tool in TOOLS:

        def run(tool: str = tool) -> Tensor:
            return tools[tool].run(task)

        with torch.no_grad():
            most, reserved = peak(run)
        given.note(f"{what}: {tool}, peak bytes beside the weights", most)
        given.note(f"{what}: {tool}, reserved bytes", reserved)
