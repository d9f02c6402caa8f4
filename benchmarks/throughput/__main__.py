"""Patches per second of whole sweeps, beside those of other tools, in turns.

    python -m benchmarks.throughput [--quick] [--family llava] [--json FILE] [--plot FILE]
        [--batch 2 --questions 2]
        [--rivals hook-loop,usual-loop,restart,plain,transformer-lens,nnsight,pyvene]

Every sweep is timed from pixels to the last position's logits, its clean and source runs
included, for everyone; `alone` is the ratio without these, for tools that can keep them (what is
in the inputs is encoded, and sources are recorded, before the clock starts).  Runs of the rivals
and of ours take turns; a ratio is the median over pairs of neighbouring runs, with their smallest
and largest.  Answers are compared in the same run: one that is more than 1e-4 of the largest
logit from ours is called wrong, and has no ratio in the JSON's `ratios`; a sweep that a tool has
no way to do is in the table with the reason.  Memory is the peak of one more run of each, beside
the weights; `ours, one by one` is ours with as many rows in flight as a loop has.

Models are random: 12 blocks of width 512 and 24 of width 1024, a vocabulary of 32,000, 184 tokens
of which 144 are visual; and the two that ship.  LLaVA is the family that all tools know.  Nothing
is asserted: times are this machine's.

The last three rivals are other packages, in an environment of their own:

    python -m benchmarks.throughput.environment --at .venv-rivals
    .venv-rivals/bin/python -m benchmarks.throughput --rivals transformer-lens,nnsight,pyvene
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import built
from benchmarks.common.machine import machine
from benchmarks.throughput import rivals
from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.measure import measured, own
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.plot import drawn
from benchmarks.throughput.rates import product_rate
from benchmarks.throughput.tasks import TASKS, Cannot, Task
from benchmarks.throughput.timed import SHIPPED, SIZES, Timed
from benchmarks.throughput.usual_loop import UsualLoop
from hooked_vlm import HookedVLM


OWN = ("hook-loop", "usual-loop", "restart", "plain")
"""Rivals that need no other package; the rest are `rivals.RIVALS`."""
WRONG = 1e-4


def rival(name: str, model: HookedVLM, family: str) -> Any:
    """Returns a tool by name; raises `Cannot` where it does not know the family."""
    if name in rivals.RIVALS:
        return rivals.make(name, model.hf_model, family)
    loops = {"hook-loop": HookLoop, "usual-loop": UsualLoop}
    return loops[name](model.hf_model) if name in loops else Ours(model, name)


def versions(names: Sequence[str]) -> dict[str, str]:
    """Returns the installed version of each rival that is another package."""
    return {name: rivals.version(name) for name in names if name in rivals.RIVALS}


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
        return f"{start} | | | cannot: {row['cannot']} | | | | |"
    apart = f"{row['difference']:.1e}" + (" WRONG" if row["wrong"] else "")
    alone = "" if row["alone"] is None else f"{row['alone']:.2f}"
    peaks = [row[name] for name in ("ours_peak", "ours_one_by_one_peak", "rival_peak")]
    memory = " / ".join("?" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks)
    return (
        f"{start} {row['cells']} | {row['ours_s']:.2f} | {row['rival_s']:.2f} | "
        f"{row['ratio']:.2f} ({min(row['ratios']):.2f}-{max(row['ratios']):.2f}) | {alone} | "
        f"{row['patches_per_s']:.1f} | {memory} | {apart} |"
    )


def parsed() -> argparse.Namespace:
    """Returns what was asked for; ends the program where a rival is unknown or missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="12x512 alone, three turns")
    parser.add_argument("--family", default="llava", choices=built.FAMILIES)
    parser.add_argument("--rivals", default="hook-loop,usual-loop")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--sizes", default="", help=", ".join([*SIZES, *SHIPPED]))
    parser.add_argument("--batch", default="1", help="pairs in a batch; several with commas")
    parser.add_argument("--questions", type=int, default=1, help="prompts about each image")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
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
    default = ["12x512"] if given.quick else ["12x512", "24x1024", *SHIPPED]
    given.sizes = given.sizes.split(",") if given.sizes else default
    given.tasks = given.tasks.split(",")
    for what, names, known in (
        ("size", given.sizes, [*SIZES, *SHIPPED]),
        ("task", given.tasks, TASKS),
    ):
        for name in set(names) - set(known):
            parser.error(f"no {what} {name!r}; there are {', '.join(known)}")
    given.batch = [int(n) for n in given.batch.split(",")]
    given.repeats = given.repeats or (3 if given.quick else 7)
    return given


def rows_of(given: argparse.Namespace, size: str, batch: int) -> Iterator[dict[str, Any]]:
    """Prints a table for one model and batch, and yields its rows."""
    timed = Timed.of(size, given.family)
    tools = tools_for(given.rivals, timed.model, timed.family)
    cfg, (example,) = timed.model.cfg, timed.tasks(["final_token"], batch)
    length = example.clean["input_ids"].shape[1]
    product = product_rate(batch * length, cfg.d_model, cfg.d_mlp or 4 * cfg.d_model)
    print(f"\n{timed.family} {size}, batch {batch} x {length} tokens, ", end="")
    if given.questions > 1:
        print(f"{given.questions} questions about each image, ", end="")
    print(
        f"medians of {given.repeats}; a plain product of {batch * length} rows with this ", end=""
    )
    print(f"width's feed-forward weights runs at {product / 1e9:.0f} GFLOP/s")
    print(
        "| sweep | rival | cells | ours s | rival s | ratio | alone | patches/s | "
        "MB: ours / ours, one by one / rival | answers apart |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for task in timed.tasks(given.tasks, batch, questions=given.questions):
        ours = Ours(timed.model)
        row: dict[str, Any] = {}
        taken = own(task, ours)
        for name, tool in tools.items():
            row = {"size": size, "batch": batch, "task": task.name, "rival": name, **taken}
            row |= compared(task, ours, tool, given.repeats)
            row["product_per_s"] = product
            print(line(row), flush=True)
            yield row
        if "how" in row:
            print(
                f"  {task.name}: {row['operations_per_s'] / 1e9:.0f} GFLOP/s, "
                f"{row['operations_per_s'] / product:.2f} of the product's; executed over floor "
                f"{row['executed_over_floor']:.2f}, a careful loop's {row['loop_over_floor']:.2f}; "
                f"{row['how']}"
            )


def main() -> None:
    """Prints a table for each model, and writes everything as JSON."""
    given = parsed()
    if given.threads:
        torch.set_num_threads(given.threads)
    found: dict[str, Any] = {
        "machine": machine() | versions(given.rivals),
        "family": given.family,
        "ratios": {name: {} for name in given.rivals},
        "rows": [],
    }
    print(json.dumps(found["machine"]))
    for size in given.sizes:
        for batch in given.batch:
            for row in rows_of(given, size, batch):
                found["rows"].append(row)
                if not row.get("wrong") and "ratio" in row:
                    found["ratios"][row["rival"]].setdefault(row["task"], row["ratio"])
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))
    if given.plot:
        drawn(found["rows"]).savefig(given.plot, dpi=150)


if __name__ == "__main__":
    main()
