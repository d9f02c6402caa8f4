"""The paper's battery in one go: E2, E4, E6 and E7 on the same pairs, ours beside a hook loop.

    python -m benchmarks.throughput.battery [--family llava] [--size 12x512]
        [--pairs 16] [--questions 2] [--json FILE]

On every batch of pairs: the last token over all slots (E2); strips and objects over all slots
(E4); both again with the image's middle removed at the start (E6); and sixteen strengths of a
direction (E7).  The images and prompts are the same, so each tool may keep what it can: ours runs
inside `shared_runs`, the careful loop keeps the merged embeddings and the source's activations.
The usual loop keeps the source's activations alone.  `bound` is the ratio of operations to the
fewest that exact sweeps take (`benchmarks.floors`).  With `--questions 2` there are two prompts
about each image: ours carries it once, and the careful loop encodes it once.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.common import built
from benchmarks.common.machine import machine
from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.measure import measured_runs
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.timed import FIRST, SIDE, SIZES, model_of, tasks_for
from benchmarks.throughput.usual_loop import UsualLoop
from hooked_vlm import HookedVLM
from hooked_vlm.regions.region import Region


def battery_of(
    model: HookedVLM, pairs: int, batch: int, family: str, questions: int = 1
) -> list[list[Task]]:
    """Returns the tasks of every batch of pairs of images, with so many questions about each."""
    found = []
    middle = Region.column_band((SIDE, SIDE), SIDE // 3, SIDE - SIDE // 3)
    zeroed = FIRST - 1 + middle.tokens
    for seed in range(pairs // batch):
        names = ("final_token", "strip", "object", "alpha")
        tasks = tasks_for(model, names, batch, family, 2 * seed, questions)
        under = [
            replace(task, name=f"{task.name} under ablation", zeroed=zeroed, removed=middle)
            for task in tasks[1:3]
        ]
        found.append([*tasks[:3], *under, tasks[3]])
    return found


class Whole:
    """All tasks of the battery by one tool."""

    def __init__(self, tool: Any) -> None:
        self.tool = tool

    def run(self, battery: Sequence[Sequence[Task]]) -> Tensor:
        """Returns every answer, one task after the other."""
        answers = []
        for tasks in battery:
            with self.tool.keeping():
                answers += [self.tool.run(task).flatten(0, 1) for task in tasks]
        return torch.cat(answers)


def main() -> None:
    """Prints one line for each rival."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--family", default="llava", choices=built.FAMILIES)
    parser.add_argument("--size", default="12x512", choices=SIZES)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--questions", type=int, default=1, choices=(1, 2), help="about each image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = model_of(given.family, given.size)
    battery = battery_of(model, given.pairs, given.batch, given.family, given.questions)
    prompts = given.batch * given.questions
    n_patches = sum(len(task.cells) * prompts for tasks in battery for task in tasks)
    counted = floors.timed(given.size, given.family).sweeps(floors.BENCHMARK, given.questions)
    ours = Whole(Ours(model))
    found: dict[str, Any] = {"machine": machine(), "patches": n_patches, "rivals": {}}
    print(f"{given.family} {given.size}, {given.pairs} pairs in batches of {given.batch}, ", end="")
    print(f"{given.questions} of 2 questions about each image: ", end="")
    print(f"{n_patches} patches, medians of {given.repeats}")
    print("| rival | ours s | rival s | ratio | bound | patches/s | answers apart |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for loop, bound in zip((HookLoop, UsualLoop), counted.over, strict=True):
        rival = Whole(loop(model.hf_model))
        row = measured_runs(battery, ours, rival, given.repeats)
        found["rivals"][loop.name] = row | {"bound": bound}
        print(
            f"| {loop.name} | {row['ours_s']:.1f} | {row['rival_s']:.1f} | {row['ratio']:.2f} "
            f"({min(row['ratios']):.2f}-{max(row['ratios']):.2f}) | {bound:.2f} | "
            f"{n_patches / row['ours_s']:.1f} | {row['difference']:.1e} |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
