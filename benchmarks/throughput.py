"""Patches per second of whole sweeps, beside those of other tools, in turns.

    python -m benchmarks.throughput [--quick] [--family llava] [--json FILE]
        [--rivals hook-loop,usual-loop,restart,plain,transformer-lens,nnsight,pyvene]

Every sweep is timed from pixels to the last position's logits, its clean and source runs
included, for everyone.  Runs of the rivals and of ours take turns; a ratio is the median over
pairs of neighbouring runs, with their smallest and largest.  Answers are compared in the same
run: one that is more than 1e-4 of the largest logit from ours is called wrong, and has no ratio
in the JSON's `ratios`; a sweep that a tool has no way to do is in the table with the reason.
Models are random: 12 blocks of width 512 and 24 of width 1024, a vocabulary of 32,000, 184 tokens
of which 144 are visual.  LLaVA is the family that all tools know.  Nothing is asserted: times are
this machine's.

The last three rivals are other packages, in an environment of their own:

    python -m benchmarks.environment --at .venv-rivals
    .venv-rivals/bin/python -m benchmarks.throughput --rivals transformer-lens,nnsight,pyvene
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

from benchmarks import built, rivals
from benchmarks.hook_loop import HookLoop
from benchmarks.ours import Ours
from benchmarks.parts import n_vision_read
from benchmarks.tasks import TASKS, Cannot, Task, make_task
from benchmarks.usual_loop import UsualLoop
from hooked_vlm import HookedVLM


SIZES = {"12x512": (12, 512), "24x1024": (24, 1024), "2x64": (2, 64)}
"""Blocks and width of the language model; the last is for trying the benchmark out."""
SIDE, LENGTH, FIRST = 12, 184, 5
OWN = ("hook-loop", "usual-loop", "restart", "plain")
"""Rivals that need no other package; the rest are `rivals.RIVALS`."""
WRONG = 1e-4


def rival(name: str, model: HookedVLM, family: str) -> Any:
    """Returns a tool by name; raises `Cannot` where it does not know the family."""
    if name in rivals.RIVALS:
        return rivals.make(name, model.hf_model, family)
    loops = {"hook-loop": HookLoop, "usual-loop": UsualLoop}
    return loops[name](model.hf_model) if name in loops else Ours(model, name)


def measured_runs(what: Any, ours: Any, other: Any, repeats: int) -> dict[str, Any]:
    """Returns times of both in turns, their ratio, and how far their answers are apart."""
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    answers: dict[str, Tensor] = {}
    for turn in range(repeats + 1):  # the first warms up
        pair = [("ours", ours), ("rival", other)]
        for who, tool in pair if turn % 2 else pair[::-1]:
            seconds, answers[who] = timed(lambda tool=tool: tool.run(what))
            if turn:
                times[who].append(seconds)
    ratios = [r / o for o, r in zip(times["ours"], times["rival"], strict=True)]
    a, b = answers["ours"].float(), answers["rival"].float()
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ours_s": statistics.median(times["ours"]),
        "rival_s": statistics.median(times["rival"]),
        "difference": float((a - b).abs().max() / b.abs().max()),
    }


def measured(task: Task, ours: Ours, other: Any, repeats: int) -> dict[str, Any]:
    """Returns what `measured_runs` does of a task, and how ours did it."""
    row = measured_runs(task, ours, other, repeats)
    patches = len(task.cells) * len(task.clean["input_ids"])
    return {
        **row,
        "patches_per_s": patches / row["ours_s"],
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


def tasks_for(
    model: HookedVLM, names: Sequence[str], batch: int, family: str, first: int = 0
) -> list[Task]:
    """Returns the named tasks on a random model, with inputs of their own."""
    clean, source = (
        {
            name: value.to(model.device)
            for name, value in built.make_inputs(
                family, batch, seed, side=2 * SIDE, length=LENGTH
            ).items()
        }
        for seed in (first, first + 1)
    )
    return [
        make_task(
            name,
            clean,
            source,
            n_layers=model.cfg.n_layers,
            n_vision=n_vision_read(model.hf_model),
            n_heads=model.cfg.n_heads,
            width=model.cfg.d_model,
            first_image=FIRST - 1,
            side=SIDE,
            family=family,
        )
        for name in names
    ]


def machine(names: Sequence[str] = ()) -> dict[str, str]:
    """Returns what the times are times of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "processor": platform.processor() or platform.machine(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **{name: rivals.version(name) for name in names if name in rivals.RIVALS},
    }


def model_of(family: str, size: str) -> HookedVLM:
    """Returns a random model of one of the `SIZES`, on the GPU where there is one."""
    layers, width = SIZES[size]
    made = built.build(family, (layers, 6), width=width, vocab=32000, side=2 * SIDE)
    return HookedVLM(made.to("cuda" if torch.cuda.is_available() else "cpu"), name=size)


def tools_for(names: Sequence[str], model: HookedVLM, family: str) -> dict[str, Any]:
    """Returns the rivals by name, or why one does not take the model."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = rival(name, model, family)
        except Cannot as reason:
            found[name] = reason
    return found


def compared(task: Task, ours: Ours, other: Any, repeats: int) -> dict[str, Any]:
    """Returns what was measured of a task, or why there is nothing to measure."""
    try:
        if isinstance(other, Cannot):
            raise other
        row = measured(task, ours, other, repeats)
    except Cannot as reason:
        return {"cannot": str(reason)}
    return {**row, "wrong": not row["difference"] < WRONG}


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    start = f"| {row['task']} | {row['rival']} |"
    if "cannot" in row:
        return f"{start} | | | cannot: {row['cannot']} | | |"
    apart = f"{row['difference']:.1e}" + (" WRONG" if row["wrong"] else "")
    return (
        f"{start} {row['cells']} | {row['ours_s']:.2f} | {row['rival_s']:.2f} | "
        f"{row['ratio']:.2f} ({min(row['ratios']):.2f}-{max(row['ratios']):.2f}) | "
        f"{row['patches_per_s']:.1f} | {apart} |"
    )


def parsed() -> argparse.Namespace:
    """Returns what was asked for; ends the program where a rival is unknown or missing."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="12x512 alone, three turns")
    parser.add_argument("--family", default="llava", choices=built.FAMILIES)
    parser.add_argument("--rivals", default="hook-loop,usual-loop")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--sizes", default="")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.rivals = given.rivals.split(",")
    for name in given.rivals:
        if name not in OWN and name not in rivals.RIVALS:
            parser.error(f"no rival {name!r}; there are {', '.join([*OWN, *rivals.RIVALS])}")
        if name in rivals.RIVALS:
            try:
                rivals.require(name)
            except rivals.MissingRivalError as error:
                raise SystemExit(str(error)) from error
    given.sizes = given.sizes.split(",") if given.sizes else [*SIZES][: 1 if given.quick else 2]
    given.repeats = given.repeats or (3 if given.quick else 7)
    return given


def main() -> None:
    """Prints a table for each model, and writes everything as JSON."""
    given = parsed()
    if given.threads:
        torch.set_num_threads(given.threads)
    found: dict[str, Any] = {
        "machine": machine(given.rivals),
        "family": given.family,
        "batch": given.batch,
        "ratios": {name: {} for name in given.rivals},
        "rows": [],
    }
    print(json.dumps(found["machine"]))
    for size in given.sizes:
        model = model_of(given.family, size)
        tools = tools_for(given.rivals, model, given.family)
        print(f"\n{given.family} {size}, batch {given.batch} x {LENGTH} tokens, ", end="")
        print(f"medians of {given.repeats}")
        print("| sweep | rival | cells | ours s | rival s | ratio | patches/s | answers apart |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for task in tasks_for(model, given.tasks.split(","), given.batch, given.family):
            for name, tool in tools.items():
                row = {"size": size, "task": task.name, "rival": name}
                row |= compared(task, Ours(model), tool, given.repeats)
                found["rows"].append(row)
                if not row.get("wrong") and "ratio" in row:
                    found["ratios"][name].setdefault(task.name, row["ratio"])
                print(line(row), flush=True)
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))
    how = {(row["size"], row["task"]): row["how"] for row in found["rows"] if "how" in row}
    for (size, name), words in how.items():
        print(f"{size} {name}: {words}")


if __name__ == "__main__":
    main()
