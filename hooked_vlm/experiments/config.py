"""What a user may choose about an experiment, and how it tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass


OnProgress = Callable[[int, int], None]
"""Told `(done, total)` in whatever unit the experiment counts; the first call may be (0, n)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a user may choose; every experiment takes the same and uses what it needs."""

    pairs: int = 50
    """Clean/counterfactual pairs per direction (protocol 2.5)."""
    seed: int = 0
    batch_size: int = 16
