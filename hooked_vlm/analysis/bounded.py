"""Intervals and tests for means of bounded values that hold at any number of pairs.

Probabilities lie in [0, 1] and their differences in [-1, 1].  This is all that these functions
use: not symmetry, not many pairs.  A t interval, a bootstrap and a sign-flip test all call the
mean of eight values of -0.05 certainly negative; but one pair in twenty may have +0.95, and the
true mean may be zero.  The bounds say how large such unseen values can be.

The method is Gaffke's (2005; Learned-Miller and Thomas, 2020): weights from a flat Dirichlet
distribution on the values and one value more, at the lower bound for the lower limit and at the
upper bound for the upper one.  For yes/no outcomes it is Clopper and Pearson's interval.  That it
keeps its level for all bounded values is proved for some of them and has no known exception; the
tests try skewed, binary and clustered ones.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from hooked_vlm.analysis.statistics import Interval, Number, Rows, plain, rows_of_pairs
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Count, Finite, Seed, Share
from hooked_vlm.errors import DataError, counted


ROUNDING = 1e-9
"""How far a value may lie outside its bounds: sums of probabilities are rounded."""


@checked(DataError)
def bounded_mean(
    values: Rows,
    *,
    low: Finite,
    high: Finite,
    level: Share = 0.95,
    n_resamples: Count = 10_000,
    seed: Seed = 0,
) -> Interval:
    """Returns the mean over pairs of `values` `[pair, *axes]` in [low, high], with an interval.

    It covers the mean in at least `level` of draws at any number of pairs, and is wider than
    `statistics.bootstrap`'s: by about 4 / n of the range at each end.

    Raises:
        DataError: values outside the bounds, NaN or infinite.

    >>> print(bounded_mean(np.ones(50), low=0, high=1))
    1.000 [0.930, 1.000]
    """
    rows = _checked(values, low, high)
    tail = (1 - level) / 2
    lower, upper = (_means(rows, bound, n_resamples, seed) for bound in (low, high))
    bounds = (rows.mean(0), np.quantile(lower, tail, axis=0), np.quantile(upper, 1 - tail, axis=0))
    estimate, least, most = (plain(np.clip(part, low, high)) for part in bounds)
    return Interval(estimate, least, most, len(rows), level, "bounded mean")


@checked(DataError)
def bounded_test(
    values: Rows,
    null: Finite = 0.0,
    *,
    low: Finite = -1.0,
    high: Finite = 1.0,
    n_resamples: Count = 10_000,
    seed: Seed = 0,
) -> Number:
    """Returns two-sided p-values `[*axes]` for "the mean over pairs is `null`".

    The p-value is at most 0.05 where the interval of `bounded_mean` excludes `null`.  It is never
    below 2 / (1 + n_resamples).

    Raises:
        DataError: values outside the bounds, NaN or infinite, or a null outside the bounds.

    >>> bounded_test(np.full(8, -0.05)) > 0.05  # one pair in twenty may have +0.95
    True
    """
    rows = _checked(values, low, high)
    if not low <= null <= high:
        raise DataError(f"The null mean {null} is outside the values' bounds, {low} to {high}.")
    below = (_means(rows, low, n_resamples, seed) <= null).sum(0)
    above = (_means(rows, high, n_resamples, seed) >= null).sum(0)
    p = 2 * (1 + np.minimum(below, above)) / (1 + n_resamples)
    return plain(np.minimum(p, 1.0))


@checked(DataError)
def by_unit(
    values: Float[np.ndarray, "item ..."], units: Sequence[Hashable]
) -> Float[np.ndarray, "unit ..."]:
    """Returns the mean of each unit's items: two questions about one picture are one observation.

    Raises:
        DataError: not one unit for each item.

    >>> by_unit(np.array([1.0, 0.0, 1.0]), ["a", "a", "b"])
    array([0.5, 1. ])
    """
    values = np.asarray(values, dtype=np.float64)
    if len(units) != len(values):
        raise DataError(
            f"{counted(len(values), 'item')} and {counted(len(units), 'unit')} were given; "
            "expected the unit of each item."
        )
    names = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    index = np.array([names[unit] for unit in units], dtype=int)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values)
    counts = np.bincount(index, minlength=len(names))
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def _checked(values: Rows, low: Finite, high: Finite) -> np.ndarray:
    rows = rows_of_pairs(values, least=1)
    if not low < high:
        raise DataError(f"Bounds {low} to {high} were given; the first must be the lower one.")
    if rows.min() < low - ROUNDING or rows.max() > high + ROUNDING:
        raise DataError(
            f"Values from {rows.min():.3g} to {rows.max():.3g} were given, and their bounds are "
            f"{low} to {high}. Give the bounds that hold for the quantity, such as -1 to 1 for "
            "differences of probabilities."
        )
    return rows.clip(low, high)


def _means(rows: np.ndarray, bound: Finite, n_resamples: int, seed: int) -> np.ndarray:
    """Returns weighted means `[resample, *axes]` of the rows and one row at a bound."""
    weights, n = _weights(len(rows), n_resamples, seed), len(rows)
    means = weights[:, :n] @ rows.reshape(n, -1) + weights[:, n:] * bound
    return means.reshape(-1, *rows.shape[1:])


@lru_cache(maxsize=4)  # one experiment asks for many means over the same pictures
def _weights(n: int, n_resamples: int, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).standard_exponential((n_resamples, n + 1))
    return weights / weights.sum(1, keepdims=True)
