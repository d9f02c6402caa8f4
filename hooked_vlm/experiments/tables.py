"""Makes and selects rows of a result's table, and formats intervals, slots and names."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hooked_vlm.analysis.bounded import bounded_test, by_unit
from hooked_vlm.analysis.statistics import (
    Interval,
    bootstrap,
    holm,
    paired_difference,
    simultaneous,
    wilson,
)


def interval_rows(
    interval: Interval, axes: Mapping[str, Sequence[Any]], **columns: Any
) -> list[dict]:
    """Returns one tidy row per number of an interval whose arrays have the given axes."""
    shape = [len(values) for values in axes.values()]
    numbers = [
        np.broadcast_to(part, shape) for part in (interval.estimate, interval.low, interval.high)
    ]
    rows = []
    for index in np.ndindex(*shape):
        labels = {name: values[i] for (name, values), i in zip(axes.items(), index, strict=True)}
        value, low, high = (float(part[index]) for part in numbers)
        rows.append(
            {**columns, **labels, "value": value, "low": low, "high": high, "n": interval.n}
        )
    return rows


def mean_interval(values: np.ndarray, seed: int) -> Interval:
    """Returns the mean over observations `[unit, ...]` with its bootstrap interval.

    Of one observation there is no interval (NaN).
    """
    if len(values) > 1:
        return bootstrap(values, seed=seed)
    nothing = np.full(values.shape[1:], np.nan)
    return Interval(values.mean(0), nothing, nothing, len(values), 0.95, "none")


def score_rows(
    scores: xr.DataArray, seed: int, units: Sequence[Hashable] | None = None, **columns: Any
) -> list[dict]:
    """Returns one row per number of a sweep's scores, with bootstrap intervals over `pair`.

    With `units`, pairs of one unit are one observation: the mean of their scores.
    """
    scores = scores.transpose("pair", ...)
    axes = {str(axis): scores[axis].values.tolist() for axis in scores.dims[1:]}
    values = scores.values if units is None else by_unit(scores.values, units)
    return interval_rows(mean_interval(values, seed), axes, **columns)


def highest_row(
    values: np.ndarray, slots: Sequence[int], units: Sequence[Hashable], seed: int, **columns: Any
) -> dict:
    """Returns the row of the slot with the highest mean of `values` `[item, slot]`, in [0, 1].

    Its interval holds whichever slot is the highest.  Items of one unit are one observation; of
    one alone there is no interval (NaN).
    """
    means = by_unit(values, units)
    best = int(np.argmax(means.mean(0)))
    if len(means) > 1:
        interval = simultaneous(means, within=(0.0, 1.0), seed=seed)
    else:
        interval = mean_interval(means, seed)
    (row,) = interval_rows(interval.at(best), {}, slot=int(slots[best]), **columns)
    return row


def rate_rows(verdicts: np.ndarray, units: Sequence[Hashable], **columns: Any) -> list[dict]:
    """Returns the row of a rate of yes/no outcomes, with Wilson's interval over units.

    Two questions about one picture are one observation: the mean of its outcomes.
    """
    means = by_unit(np.asarray(verdicts, dtype=float), units)
    return interval_rows(wilson(float(means.sum()), len(means)), {}, **columns)


def difference_rows(
    one: np.ndarray, other: np.ndarray, axes: Mapping[str, Sequence[Any]], seed: int, **columns: Any
) -> list[dict]:
    """Returns the rows of `one` minus `other`, paired along their first axis.

    Column p_holm has the p-values of bounded mean tests, Holm-adjusted over all rows: both are
    probabilities or shares.
    """
    rows = interval_rows(paired_difference(one, other, seed=seed), axes, **columns)
    adjusted = holm(bounded_test(np.asarray(one) - np.asarray(other), seed=seed))
    return [{**row, "p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def select(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Returns the rows of a table that have the given values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def format_interval(row: Any) -> str:
    """Returns a number with its 95 % interval as text.

    >>> format_interval({"value": 0.951, "low": 0.9, "high": 1.0})
    '0.95 [0.90, 1.00]'
    """
    value, low, high = (f"{round(row[name], 2) + 0.0:.2f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def format_range(values: Iterable[float]) -> str:
    """Returns numbers as one number, or as the range from the lowest to the highest.

    >>> format_range([0.5, 0.25]), format_range([0.5])
    ('0.25 to 0.50', '0.50')
    """
    every = list(values)
    ends = [f"{round(end, 2) + 0.0:.2f}" for end in (min(every), max(every))]
    return " to ".join(dict.fromkeys(ends))


def format_slots(slots: Iterable[int]) -> str:
    """Returns slots as text, with runs as ranges.

    >>> format_slots([0, 2, 3, 4])
    'slots 0, 2-4'
    """
    array = np.asarray(sorted(slots), dtype=int)
    if not len(array):
        return "no slot"
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"slot{'s' if len(array) > 1 else ''} {', '.join(names)}"


def format_names(names: Sequence[str]) -> str:
    """Returns names as a list in a sentence.

    >>> format_names(["left", "right", "above"])
    'left, right and above'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
