"""Part 5: E4 (strips and objects, on the same pairs) and E2 (the last token, on others)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.common.published import Setting
from benchmarks.gpu.counted import BATTERY
from benchmarks.gpu.given import Given
from benchmarks.gpu.sweep_speed import noise_of, note_engine, note_turns
from benchmarks.gpu.turns import in_turns
from benchmarks.gpu.workload import (
    dtype_for,
    pairs_for,
    setting_for,
    tasks_for,
    tools_for,
)
from benchmarks.throughput.battery import Whole
from benchmarks.throughput.measure import timed
from benchmarks.throughput.tasks import Task
from hooked_vlm import HookedVLM


NAME = "Qwen2-VL-7B"
PAPER = 200
"""Pairs of the paper's experiments."""


def run(given: Given) -> None:
    """Notes seconds of all tools on some pairs, and of ours alone on the paper's number."""
    setting = setting_for(NAME, given.tiny)
    model = setting.build(given.device, dtype_for(given.tiny))
    pairs, batch = (4 if given.tiny else BATTERY), pairs_for(NAME, given.tiny)[-1]
    tools = tools_for(model)
    wholes = {who: Whole(tool) for who, tool in tools.items()}
    few = battery_of(model, setting, pairs, batch, given.device)
    noise, what = noise_of(model, setting, given.device), f"battery, {pairs} pairs"

    def asked(who: str) -> Callable[[], Tensor]:
        return lambda: wholes[who].run(few)

    with torch.no_grad():
        found = in_turns(given, {who: asked(who) for who in tools}, given.left / 4, 3)
    note_turns(given, what, found, noise)
    note_engine(given, what, tools["ours"])
    # Ours on many pairs takes as long for each, and pictures have to be made.
    many, needed = (6 if given.tiny else PAPER), 2 * found.median("ours") * PAPER / pairs
    if given.left < needed and not given.tiny:
        given.note(f"battery, {many} pairs: ours, s", "not run: too little time left")
        return
    seconds = 0.0
    for first in range(0, many, batch):
        part = battery_of(
            model, setting, min(batch, many - first), batch, given.device, seed=first // batch
        )
        with torch.no_grad():
            seconds += timed(lambda part=part: wholes["ours"].run(part))[0]
    given.note(f"battery, {many} pairs: ours, s", seconds)


def battery_of(
    model: HookedVLM, setting: Setting, pairs: int, batch: int, device: str, seed: int = 0
) -> Sequence[Sequence[Task]]:
    """Returns the sweeps of each batch, those of the same pairs together."""
    found = []
    for i in range(-(-pairs // batch)):
        size = min(batch, pairs - i * batch)
        for k, group in enumerate(floors.PAPER):
            number = 2 * (seed + i) + k
            found.append(tasks_for(model, setting, tuple(group), size, device, number))
    return found
