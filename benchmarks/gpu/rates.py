"""Predicted seconds from counted work, by what a machine does in a second."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What a machine does; the defaults are assumed of an H100 or H200."""

    flop: float = 593e12
    """Operations a second of matrix products in bfloat16: 0.6 of the datasheet's 989e12."""
    flop_fp32: float = 40e12
    flop_tf32: float = 297e12
    bytes: float = 2.85e12
    """Read and written a second by a copy."""
    launch: float = 5e-6
    """Seconds of the host for each dispatched operation."""
    wait: float = 12e-6
    """Seconds of a wait of the host for the device."""


@dataclass(frozen=True)
class Work:
    """What a run asks for."""

    flop: float
    bytes: float = 0.0
    """Moved by all that is not a matrix product."""
    weights: float = 0.0
    """Bytes of weights that are read, once a pass."""
    operations: float = 0.0
    waits: float = 0.0
    kind: str = "flop"
    """Which of the rates its products have."""

    def device(self, rates: Rates) -> float:
        """Returns the seconds that the device works: products read weights while they compute."""
        products = max(self.flop / getattr(rates, self.kind), self.weights / rates.bytes)
        return products + self.bytes / rates.bytes

    def seconds(self, rates: Rates) -> float:
        """Returns the seconds of a run: host and device work at once, except at waits."""
        return max(self.device(rates), self.operations * rates.launch) + self.waits * rates.wait


MEASURED = {
    "copy, B/s": "bytes",
    "product bf16, FLOP/s": "flop",
    "product fp32, FLOP/s": "flop_fp32",
    "product TF32, FLOP/s": "flop_tf32",
    "launch, s": "launch",
    "wait, s": "wait",
}
"""Rows of part 0, and the rates that they replace."""


def measured(rows: Sequence[Mapping[str, Any]]) -> Rates:
    """Returns the rates that part 0 found; what it did not find is as assumed."""
    found = {MEASURED[row["what"]]: row["value"] for row in rows if row["what"] in MEASURED}
    return replace(Rates(), **found)


def predicted(counted: Sequence[Mapping[str, Any]], rates: Rates) -> dict[str, float]:
    """Returns predictions by what is predicted.

    An entry of `counted` names `work` (seconds), two other entries as a `ratio`, `busy` (the share
    of another's seconds in which the device works), a `rate` of the machine, or a `value`.
    """
    found: dict[str, float] = {}
    works = {each["what"]: Work(**each["work"]) for each in counted if "work" in each}
    seconds = {what: work.seconds(rates) for what, work in works.items()}
    for each in counted:
        what = each["what"]
        if "work" in each:
            found[what] = seconds[what]
        elif "ratio" in each:
            above, below = each["ratio"]
            found[what] = seconds[above] / seconds[below]
        elif "busy" in each:
            found[what] = works[each["busy"]].device(rates) / seconds[each["busy"]]
        elif "rate" in each:
            found[what] = asdict(rates)[each["rate"]]
        else:
            found[what] = each["value"]
    return found
