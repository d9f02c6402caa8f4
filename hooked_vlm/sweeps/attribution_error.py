"""How far an estimate of a sweep is from the exact one, over its cells.

What is compared is effects, scores less the clean score: prompts differ in their clean scores,
and an estimate that says "no effect" everywhere would be correlated with the exact sweep by
that alone.  Correlations say whether the estimate finds the right cells, the mean error how
wrong its numbers are (beside it stands the mean size of an effect, to read it by), and the
share of equal signs whether it at least points the right way.

Intervals resample prompts, not cells: the cells of a sweep are measured on the same prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy.stats import rankdata

from hooked_vlm.analysis.statistics import Interval, bootstrap_of
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Count, Seed
from hooked_vlm.errors import DataError


SMALLEST = 1e-6
"""Share of the largest effect below which an exact effect has no sign to speak of."""


@dataclass(frozen=True)
class EstimateError:
    """An estimate beside the exact sweep, over cells and prompts together.

    Correlations are NaN where one of the two does not vary.
    """

    pearson: Interval
    spearman: Interval
    error: Interval
    """Mean absolute difference, in the metric's units."""
    size: Interval
    """Mean absolute exact effect, in the metric's units."""
    sign: Interval
    """Share of equal signs, where the exact effect is not zero."""
    cells: int

    def __str__(self) -> str:
        return (
            f"Pearson {self.pearson}, Spearman {self.spearman}, mean error {self.error} of effects "
            f"of {self.size}, equal signs {self.sign} ({self.cells} cells, {self.error.n} prompts)"
        )


QUANTITIES = tuple(field.name for field in fields(EstimateError) if field.name != "cells")


@checked(DataError)
def attribution_error(
    estimate: xr.DataArray,
    exact: xr.DataArray,
    clean: xr.DataArray | float | int,
    *,
    prompt: str = "batch",
    n_resamples: Count = 2_000,
    seed: Seed = 0,
) -> EstimateError:
    """Returns how far `Sweep.attribution` is from `Sweep.run` on the same sweep.

    `clean` is the score of the clean run, with the metric's dimensions (0 if both are effects
    already).  `prompt` names the axis of independent prompts, which intervals resample; with
    one prompt they are NaN.  Entries of the metric after the batch count as cells: select one
    first unless their units are the same.

    Raises `DataError` for arrays of different shapes, and where there is no axis of prompts.
    """
    _require_alike(estimate, exact)
    if prompt not in exact.dims:
        raise DataError(
            f"There is no axis {prompt!r} among {exact.dims}; name that of the prompts: prompt=…."
        )
    x, y = (
        (scores - clean).transpose(*exact.dims).transpose(prompt, ...).values.astype(np.float64)
        for scores in (estimate, exact)
    )
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("An effect is NaN or infinite: find its cause, or leave that cell out.")
    sums = _sums(x, y)
    how = {"n_resamples": n_resamples, "seed": seed}
    found = {
        "pearson": bootstrap_of(sums, lambda s: _correlation(s[:, 0]), **how),
        "spearman": bootstrap_of(sums, lambda s: _correlation(s[:, 1]), **how),
        "error": bootstrap_of(sums, lambda s: s[:, 2, 0], **how),
        "size": bootstrap_of(sums, lambda s: s[:, 2, 1], **how),
        "sign": bootstrap_of(sums, lambda s: _ratio(s[:, 2, 2], s[:, 2, 3]), **how),
    }
    return EstimateError(**found, cells=x.shape[1])


@checked(DataError)
def agreement_table(
    estimate: xr.DataArray,
    exact: xr.DataArray,
    clean: xr.DataArray | float | int,
    by: Sequence[str],
    *,
    prompt: str = "batch",
    n_resamples: Count = 2_000,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Returns `attribution_error` at every value of some axes, such as `by=["kind", "slot"]`.

    One row for each quantity there, with the columns `by`, quantity, value, low, high and n.

    Raises `DataError` as `attribution_error` does, and for an axis that is not there.
    """
    wrong = [name for name in by if name not in exact.dims or name == prompt]
    if wrong:
        raise DataError(f"There is no axis {wrong[0]!r} to go by among {exact.dims}.")
    _require_alike(estimate, exact)
    rows = []
    for place in _places(exact, by):
        at = exact.isel(place).coords
        here = attribution_error(
            estimate.isel(place),
            exact.isel(place),
            _clean_at(clean, place),
            prompt=prompt,
            n_resamples=n_resamples,
            seed=seed,
        )
        for quantity in QUANTITIES:
            found: Interval = getattr(here, quantity)
            rows.append(
                {name: at[name].item() if name in at else place[name] for name in by}
                | {"quantity": quantity, "value": found.estimate}
                | {"low": found.low, "high": found.high, "n": found.n}
            )
    return pd.DataFrame(rows)


def _require_alike(estimate: xr.DataArray, exact: xr.DataArray) -> None:
    if estimate.dims != exact.dims or estimate.shape != exact.shape:
        raise DataError(
            f"The estimate has axes {dict(estimate.sizes)} and the exact sweep {dict(exact.sizes)};"
            " compare Sweep.attribution and Sweep.run of the same sweep and metric."
        )
    for scores in (estimate, exact):
        if scores.dtype.kind not in "fiub":
            raise DataError(f"Scores are of {scores.dtype}; expected numbers.")


def _places(array: xr.DataArray, by: Sequence[str]) -> Iterator[dict[str, int]]:
    for index in product(*(range(array.sizes[name]) for name in by)):
        yield dict(zip(by, index, strict=True))


def _clean_at(
    clean: xr.DataArray | float | int, place: dict[str, int]
) -> xr.DataArray | float | int:
    if not isinstance(clean, xr.DataArray):
        return clean
    return clean.isel({name: i for name, i in place.items() if name in clean.dims})


def _sums(
    x: Float[np.ndarray, "prompt cell"], y: Float[np.ndarray, "prompt cell"]
) -> Float[np.ndarray, "prompt 3 5"]:
    """Returns each prompt's means, of which all quantities are functions."""
    ranks = [rankdata(values).reshape(values.shape) for values in (x, y)]  # kept in resamples
    has_sign = np.abs(y) > SMALLEST * np.abs(y).max(initial=0.0)
    equal = has_sign & (np.sign(x) == np.sign(y))
    last = [np.abs(x - y), np.abs(y), equal, has_sign, np.zeros_like(x)]
    return np.stack(
        [
            _moments(x, y),
            _moments(*ranks),
            np.stack([values.mean(1, dtype=np.float64) for values in last], axis=1),
        ],
        axis=1,
    )


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Means `[prompt, 5]` of x, y, their squares and their product, centred and scaled."""
    x, y = ((v - v.mean()) / (np.abs(v - v.mean()).max() or 1.0) for v in (x, y))
    return np.stack([v.mean(1) for v in (x, y, x * x, y * y, x * y)], axis=1)


def _correlation(means: np.ndarray) -> np.ndarray:
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    spread = np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0)
    return np.clip(_ratio(xy - x * y, np.sqrt(np.where(spread > 1e-24, spread, 0))), -1, 1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
