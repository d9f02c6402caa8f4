"""Intervals and tests, once, for every experiment.

The unit of observation is the *pair* (or the image): its tokens, slots and kinds of
region are measured on the same stimuli and are not independent, so every function here
takes an array whose first axis is the pair and resamples whole rows.  All other axes
(slot, kind, direction, ...) ride along and keep their correlations.

Which interval for what:
* means of anything (probabilities, logit differences, paired differences): `bootstrap`,
  the *expanded* percentile interval of Hesterberg (2015).  The plain one is
  too short by sqrt((n-1)/n) and by using z for t; in simulation at 50 pairs it covered
  0.92-0.94 of the time where the expanded one covered 0.93-0.95.  BCa, better for very
  skewed values, is not used: it covered 0.91 for sparse -1/0/1 differences and is undefined
  for constant values, which layer sweeps are full of;
* rates of yes/no outcomes: `wilson`, which stays honest at 0 and 1, where any bootstrap
  has zero width: of 20 outcomes with p = 0.98, a bootstrap's interval covers p in 0.32 of draws;
* the largest of several means (the best slot): `simultaneous`, because an interval made for one
  slot lies wholly above the truth in 15 % of draws when it is the best of seven equal ones;
* two kinds on the same pairs: `paired_difference` for the size, and for the p-value
  `bounded.bounded_test`, which keeps its level for skewed differences too, `holm` over slots.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import norm
from scipy.stats import t as student_t
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Count, Finite, Seed, Share
from hooked_vlm.errors import DataError, counted


Rows = Shaped[Tensor | np.ndarray, "pair *axes"] | Sequence[float] | Sequence[bool]
# The second of two samples: its shape is checked by hand, for an error in words.
OtherRows = Shaped[Tensor | np.ndarray, "_ ..."] | Sequence[float] | Sequence[bool]
# A float, or an array with one entry per trailing axis.  A union would have every caller,
# who knows which of the two it is, narrow it again.
Number: TypeAlias = Any

# Rounding in a sum of n terms must not break ties between equal statistics.  It does in scipy's
# permutation_test (1.17), whose allowance is proportional to the sum alone: for some samples of
# values in tenths it returns another p-value than for the same values times ten.
_TIE = 1e-12
# Resamples handled at once: keeps the count matrix near 16 MB whatever was asked for.
_BLOCK = 2_000_000


@dataclass(frozen=True, eq=False)
class Interval:
    """An estimate with its confidence interval; scalars, or arrays of one shape."""

    estimate: Number
    low: Number
    high: Number
    n: int
    """Number of independent observations (pairs or images), not of tokens."""
    level: float
    method: str

    @checked(DataError)
    def covers(self, value: float) -> Any:
        """Returns whether `value` lies inside, bounds included; elementwise for arrays."""
        inside = (np.asarray(self.low) <= value) & (value <= np.asarray(self.high))
        return inside if inside.ndim else bool(inside)

    @checked(DataError)
    def at(self, *index: int) -> "Interval":
        """Returns the interval of one entry of an array of intervals, `at(slot, kind)`."""
        shape = np.shape(self.estimate)
        if len(index) > len(shape) or any(
            not -n <= i < n for i, n in zip(index, shape, strict=False)
        ):
            raise DataError(f"There is no interval at {index}: they are an array of {shape}.")
        parts = (plain(np.asarray(part)[index]) for part in (self.estimate, self.low, self.high))
        return Interval(*parts, n=self.n, level=self.level, method=self.method)

    def __str__(self) -> str:
        if np.ndim(self.estimate):
            return f"Interval(shape={np.shape(self.estimate)}, n={self.n}, {self.method})"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@checked(DataError, but=("values",))
def bootstrap(
    values: Rows, *, level: Share = 0.95, n_resamples: Count = 10_000, seed: Seed = 0
) -> Interval:
    """Returns the mean over pairs of `values` `[pair, *axes]`, with a bootstrap interval.

    Whole rows are resampled, the same ones for all trailing axes.  The tails are widened to
    Student's t with n-1 degrees of freedom (see the module's docstring).  An entry that is
    the same in every pair gets a zero-width interval: for rates use `wilson`.

    Raises:
        DataError: fewer than two pairs, NaN or infinite values.

    >>> bootstrap(np.zeros((50, 13))).low.shape
    (13,)
    """
    rows = rows_of_pairs(values)
    means = _resampled_means(rows, n_resamples, seed)
    tail = _expanded_tail(len(rows), level)
    bounds = (rows.mean(axis=0), *np.quantile(means, [tail, 1 - tail], axis=0))
    estimate, low, high = map(plain, bounds)
    return Interval(estimate, low, high, len(rows), level, "bootstrap percentile")


@checked(DataError)
def simultaneous(
    values: Rows,
    *,
    within: tuple[Finite, Finite] | None = None,
    level: Share = 0.95,
    n_resamples: Count = 10_000,
    seed: Seed = 0,
) -> Interval:
    """Returns means over pairs of `values` `[pair, *axes]`, with intervals that hold together.

    In `level` of draws *all* intervals cover, so that of the largest mean does, whichever it is.
    The half-widths are standard errors times one quantile of the largest studentised deviation
    over all axes, widened to Student's t as `bootstrap`'s are.  `within` are the bounds of the
    values, such as 0 and 1 for probabilities; the intervals are cut off there.

    Raises:
        DataError: fewer than two pairs, NaN or infinite values.

    >>> values = np.random.default_rng(0).normal(size=(50, 13))
    >>> bool((simultaneous(values).high > bootstrap(values).high).all())
    True
    """
    rows = rows_of_pairs(values)
    n, estimate = len(rows), rows.mean(axis=0)
    error = rows.std(axis=0, ddof=1) / math.sqrt(n)
    deviations = np.abs(_resampled_means(rows, n_resamples, seed) - estimate)
    ratios = np.divide(deviations, error, out=np.zeros_like(deviations), where=error > 0)
    largest = ratios.reshape(n_resamples, -1).max(axis=1)
    t_to_z = student_t.ppf((1 + level) / 2, n - 1) / norm.ppf((1 + level) / 2)
    factor = math.sqrt(n / (n - 1)) * t_to_z * np.quantile(largest, level)
    bounds = (estimate - factor * error, estimate + factor * error)
    if within is not None:
        bounds = tuple(np.clip(bound, *within) for bound in bounds)
    mean, low, high = map(plain, (estimate, *bounds))
    return Interval(mean, low, high, n, level, "simultaneous")


@checked(DataError, but=("values",))
def bootstrap_of(
    values: Rows,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    level: Share = 0.95,
    n_resamples: Count = 10_000,
    seed: Seed = 0,
) -> Interval:
    """Returns a function of means over pairs (a ratio, a correlation) with its interval.

    `statistic` takes means of `values`, `[resample, *axes]`, and returns `[resample]`.
    Resamples for which it is NaN are left out.  The tails are widened as `bootstrap`'s are; of
    one pair there is no interval (NaN).
    """
    rows = _numbers(values)
    if not rows.ndim or not len(rows):
        raise DataError(f"Statistics over pairs need at least 1 row; got shape {rows.shape}.")
    of_all = np.asarray(statistic(rows.mean(axis=0, keepdims=True)))
    if of_all.shape != (1,):
        raise DataError(
            f"The statistic returned shape {of_all.shape} for means of shape "
            f"{(1, *rows.shape[1:])}; expected one number for each resample, [resample]."
        )
    estimate = float(of_all[0])
    found = np.empty(0)
    if len(rows) > 1:
        found = statistic(_resampled_means(rows_of_pairs(rows), n_resamples, seed))
        found = found[np.isfinite(found)]
    low = high = math.nan
    if len(found):
        tail = _expanded_tail(len(rows), level)
        low, high = (float(bound) for bound in np.quantile(found, [tail, 1 - tail]))
    return Interval(estimate, low, high, len(rows), level, "bootstrap percentile")


@checked(DataError, but=("a", "b"))
def paired_difference(
    a: Rows, b: OtherRows, *, level: Share = 0.95, n_resamples: Count = 10_000, seed: Seed = 0
) -> Interval:
    """Returns the mean of `a - b` over the same pairs, with a bootstrap interval.

    Raises:
        DataError: `a` and `b` are not measured on the same number of pairs and axes.
    """
    return bootstrap(_difference(a, b), level=level, n_resamples=n_resamples, seed=seed)


@checked(DataError)
def wilson(successes: Number, n: Count, *, level: Share = 0.95) -> Interval:
    """Returns the rate `successes / n` with Wilson's score interval.

    `successes` may be an array (one count per slot) and need not be whole: for `n`
    independent values in [0, 1] (say, the share of an image's tokens that a probe gets
    right) pass their sum.  Their variance is at most p(1-p), that of yes/no outcomes, so
    the interval is then conservative.

    Raises:
        DataError: `n` is not positive, or `successes` is outside [0, n].

    >>> print(wilson(50, 50))
    1.000 [0.929, 1.000]
    """
    count = _numbers(successes)
    if not np.all((count >= 0) & (count <= n * (1 + _TIE))):
        raise DataError(
            f"Wilson's interval was given {shown(successes)} successes of n={n}; it needs "
            "0 <= successes <= n."
        )
    rate = np.minimum(count / n, 1.0)
    bounds = proportion_confint(rate * n, n, alpha=1 - level, method="wilson")
    low, high = map(np.asarray, bounds)
    # At 0 and 1 the bound equals the rate in exact arithmetic; rounding may cross it.
    low, high = np.where(rate == 0, 0.0, low), np.where(rate == 1, 1.0, high)
    return Interval(plain(rate), plain(low), plain(high), n, level, "wilson")


@checked(DataError, but=("a", "b"))
def sign_flip_test(
    a: Rows, b: OtherRows | None = None, *, n_resamples: Count = 10_000, seed: Seed = 0
) -> Number:
    """Returns two-sided p-values `[*axes]` for "`a - b` is symmetric about zero".

    Under this null hypothesis each pair's difference is as likely as its negative, so the
    signs of whole rows are flipped at random.  Differences of mean zero that are skewed are not
    symmetric, and are rejected too: of values -0.05 (95 %) and +0.95 (5 %) 0.65 of draws at 8
    pairs.  (Studentised flips are the same test: flips keep the sum of squares.)  For a claim
    about a mean use `bounded.bounded_test`.  With few pairs (2^n <= `n_resamples`) all
    sign patterns are enumerated and the p-value is exact; otherwise it is
    (1 + hits) / (1 + n_resamples), which is never zero and keeps its level.

    Raises:
        DataError: shapes differ, fewer than two pairs, NaN or infinite values.
    """
    rows = rows_of_pairs(a) if b is None else _difference(a, b)
    flat = rows.reshape(len(rows), -1)
    observed = np.abs(flat.sum(axis=0)) - _TIE * np.abs(flat).sum(axis=0)
    exact = 2 ** len(rows) <= n_resamples
    hits = np.zeros(flat.shape[1])
    for signs in _all_signs(len(rows)) if exact else _random_signs(len(rows), n_resamples, seed):
        hits += (np.abs(signs @ flat) >= observed).sum(axis=0)
    p = hits / 2 ** len(rows) if exact else (1 + hits) / (1 + n_resamples)
    return plain(p.reshape(rows.shape[1:]))


@checked(DataError, but=("p_values",))
def holm(p_values: Float[np.ndarray, "*axes"] | Sequence[float]) -> Float[np.ndarray, "*axes"]:
    """Returns Holm's adjusted p-values; the whole array is one family of tests.

    Rejecting where the result is <= 0.05 keeps the chance of any false rejection in the
    family at 0.05, however the tests depend on one another (slots of one sweep do).

    Raises:
        DataError: a p-value outside [0, 1], or bools (results of tests, not p-values).
    """
    p = _numbers(p_values)
    given = p_values if isinstance(p_values, Tensor) else np.asarray(p_values)
    if str(given.dtype).endswith("bool"):
        raise DataError(
            f"holm was given p_values={shown(p_values)}; expected numbers from 0 to 1, not bools."
        )
    if not np.all((p >= 0) & (p <= 1)):
        raise DataError("Holm's correction was given p-values outside [0, 1] or NaN.")
    # Written out: statsmodels' `multipletests` calls gc.collect(), which takes most of the time of
    # an experiment's verdict in a process that holds a model.
    flat = p.ravel()
    order = np.argsort(flat, kind="stable")
    stepped = np.minimum(flat[order] * np.arange(len(flat), 0, -1), 1.0)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted.reshape(p.shape)


def rows_of_pairs(values: OtherRows, least: int = 2) -> np.ndarray:
    """Returns values as an array of pairs; raises `DataError` for too few, and for NaN."""
    rows = _numbers(values)
    if rows.ndim == 0 or len(rows) < least:
        raise DataError(
            f"Statistics over pairs need at least {counted(least, 'row')}; got shape {rows.shape}."
        )
    if not np.isfinite(rows).all():
        raise DataError(
            f"{np.count_nonzero(~np.isfinite(rows))} of {rows.size} values are NaN or infinite; "
            "leave those pairs out on purpose, with the count reported, or find their cause."
        )
    return rows


def _numbers(values: Any) -> np.ndarray:
    """Returns an array of float64; raises `DataError` for anything but numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        given = np.asarray(values)
    except ValueError:  # rows of several lengths
        given = np.empty(0, object)
    if given.dtype.kind not in "biuf":
        raise DataError(f"Statistics over pairs need an array of numbers; given {shown(values)}.")
    return given.astype(np.float64)


def _difference(a: Rows, b: OtherRows) -> np.ndarray:
    left, right = rows_of_pairs(a), rows_of_pairs(b)
    if left.shape != right.shape:
        raise DataError(
            f"A paired comparison was given shapes {left.shape} and {right.shape}; both must be "
            "measured on the same pairs, in the same order, with the same axes."
        )
    return left - right


def plain(value: Number) -> Number:
    """Returns an array as it is, and a single number as a float."""
    return value if np.ndim(value) else float(value)


def _blocks(n: int, n_resamples: int) -> list[int]:
    size = max(1, min(n_resamples, _BLOCK // n))
    return [min(size, n_resamples - done) for done in range(0, n_resamples, size)]


def _resampled_means(rows: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Means `[resample, *axes]`: how often each row was drawn, times the rows.

    A matrix product instead of gathered copies, which for a sweep (200 pairs, 13 slots,
    2 kinds) would be gigabytes.
    """
    n = len(rows)
    rng = np.random.default_rng(seed)
    flat = rows.reshape(n, -1)
    even = np.full(n, 1 / n)
    parts = [rng.multinomial(n, even, size=size) @ flat for size in _blocks(n, n_resamples)]
    return (np.concatenate(parts) / n).reshape(-1, *rows.shape[1:])


def _expanded_tail(n: int, level: float) -> float:
    """The percentile at which a bootstrap tail is as wide as Student's t interval."""
    return float(norm.cdf(-math.sqrt(n / (n - 1)) * student_t.ppf((1 + level) / 2, n - 1)))


def _random_signs(n: int, n_resamples: int, seed: int):
    rng = np.random.default_rng(seed)
    for size in _blocks(n, n_resamples):
        yield rng.integers(0, 2, size=(size, n), dtype=np.int8) * 2.0 - 1.0


def _all_signs(n: int):
    patterns = np.arange(2**n)[:, None] >> np.arange(n)
    yield (patterns & 1) * 2.0 - 1.0
