"""Patches per second of whole sweeps, beside those of other tools, in turns.

    python -m benchmarks.throughput [--quick] [--rivals hook-loop,restart,plain] [--json FILE]

Every sweep is timed from pixels to the last position's logits, its clean and source runs
included, for everyone.  Runs of the rivals and of ours take turns; a ratio is the median over
pairs of neighbouring runs, with their smallest and largest.  Answers are compared in the same
run.  Models are random: 12 blocks of width 512 and 24 of width 1024, a vocabulary of 32,000,
184 tokens of which 144 are visual.  Nothing is asserted: times are this machine's.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks import built
from benchmarks.hook_loop import HookLoop
from benchmarks.ours import Ours
from benchmarks.tasks import TASKS, Task, make_task
from hooked_vlm import HookedVLM


SIZES = {"12x512": (12, 512), "24x1024": (24, 1024), "2x64": (2, 64)}
"""Blocks and width of the language model; the last is for trying the benchmark out."""
SIDE, LENGTH, FIRST = 12, 184, 5
RIVALS = ("hook-loop", "restart", "plain")


def rival(name: str, model: HookedVLM) -> Any:
    """Returns a tool by name."""
    return HookLoop(model.hf_model) if name == "hook-loop" else Ours(model, name)


def measured(task: Task, ours: Ours, other: Any, repeats: int) -> dict[str, Any]:
    """Returns times of both in turns, their ratio, and how far their answers are apart."""
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    answers: dict[str, Tensor] = {}
    for turn in range(repeats + 1):  # the first warms up
        pair = [("ours", ours), ("rival", other)]
        for who, tool in pair if turn % 2 else pair[::-1]:
            seconds, answers[who] = timed(lambda tool=tool: tool.run(task))
            if turn:
                times[who].append(seconds)
    ratios = [r / o for o, r in zip(times["ours"], times["rival"], strict=True)]
    a, b = answers["ours"].float(), answers["rival"].float()
    batch = len(task.clean["input_ids"])
    patches = len(task.cells) * batch
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ours_s": statistics.median(times["ours"]),
        "rival_s": statistics.median(times["rival"]),
        "patches_per_s": patches / statistics.median(times["ours"]),
        "difference": float((a - b).abs().max() / b.abs().max()),
        "cells": len(task.cells),
        "how": ours.note,
    }


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Returns the clock's seconds of a run, and what it returned."""
    with torch.no_grad():
        _wait()
        start = time.perf_counter()
        found = run()
        _wait()
        return time.perf_counter() - start, found.cpu()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tasks_for(model: HookedVLM, names: Sequence[str], batch: int) -> list[Task]:
    """Returns the named tasks on a random model, with inputs of their own."""
    clean, source = (
        {
            name: value.to(model.device)
            for name, value in built.make_inputs(
                "qwen2-vl", batch, seed, side=2 * SIDE, length=LENGTH
            ).items()
        }
        for seed in (0, 1)
    )
    assert model.cfg.vision is not None
    return [
        make_task(
            name,
            clean,
            source,
            n_layers=model.cfg.n_layers,
            n_vision=model.cfg.vision.n_layers,
            n_heads=model.cfg.n_heads,
            width=model.cfg.d_model,
            first_image=FIRST - 1,
            side=SIDE,
        )
        for name in names
    ]


def machine() -> dict[str, str]:
    """Returns what the times are times of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "processor": platform.processor() or platform.machine(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Prints a table for each model, and writes everything as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="12x512 alone, three turns")
    parser.add_argument("--rivals", default="hook-loop,restart")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--sizes", default="")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = given.sizes.split(",") if given.sizes else ["12x512"] if given.quick else [*SIZES][:2]
    repeats = given.repeats or (3 if given.quick else 7)
    found: dict[str, Any] = {"machine": machine(), "batch": given.batch, "ratios": {}, "rows": []}
    print(json.dumps(found["machine"]))
    for size in sizes:
        layers, width = SIZES[size]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        made = built.build("qwen2-vl", (layers, 6), width=width, vocab=32000).to(device)
        model = HookedVLM(made, name=size)
        print(f"\n{size}, batch {given.batch} x {LENGTH} tokens, medians of {repeats}")
        print("| sweep | rival | cells | ours s | rival s | ratio | patches/s | answers apart |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for task in tasks_for(model, given.tasks.split(","), given.batch):
            for name in given.rivals.split(","):
                row = measured(task, Ours(model), rival(name, model), repeats)
                found["rows"].append({"size": size, "task": task.name, "rival": name, **row})
                found["ratios"].setdefault(name, {}).setdefault(task.name, row["ratio"])
                print(
                    f"| {task.name} | {name} | {row['cells']} | {row['ours_s']:.2f} | "
                    f"{row['rival_s']:.2f} | {row['ratio']:.2f} ({min(row['ratios']):.2f}-"
                    f"{max(row['ratios']):.2f}) | {row['patches_per_s']:.1f} | "
                    f"{row['difference']:.1e} |",
                    flush=True,
                )
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))
    for row in found["rows"]:
        if row["rival"] == given.rivals.split(",")[0]:
            print(f"{row['size']} {row['task']}: {row['how']}")


if __name__ == "__main__":
    main()
