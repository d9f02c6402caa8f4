"""Arrays in a page: numbers as whole steps of 16 or 32 bits, compressed, as text."""

import base64
import gzip
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from hooked_vlm.errors import DataError


COARSE = 16
FINE = 32
"""Bits of one number: 2**bits - 1 steps lie between the lowest and the highest value."""


def packed(values: Shaped[np.ndarray, "..."], name: str, bits: int = FINE) -> dict[str, Any]:
    """Returns an array as what a page embeds: `shape`, `bits`, `low`, `step` and base64 `data`.

    Floats become whole numbers of steps from the array's lowest value: each changes by half a step
    at most.  Whole numbers (not negative) stay exact, and their `step` is 0.

    Raises `DataError` for floats that are not finite; `name` is the array's.

    >>> one = packed(np.array([0.0, 0.5, 1.0]), "shares", COARSE)
    >>> one["shape"], one["low"], round(1 / one["step"])
    ([3], 0.0, 65535)
    """
    low, step = 0.0, 0.0
    if np.issubdtype(values.dtype, np.integer):
        bits, numbers = FINE, values
    else:
        numbers, low, step = _steps(values.astype(float), name, bits)
    data = gzip.compress(numbers.astype(f"<u{bits // 8}").tobytes(), 6, mtime=0)
    return {
        "shape": list(values.shape),
        "bits": bits,
        "low": low,
        "step": step,
        "data": base64.b64encode(data).decode(),
    }


def unpacked(one: dict[str, Any]) -> Float[np.ndarray, "..."] | Int[np.ndarray, "..."]:
    """Returns the array that a page reads from what `packed` returned."""
    raw = gzip.decompress(base64.b64decode(one["data"]))
    numbers = np.frombuffer(raw, f"<u{one['bits'] // 8}").reshape(one["shape"])
    return one["low"] + one["step"] * numbers if one["step"] else numbers.astype(int)


def _steps(values: np.ndarray, name: str, bits: int) -> tuple[np.ndarray, float, float]:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise DataError(
            f"{wrong} of the {values.size} numbers of {name} are NaN or infinite, so they cannot "
            "be shown. Check the model's outputs on this picture, or run it in float32."
        )
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    step = (high - low) / (2**bits - 1) or 1.0  # all equal: any step
    return np.rint((values - low) / step), low, step
