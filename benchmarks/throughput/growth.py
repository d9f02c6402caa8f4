"""How the cost of a sweep grows with its slots, its tokens and its pairs, on log-log axes.

    python -m benchmarks.throughput.growth [--family llava] [--size 12x512]
        [--questions 2] [--plot FILE] [--json FILE]

One of the three grows while the others stay at 13 slots, 184 tokens and 4 pairs; the strip
sweep is run by ours and by the careful hook loop in turns.  A slope is that of a straight
line through the logarithms: 1 is time in proportion.  With `--questions 2` there are two prompts
about each image: ours carries it once, and the careful loop encodes it once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.common import built
from benchmarks.common.machine import machine
from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.measure import measured_runs
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.timed import FIRST, SIZES, task_on
from hooked_vlm import HookedVLM


TEXT = 40
SIDE, PAIRS = 12, 4
GROWN = {"slots": (1, 2, 4, 7, 13), "tokens": (8, 12, 16, 24), "pairs": (1, 2, 4, 8, 16)}
"""What grows; for tokens, tokens a side of the image, to which `TEXT` come."""


def task_of(
    family: str, size: str, side: int, pairs: int, slots: int, questions: int = 1
) -> tuple[HookedVLM, Task]:
    """Returns a model for images of that size, and a strip sweep over that many of its slots.

    There are so many questions about each of the `pairs` of images.
    """
    layers, width = SIZES[size]
    model = HookedVLM(built.build(family, (layers, 6), width=width, vocab=32000, side=2 * side))
    sizes = {"side": 2 * side, "length": side * side + TEXT, "questions": questions}
    clean, source = (built.make_inputs(family, pairs, seed, **sizes) for seed in (0, 1))
    task = task_on(model, family, "strip", clean, source, FIRST - 1, side, questions)
    chosen = np.linspace(0, len(task.cells) - 1, min(slots, len(task.cells))).round().astype(int)
    task.cells[:] = [task.cells[i] for i in chosen]
    return model, task


def grown(
    family: str, size: str, repeats: int, questions: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Returns times of ours and of the loop, by what grows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, steps in GROWN.items():
        for value in steps:
            side = value if name == "tokens" else SIDE
            pairs = value if name == "pairs" else PAIRS
            slots = value if name == "slots" else max(GROWN["slots"])
            model, task = task_of(family, size, side, pairs, slots, questions)
            row = measured_runs(task, Ours(model), HookLoop(model.hf_model), repeats)
            at = side * side + TEXT if name == "tokens" else value
            found.setdefault(name, []).append({"at": at, "cells": len(task.cells), **row})
            print(
                f"{name} {at}: ours {row['ours_s']:.2f} s, loop {row['rival_s']:.2f} s, ratio "
                f"{row['ratio']:.2f}, apart {row['difference']:.0e}",
                flush=True,
            )
    return found


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Returns the slope of time against what grows, in logarithms."""
    x, y = (np.log([row[k] for row in rows]) for k in ("at", key))
    return float(np.polyfit(x, y, 1)[0])


def drawn(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Returns three panels, one for each that grows."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for key, label, colour, mark in (
            ("rival_s", "hook loop", "#b5541c", "s"),
            ("ours_s", "growing batch", "#1f5fa8", "o"),
        ):
            x, y = [row["at"] for row in rows], [row[key] for row in rows]
            words = f"{label}, slope {slope(rows, key):.2f}"
            axes.loglog(x, y, marker=mark, color=colour, label=words)
        axes.set(xlabel=name, ylabel="seconds for the sweep")
        axes.set_xticks([row["at"] for row in rows], [str(row["at"]) for row in rows], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Prints times and slopes, and writes the plot and the numbers."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--family", default="llava", choices=built.FAMILIES)
    parser.add_argument("--size", default="12x512", choices=SIZES)
    parser.add_argument("--questions", type=int, default=1, choices=(1, 2), help="about each image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = grown(given.family, given.size, given.repeats, given.questions)
    for name, rows in found.items():
        print(f"{name}: slope {slope(rows, 'ours_s'):.2f}, loop {slope(rows, 'rival_s'):.2f}")
    if given.plot:
        drawn(found).savefig(given.plot, dpi=150)
    numbers = {"machine": machine(), "questions": given.questions, "rows": found}
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
