"""Arrays in a page: numbers as 16-bit steps, compressed, as text."""

import base64
import gzip
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from hooked_vlm.errors import DataError


STEPS = 2**16 - 1
"""Steps between the lowest and the highest value of an array."""


def packed(values: Shaped[np.ndarray, "..."], name: str) -> dict[str, Any]:
    """Returns an array as what a page embeds: `shape`, `low`, `step` and base64 `data`.

    Floats become whole numbers of steps, of which there are `STEPS` between the array's lowest and
    highest value: each value changes by half a step at most.  Whole numbers stay exact (`step` 0).

    Raises `DataError` for floats that are not finite; `name` is the array's.

    >>> one = packed(np.array([0.0, 0.5, 1.0]), "shares")
    >>> one["shape"], one["low"], round(one["step"] * STEPS, 6)
    ([3], 0.0, 1.0)
    """
    low, step = 0.0, 0.0
    if np.issubdtype(values.dtype, np.integer):
        numbers = values.astype("<u4")
    else:
        numbers, low, step = _steps(values.astype(float), name)
    data = gzip.compress(numbers.tobytes(), 6, mtime=0)
    return {
        "shape": list(values.shape),
        "low": low,
        "step": step,
        "data": base64.b64encode(data).decode(),
    }


def unpacked(one: dict[str, Any]) -> Float[np.ndarray, "..."] | Int[np.ndarray, "..."]:
    """Returns the array that a page reads from what `packed` returned."""
    raw = gzip.decompress(base64.b64decode(one["data"]))
    numbers = np.frombuffer(raw, "<u2" if one["step"] else "<u4").reshape(one["shape"])
    return one["low"] + one["step"] * numbers if one["step"] else numbers.astype(int)


def _steps(values: np.ndarray, name: str) -> tuple[np.ndarray, float, float]:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise DataError(
            f"{wrong} of the {values.size} numbers of {name} are NaN or infinite, so they cannot be "
            "shown. Check the model's outputs on this picture, or run it in float32."
        )
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    step = (high - low) / STEPS or 1.0  # all equal: any step
    return np.rint((values - low) / step).astype("<u2"), low, step
