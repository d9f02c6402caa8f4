"""Bandwidth of `patched_rows` beside that of a plain copy, and of other ways to the same rows.

    python -m benchmarks.kernels [--quick] [--json FILE]
    python -m benchmarks.kernels --roofline

Runs on CUDA.  Without a GPU it runs on one small shape, to compare the ways' rows only: there
`ours` is the definition, which is not made to be fast.  A row of the tables is one shape; all ways
take turns on it, all write into the same memory, and times are medians.  GB/s counts two bytes
for each byte of the rows, one read and one written, for everyone: a way that touches memory more
often shows it as a lower number.  `copy` is `copy_` of as many bytes, the machine's own bandwidth.
Every way's rows are compared with the reference's before anything is timed.

`--roofline` measures nothing: it prints what datasheet bandwidths predict for GPUs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.machine import machine
from benchmarks.kernels import roofline
from hooked_vlm.engine.kernels import patched_rows, way_for


@dataclass(frozen=True)
class Shape:
    """A batch to make: rows of a few prompts, half of their image tokens from a source."""

    name: str
    prompts: int
    pos: int
    d: int
    rows: int
    first: int = 20
    """Where the image tokens begin; there are 12 to a line."""


SHAPES = {
    "cpu": (Shape("a trial", 4, 184, 512, 8),),
    "cuda": (
        Shape("12 blocks of 512", 4, 184, 512, 512),
        Shape("Qwen2-VL-7B", 4, 290, 3584, 116),
        Shape("Qwen2-VL-7B", 8, 1060, 3584, 232),
        Shape("Gemma-3-4b", 4, 290, 2560, 140),
        Shape("Gemma-3-4b", 8, 1060, 2560, 280),
    ),
}
WORK = {
    "patch": {},
    "patch, add": {"mode": "add"},
    "patch, project": {"mode": "project"},
}
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""How far a way's rows may be from the reference's, as a share of the largest number."""

Way = Callable[[dict[str, Any]], Tensor]


def make(shape: Shape, work: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Returns arguments of `patched_rows`, with the memory to write into."""
    dice = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=dice).to(device, dtype)

    rows, pos, d = shape.rows, shape.pos, shape.d
    column = torch.arange(pos) - shape.first
    taken = (column >= 0) & (column % 12 < 6)
    token_map = torch.where(taken, torch.arange(pos), -1).repeat(rows, 1)
    prompt = torch.arange(rows) % shape.prompts
    made: dict[str, Any] = {
        "clean": noise(shape.prompts, pos, d),
        "source": noise(shape.prompts, pos, d),
        "token_map": token_map.to(device),
        "clean_row": prompt.to(device),
        "source_row": prompt.to(device),
        "out": torch.empty(rows, pos, d, dtype=dtype, device=device),
    }
    if "mode" in work:
        made |= {
            "mode": work["mode"],
            "steer_at": ((column >= 0) & (column % 12 >= 6)).repeat(rows, 1).to(device),
            "directions": noise(2, d),
            "direction_row": (torch.arange(rows) % 2).to(device),
            "strength": torch.linspace(-2, 2, rows).to(device),
        }
    return made


# Each way is written as one would write it without this package's kernel.


def by_index_put(given: dict[str, Any]) -> Tensor:
    """Rows cloned, and then written over where they change."""
    out = given["out"]
    torch.index_select(given["clean"], 0, given["clean_row"], out=out)
    row, pos = (given["token_map"] >= 0).nonzero(as_tuple=True)
    new = given["source"][given["source_row"][row], given["token_map"][row, pos]]
    out.index_put_((row, pos), new)
    if "mode" in given:
        row, pos = given["steer_at"].nonzero(as_tuple=True)
        h = out[row, pos].float()
        out.index_put_((row, pos), _steered(given, h, row).to(out.dtype))
    return out


def _steered(given: dict[str, Any], h: Tensor, row: Tensor) -> Tensor:
    w = given["directions"][given["direction_row"][row]].float()
    a = given["strength"][row][:, None]
    if given["mode"] == "project":
        a = a * (h * w).sum(-1, keepdim=True) / (w * w).sum(-1, keepdim=True)
    return h + a * w


def by_where(given: dict[str, Any]) -> Tensor:
    """Everything gathered and computed for all tokens, and then chosen from."""
    taken = (given["token_map"] >= 0)[..., None]
    rows = given["clean"][given["clean_row"]]
    new = given["source"][given["source_row"][:, None], given["token_map"].clamp(min=0)]
    rows = torch.where(taken, new, rows)
    if "mode" in given:
        h = rows.float()
        w = given["directions"][given["direction_row"]].float()[:, None]
        a = given["strength"][:, None, None]
        if given["mode"] == "project":
            a = a * (h * w).sum(-1, keepdim=True) / (w * w).sum(-1, keepdim=True)
        rows = torch.where(given["steer_at"][..., None], (h + a * w).to(rows.dtype), rows)
    return given["out"].copy_(rows)


def ours(given: dict[str, Any]) -> Tensor:
    """This package's, by the way that it chooses itself."""
    return patched_rows(**given, check_values=False)


def ways(names: Sequence[str]) -> dict[str, Way]:
    """Returns the named ways, compiled afresh."""
    known: dict[str, Way] = {"ours": ours, "index_put": by_index_put, "where": by_where}
    if "compile" in names:
        torch.compiler.reset()
        known["compile"] = torch.compile(by_where, dynamic=False)
    return {name: known[name] for name in names}


def measured(given: dict[str, Any], tried: dict[str, Way], repeats: int) -> dict[str, Any]:
    """Returns GB/s by way, and each as a share of the copy's, once all have been found right."""
    expected = patched_rows(**{**given, "out": None}, by="reference").float()
    out = given["out"]
    off = {}
    for name, way in tried.items():
        out.zero_()
        off[name] = float((way(given).float() - expected).abs().max() / expected.abs().max())
        assert off[name] <= BOUNDS[out.dtype], f"{name} is off by {off[name]:.1e}"
    del expected
    filled = torch.randn_like(out)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: out.copy_(filled)}
    runs |= {name: lambda way=way: way(given) for name, way in tried.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):  # the first warms up
        for name in runs if turn % 2 else reversed(runs):
            spent = timed(runs[name], out.is_cuda)
            if turn:
                seconds[name].append(spent)
    moved = 2 * out.numel() * out.element_size()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "megabytes": moved / 2e6,
        "gb_per_s": {name: moved / each / 1e9 for name, each in medians.items()},
        "of_copy": {name: medians["copy"] / each for name, each in medians.items()},
        "seconds": medians,
        "off": off,
    }


def timed(run: Callable[[], Any], on_gpu: bool) -> float:
    """Returns the seconds of one run: the GPU's own, or the clock's."""
    if on_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Prints a table for each kind of work, and writes everything as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, without torch.compile")
    parser.add_argument("--roofline", action="store_true", help="print predictions and stop")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.roofline:
        print(roofline.table())
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES[device][:2] if given.quick else SHAPES[device]
    dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]
    names = ["ours", "index_put", "where", *([] if given.quick else ["compile"])]
    repeats = given.repeats or (5 if given.quick else 15)
    ours = way_for(torch.empty(1, 1, 1, device=device))
    found: dict[str, Any] = {"machine": machine() | {"ours": ours}, "rows": []}
    print(json.dumps(found["machine"]))
    for dtype in dtypes:
        for work, options in WORK.items():
            print(f"\n{work}, {str(dtype).removeprefix('torch.')}, GB/s (of copy)\n")
            print(f"| rows | MB | copy | {' | '.join(names)} |")
            print("|---|---:|---:|" + "---:|" * len(names))
            for shape in shapes:
                with torch.no_grad():
                    tried = ways(names)
                    row = measured(make(shape, options, dtype, device), tried, repeats)
                found["rows"].append({"work": work, "dtype": str(dtype), **vars(shape), **row})
                cells = [f"{row['gb_per_s'][n]:.1f} ({row['of_copy'][n]:.2f})" for n in names]
                print(
                    f"| {shape.name}: {shape.rows} × {shape.pos} × {shape.d} | "
                    f"{row['megabytes']:.0f} | {row['gb_per_s']['copy']:.1f} | "
                    f"{' | '.join(cells)} |",
                    flush=True,
                )
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
