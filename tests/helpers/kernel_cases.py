"""Arguments of `patched_rows` that hypothesis draws, and how exact an answer has to be."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.engine.kernels import patched_rows


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("plain", "suffix", "columns", "every other", "expanded")
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 0}
"""Half of the distance from one to the next number, as a share of the number."""


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns the same numbers, as they lie in memory where callers have cut them from others."""
    if layout == "suffix":  # positions from the first changed one on
        longer = torch.cat([tensor[:, :1], tensor[:, :1], tensor], dim=1)
        return longer[:, 2:]
    if layout == "columns":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack([tensor, tensor], dim=3)[..., 0]
    if layout == "expanded":  # one prompt, shown as many
        return tensor[:1].expand(tensor.shape)
    return tensor


@st.composite
def arguments(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, Any]:
    """Draws everything: shapes, layouts, maps, whether and how to steer."""
    size = st.integers(1, 4)
    prompts, sources, rows, pos, source_pos = (draw(size) for _ in range(5))
    d = draw(st.sampled_from([1, 3, 8, 17, 48]))
    dtype = draw(st.sampled_from(dtypes))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layouts = st.sampled_from(LAYOUTS)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        kind = draw(st.sampled_from([torch.int64, torch.int32]))
        return torch.randint(low, high, shape, generator=dice).to(kind)

    given: dict[str, Any] = {
        "clean": laid_out(noise(prompts, pos, d).to(dtype), draw(layouts)),
        "source": laid_out(noise(sources, source_pos, d).to(dtype), draw(layouts)),
        "token_map": numbers(-1, draw(st.integers(0, source_pos)), rows, pos),
        "clean_row": numbers(0, prompts, rows),
        "source_row": numbers(0, sources, rows),
    }
    if draw(st.booleans()):  # rows that take the same tokens, as those of several strengths do
        for name in ("token_map", "clean_row", "source_row"):
            given[name][rows // 2 :] = given[name][:1]
    if draw(st.booleans()):
        n = draw(size)
        given |= {
            "mode": draw(st.sampled_from(["add", "project"])),
            "steer_at": torch.rand(rows, pos, generator=dice) < 0.6,
            "directions": noise(n, d).to(draw(st.sampled_from([dtype, torch.float32]))),
            "direction_row": numbers(-1, n, rows),
            "strength": noise(rows) * numbers(0, 2, rows),
        }
    if draw(st.booleans()):
        given["out"] = torch.full((rows + 2, pos, d), torch.nan, dtype=dtype)[1:-1]
    return given


def truth(given: dict[str, Any]) -> Tensor:
    """Returns the rows by the definition, in float64."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    return patched_rows(**{**wide, "out": None}, by="reference")


def is_exact(given: dict[str, Any]) -> bool:
    """Whether no dot product is asked for, so that every bit is prescribed."""
    return given.get("mode") != "project"


def assert_close(rows: Tensor, given: dict[str, Any], roundings: float = 1.01) -> None:
    """Asserts that rows are the truth, rounded to their dtype after sums in float32.

    `roundings` is how many half-steps the last rounding may be off; float32's sums may be off
    by 2e-6 of the largest number in them.
    """
    expected = truth(given)
    sums = [given["clean"], given["source"], expected]
    largest = max(float(x.double().abs().max()) for x in sums)
    strength = given.get("strength", torch.zeros(1)).abs().max()
    slack = 2e-6 * (1 + largest) * (1 + float(strength))
    bound = roundings * ROUNDING[rows.dtype] * expected.abs() + slack
    off = (rows.double() - expected).abs()
    assert (off <= bound).all(), f"off by {float((off / bound).max()):.2f} of what is allowed"
