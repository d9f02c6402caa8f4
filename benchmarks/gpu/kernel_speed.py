"""Part 2: the fused kernel beside a copy of its rows and other ways to make them."""

import time

import torch

from benchmarks.gpu.given import Given
from benchmarks.kernels.__main__ import SHAPES, WORK, Shape, make, measured, ours, ways


GOAL = 0.9
"""Of a copy's bandwidth."""
TRIAL = Shape("a trial", 2, 40, 24, 8)


def run(given: Given) -> None:
    """Notes the share of a copy's bandwidth by shape, work and way, and what tuning costs."""
    dtype = torch.float32 if given.tiny else torch.bfloat16
    shapes: tuple[Shape, ...] = (TRIAL,) if given.tiny else SHAPES["cuda"]
    given.note("kernel tuning, s", tuning(given, shapes[0], dtype))
    for shape in shapes:
        for work, options in WORK.items():
            if given.left < 10:
                given.note(f"kernel {work}, {shape.name}", "not run: too little time left")
                continue
            names = ["ours", "index_put", "where"]
            if given.on_gpu and shape is SHAPES["cuda"][1]:  # compiling takes most of a minute
                names.append("compile")
            with torch.no_grad():
                case = make(shape, options, dtype, given.device)
                found = measured(case, ways(names), 1 if given.tiny else 7)
            where = f"{shape.name}, {shape.rows} × {shape.pos} × {shape.d}"
            for name, share in found["of_copy"].items():
                if name != "copy":
                    what = f"kernel {work}, {where}: {name} ÷ copy"
                    given.note(what, share, least=GOAL if name == "ours" and given.on_gpu else None)


def tuning(given: Given, shape: Shape, dtype: torch.dtype) -> float:
    """Returns by how many seconds a first call is longer than a second: compiling and tuning."""
    case = make(shape, {}, dtype, given.device)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        ours(case)
        if given.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]
