"""Part 1: the fused kernel beside its definition, on drawn cases and beyond 31 bits."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.given import Given
from hooked_vlm.engine.kernels import patched_rows, way_for


CASES, FEW = 300, 20
LAYOUTS = ("plain", "suffix", "columns", "every other", "expanded")
STEPS = {torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float16: 2**-11}
"""Half of the distance from one number to the next, as a share of the number."""
RESERVED = 10.0
"""Seconds for the very large call."""
MANY = 2**31
"""Elements that an index of 31 bits does not reach."""


def run(given: Given) -> None:
    """Notes for each dtype the worst case, and for one the rows of a very large call."""
    way = way_for(torch.empty(1, 1, 1, device=given.device))
    given.note("kernel", way, correct=way == "triton" if given.on_gpu else None)
    for i, dtype in enumerate(STEPS):
        # Each new shape may compile, so that time ends the cases of a dtype as well.
        seconds = (given.left - RESERVED) / (len(STEPS) - i)
        worst, copied, n = drawn_cases(given, dtype, given.left - seconds)
        name = str(dtype).removeprefix("torch.")
        note = f"{n} cases; at most 1 is allowed"
        given.note(f"kernel {name}: error ÷ bound", worst, correct=worst <= 1, note=note)
        given.note(f"kernel {name}: copied tokens keep their bits", str(copied), correct=copied)
    if given.on_gpu:
        beyond(given)


def drawn_cases(given: Given, dtype: torch.dtype, until: float) -> tuple[float, bool, int]:
    """Returns the worst error over its bound, whether copies are exact, and how many cases.

    No new case begins when the part has less than `until` seconds left.
    """
    worst, exact, n = 0.0, True, 0
    for seed in range(FEW if given.tiny else CASES):
        if n and given.left < until:
            break
        n += 1
        case = drawn(seed, dtype, given.device)
        out = torch.full(case["shape"], torch.nan, dtype=dtype, device=given.device)
        arguments = {name: value for name, value in case.items() if name != "shape"}
        rows = patched_rows(**arguments, out=out)
        truth = definition(arguments)
        error = over_bound(rows, truth, arguments)
        worst = max(worst, float("inf") if error != error else error)
        moved = arguments["steer_at"] if "mode" in arguments else torch.zeros_like(rows[..., 0])
        kept = ~moved.bool()
        exact &= torch.equal(rows[kept], truth[kept].to(dtype))
    return worst, exact, n


def drawn(seed: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Returns arguments of `patched_rows`: drawn shapes, layouts, maps and steering."""
    dice = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=dice))

    kind = (torch.int64, torch.int32)[number(0, 2)]

    def indices(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=dice).to(device, kind)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice)

    prompts, sources, rows, pos, source_pos = (number(1, 5) for _ in range(5))
    d = (1, 3, 8, 17, 48, 1024, 2560)[number(0, 7)]
    case: dict[str, Any] = {
        "shape": (rows, pos, d),
        "clean": laid_out(noise(prompts, pos, d).to(device, dtype), LAYOUTS[number(0, 5)]),
        "source": laid_out(noise(sources, source_pos, d).to(device, dtype), LAYOUTS[number(0, 5)]),
        "token_map": indices(-1, source_pos, rows, pos),
        "clean_row": indices(0, prompts, rows),
        "source_row": indices(0, sources, rows),
    }
    if number(0, 2):
        n = number(1, 5)
        steer_at = (torch.rand(rows, pos, generator=dice) < 0.6).to(device)
        case |= {
            "mode": ("add", "project")[number(0, 2)],
            "steer_at": steer_at,
            "directions": noise(n, d).to(device, (dtype, torch.float32)[number(0, 2)]),
            "direction_row": indices(-1, n, rows),
            "strength": (noise(rows) * torch.randint(0, 2, (rows,), generator=dice)).to(device),
        }
    return case


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns the same numbers with other strides, as callers cut them from larger tensors."""
    if layout == "suffix":
        return torch.cat([tensor[:, :1], tensor[:, :1], tensor], dim=1)[:, 2:]
    if layout == "columns":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack([tensor, tensor], dim=3)[..., 0]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def definition(arguments: dict[str, Any]) -> Tensor:
    """Returns the rows by the definition, in float64."""
    wide: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return patched_rows(**wide, by="reference")


def over_bound(rows: Tensor, truth: Tensor, arguments: dict[str, Any]) -> float:
    """Returns the worst error over its bound: one rounding, beside float32's sums."""
    largest = max(
        float(x.double().abs().max()) for x in (arguments["clean"], arguments["source"], truth)
    )
    strength = arguments.get("strength", torch.zeros(1)).abs().max()
    slack = 2e-6 * (1 + largest) * (1 + float(strength))
    bound = 1.01 * STEPS[rows.dtype] * truth.abs() + slack
    return float(((rows.double() - truth).abs() / bound).max())


def beyond(given: Given) -> None:
    """Notes whether rows of more than 2³¹ elements are those of the definition."""
    pos, d, what = 512, 4096, "kernel: more than 2³¹ elements"
    n = MANY // (pos * d) + 8
    if torch.cuda.mem_get_info()[0] < 2 * 2 * n * pos * d:
        given.note(what, "not run: too little free memory")
        return
    dice = torch.Generator(given.device).manual_seed(0)
    clean, source = (
        torch.randn(2, pos, d, generator=dice, device=given.device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    token_map = torch.randint(-1, pos, (n, pos), generator=dice, device=given.device)
    rows: dict[str, Any] = {"clean_row": torch.arange(n, device=given.device) % 2}
    rows["source_row"] = 1 - rows["clean_row"]
    out = torch.full((n, pos, d), torch.nan, dtype=torch.bfloat16, device=given.device)
    patched_rows(clean, source, token_map, **rows, out=out, check_values=False)
    same = True
    for i in range(0, n, 64):
        part: dict[str, Any] = {name: value[i : i + 64] for name, value in rows.items()}
        expected = patched_rows(clean, source, token_map[i : i + 64], **part, by="reference")
        same &= torch.equal(out[i : i + 64], expected)
    given.note(what, str(same), correct=same)
