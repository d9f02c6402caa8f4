"""What the memory's bandwidth predicts for `patched_rows` on GPUs that nobody here has.

    python -m benchmarks.kernels --roofline

Bandwidths and FLOP rates are the datasheets'.  The first time of a prediction is a bound that
no kernel beats: rows written, and each distinct token read from memory once.  The second is that
of a kernel for which every token of every row is read from memory again.
"""

from dataclasses import dataclass


GPUS = {"A100 80GB": (2039, 19.5), "H100 SXM": (3350, 67.0)}
"""GB/s, and float32 TFLOP/s without tensor cores."""
ELEMENT = 2
"""Bytes of a bfloat16, in which these models run."""


@dataclass(frozen=True)
class Call:
    """The rows that join a batch at one slot of a sweep: cells, each for some prompts."""

    name: str
    d: int
    blocks: int
    pos: int
    cells: int = 12
    prompts: int = 4

    @property
    def rows(self) -> int:
        """How many rows join."""
        return self.cells * self.prompts

    @property
    def written(self) -> int:
        """Bytes of the rows."""
        return self.rows * self.pos * self.d * ELEMENT

    @property
    def distinct(self) -> int:
        """Bytes of the clean and source tokens at this slot."""
        return 2 * self.prompts * self.pos * self.d * ELEMENT


CALLS = (
    Call("Qwen2-VL-7B", 3584, 28, 290),
    Call("Qwen2-VL-7B", 3584, 28, 1060),
    Call("Gemma-3-4b", 2560, 34, 290),
    Call("Gemma-3-4b", 2560, 34, 1060),
)
WORK = {
    # floating-point operations, and bytes moved, for each element of a changed token
    "patch": (0, 2 * ELEMENT),
    "patch, add": (2, 2 * ELEMENT),  # a w, and the sum
    "patch, project": (6, 2 * ELEMENT),  # <h, w>, |w|^2, a w and the sum
}


def table() -> str:
    """Returns the predictions as Markdown."""
    lines = [
        "Predicted, not measured: one call, 4 prompts × 12 cells, bfloat16, copied tokens",
        "",
        "| predicted | rows × pos × d | written | distinct read | "
        + " | ".join(f"{name}, µs" for name in GPUS)
        + " | "
        + " | ".join(f"all slots, {name}, ms" for name in GPUS)
        + " |",
        "|---|---|---:|---:|" + "---:|" * (2 * len(GPUS)),
    ]
    for call in CALLS:
        least, most = call.written + call.distinct, 2 * call.written
        spans = [(least / speed / 1e3, most / speed / 1e3) for speed, _ in GPUS.values()]
        slots = call.blocks + 1
        cells = [f"{a:.0f}–{b:.0f}" for a, b in spans]
        cells += [f"{a * slots / 1e3:.1f}–{b * slots / 1e3:.1f}" for a, b in spans]
        lines.append(
            f"| {call.name}, {slots} slots | {call.rows} × {call.pos} × {call.d} | "
            f"{call.written / 1e6:.0f} MB | {call.distinct / 1e6:.0f} MB | {' | '.join(cells)} |"
        )
    lines += [
        "",
        "Predicted: operations and bytes for each element of a changed token, and what bounds it",
        "",
        f"| predicted | FLOP | bytes | FLOP/byte | {' | '.join(GPUS)} |",
        "|---|---:|---:|---:|" + "---|" * len(GPUS),
    ]
    for name, (flop, moved) in WORK.items():
        bounds = []
        for speed, rate in GPUS.values():
            ridge = rate * 1e3 / speed
            bounds.append(f"{'memory' if flop / moved < ridge else 'arithmetic'} ({ridge:.1f})")
        lines.append(f"| {name} | {flop} | {moved} | {flop / moved:.1f} | {' | '.join(bounds)} |")
    return "\n".join(lines)
