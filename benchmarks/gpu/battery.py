"""Part 5: E4 (strips and objects, on the same pairs) and E2 (the last token, on others)."""

from collections.abc import Sequence

import torch

from benchmarks import floors
from benchmarks.common.published import Setting
from benchmarks.gpu.counted import battery_pairs
from benchmarks.gpu.given import Given
from benchmarks.gpu.sweep_speed import LATE, noise_of, note_engine, note_turns
from benchmarks.gpu.turns import in_turns
from benchmarks.gpu.workload import (
    dtype_for,
    pairs_for,
    setting_for,
    sweep_name,
    tasks_for,
    tools_for,
)
from benchmarks.throughput.battery import Whole
from benchmarks.throughput.measure import timed
from benchmarks.throughput.tasks import Task
from hooked_vlm import HookedVLM


NAME = "Qwen2-VL-7B"
PAPER = 200
"""Pairs of prompts in the paper's experiments."""


def run(given: Given) -> None:
    """Notes seconds of all tools on some pairs, and of ours alone on the paper's number."""
    setting = setting_for(NAME, given.tiny)
    model = setting.build(given.device, dtype_for(given.tiny))
    wanted = battery_pairs(given)
    batch = pairs_for(NAME, given.tiny, given.questions)[-1]
    tools = tools_for(model)
    wholes = {who: Whole(tool) for who, tool in tools.items()}
    noise = noise_of(given, model, setting)
    one = battery_of(given, model, setting, batch, batch)
    with torch.no_grad():  # one batch warms up, and shows how many there is time for
        each = sum(timed(lambda whole=whole: whole.run(one))[0] for whole in wholes.values())
    pairs = min(wanted, batch * int(0.8 * given.left / each))
    if not pairs:
        given.note(sweep_name("battery", wanted, given.questions), LATE)
        return
    few = battery_of(given, model, setting, pairs, batch)
    runs = {who: lambda whole=whole: whole.run(few) for who, whole in wholes.items()}
    with torch.no_grad():
        found = in_turns(given, runs, given.left / 4, 3, warm=False)
    what = sweep_name("battery", pairs, given.questions)
    note_turns(given, what, found, noise)
    note_engine(given, what, tools["ours"])
    if found.n:
        note_all(given, model, setting, batch, wholes["ours"], found.median("ours") / pairs)


def note_all(
    given: Given, model: HookedVLM, setting: Setting, batch: int, whole: Whole, each: float
) -> None:
    """Notes the seconds of ours on all pairs of the paper, at so many seconds a pair, if it can."""
    pairs = 6 if given.tiny else PAPER // given.questions
    what = f"{sweep_name('battery', pairs, given.questions)}: ours, s"
    if given.left < 1.3 * each * pairs and not given.tiny:
        given.note(what, LATE)
        return
    seconds = 0.0
    for i in range(-(-pairs // batch)):
        size = min(batch, pairs - i * batch)
        part = battery_of(given, model, setting, size, batch, seed=i)
        with torch.no_grad():
            seconds += timed(lambda part=part: whole.run(part))[0]
    given.note(what, seconds)


def battery_of(
    given: Given, model: HookedVLM, setting: Setting, pairs: int, batch: int, seed: int = 0
) -> Sequence[Sequence[Task]]:
    """Returns the sweeps of each batch, those of the same pairs together."""
    found = []
    for i in range(-(-pairs // batch)):
        size = min(batch, pairs - i * batch)
        for k, group in enumerate(floors.PAPER):
            number = 2 * (seed + i) + k
            found.append(tasks_for(given, model, setting, group, size, number))
    return found
