"""Which pairs of a sweep an intervention does not move, for reports: values by pair, pictures."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import xarray as xr
from PIL import Image

from hooked_vlm.experiments.result import SHOWN_CASES, Cases


HALF = 0.5
"""The probability above which an answer is the model's, whatever the others have."""
CASE = "case"
"""Coordinate of pairs: the name of each, where coordinate pair has what counts once."""


def names_of(values: xr.DataArray) -> list[str]:
    """Returns the name of each pair, by which a report lists it."""
    return [str(name) for name in values.coords[CASE if CASE in values.coords else "pair"].values]


def peaks(by_direction: Mapping[str, xr.DataArray], name: str, failed: str) -> Cases:
    """Returns for each pair the highest of its scores over slots, and the first slot that has it.

    A pair did not fail where that is above `HALF`.  The scores are probabilities `[pair, slot]`,
    and `name` heads their column.
    """
    found = []
    for values in by_direction.values():
        best = values.max("slot").values
        at = values.idxmax("slot").values.astype(int)
        told = {"case": names_of(values), name: best, "at slot": at, "ok": best > HALF}
        found.append(pd.DataFrame(told))
    return Cases(failed=failed, table=pd.concat(found, ignore_index=True))


def failing_pictures(
    setting: Any, clean: Mapping[str, Any], cases: Cases
) -> dict[str, Image.Image]:
    """Returns the pictures of the first cases that failed, by name.

    `clean` has the question of each case, and `setting.picture` draws it.
    """
    return {case: setting.picture(clean[case]) for case in cases.failing["case"][:SHOWN_CASES]}
