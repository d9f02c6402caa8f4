"""What graphics cards do at most, from their makers' data sheets (`cards.csv`).

Rates are of dense matrix products: data sheets often give twice as much, for sparse ones.  In
float32, torch multiplies in full precision unless told otherwise, which the column `fp32` is for.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hooked_vlm.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Card:
    """One card, with the page that its numbers are from."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    bf16: float
    """Operations a second in bfloat16 or float16."""
    fp32: float
    """Operations a second in float32."""
    source: str

    def rate(self, dtype: str) -> float:
        """Returns operations a second in a dtype."""
        return self.fp32 if dtype == "float32" else self.bf16


@cache
def cards() -> dict[str, Card]:
    """Returns the known cards by name."""
    with Path(__file__).with_name("cards.csv").open(newline="") as file:
        return {
            row["name"]: Card(
                row["name"],
                float(row["memory_gb"]) * 1e9,
                float(row["bandwidth_tb_s"]) * 1e12,
                float(row["bf16_tflop_s"]) * 1e12,
                float(row["fp32_tflop_s"]) * 1e12,
                row["source"],
            )
            for row in csv.DictReader(file)
        }


def card_of(name: str) -> Card:
    """Returns a card by its name in any case; raises `DataError` for an unknown one.

    >>> card_of("h200").memory
    141000000000.0
    """
    known = {own.lower(): card for own, card in cards().items()}
    if name.lower() not in known:
        raise DataError(
            f"There is no card {name!r} here.{did_you_mean(name.upper(), cards())} Use one of: "
            f"{', '.join(cards())}."
        )
    return known[name.lower()]
