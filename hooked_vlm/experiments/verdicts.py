"""Verdicts: what an experiment's numbers allow to be said, in one grammar for all experiments.

A claim is about a mean over pictures: above or below a null value (1/2, or zero for a
difference).  It has one of three outcomes:

* *found*: the interval excludes the null value, the test at this place rejects it, and the
  size is at least one worth naming;
* *not found*: the interval excludes every size worth naming;
* *undecided*: anything else, with the reason: too few pictures, a ceiling, a control that is
  not clean, a size that is clearly not zero and yet below one worth naming.

Intervals and tests are those of `analysis.bounded`, which keep their level for few, skewed,
yes/no and clustered values; so under the null hypothesis at most 5 % of draws give a claim.  What
is compared (slots, kinds) is stated before looking, and tests over several places are adjusted by
Holm: over all slots of a sentence, and over all sentences of a verdict that make the same claim
(of directions, axes, settings).  The paper's claims are met or not met only by what was found.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from hooked_vlm.analysis.bounded import bounded_mean, bounded_test, by_unit
from hooked_vlm.analysis.statistics import holm
from hooked_vlm.errors import counted
from hooked_vlm.experiments.tables import format_interval, interval_rows


Outcome = Literal["found", "not found", "undecided"]

LEAST = 0.1
"""The smallest difference of probabilities or shares that a verdict names, unless it says so."""
ALPHA = 0.05
"""The largest p-value of a claim."""


@dataclass(frozen=True)
class Judgement:
    """The outcome of one claim, and the reason in words."""

    outcome: Outcome
    sign: int
    """Of what was found: 1 above the null value, -1 below; 0 when nothing was found."""
    reason: str
    """The size with its interval; what the data exclude; or why it is undecided."""
    slight: str = ""
    """Of a size that is clearly not zero and yet below one worth naming: so, in words."""

    @property
    def above(self) -> bool:
        """Whether the mean was found to be above the null value."""
        return self.sign > 0

    @property
    def below(self) -> bool:
        """Whether the mean was found to be below the null value."""
        return self.sign < 0

    @property
    def finding(self) -> tuple[Outcome, int]:
        """The outcome and its sign, without the numbers: what two probes may agree on."""
        return self.outcome, self.sign


def claim_rows(
    values: np.ndarray,
    axes: Mapping[str, Sequence[Any]],
    units: Sequence[Hashable],
    seed: int,
    *,
    null: float = 0.0,
    low: float = -1.0,
    high: float = 1.0,
    **columns: Any,
) -> list[dict]:
    """Returns a row for each claim about the means of `values` `[item, *axes]`, for `judge`.

    Items of one unit (questions about one picture) are one observation.  `low` and `high` are the
    bounds of the values.  Column p has the p-values, and p_holm the same adjusted over all rows.
    """
    rows = by_unit(np.asarray(values), units)
    interval = bounded_mean(rows, low=low, high=high, seed=seed)
    p = bounded_test(rows, null, low=low, high=high, seed=seed)
    found = interval_rows(interval, axes, **columns, null=null)
    each = np.atleast_1d(p).ravel()
    numbers = zip(found, each, holm(each), strict=True)
    return [{**row, "p": float(one), "p_holm": float(all_)} for row, one, all_ in numbers]


def claims_over_probes(
    values: np.ndarray, axes: Mapping[str, Sequence[Any]], seed: int, **columns: Any
) -> list[dict]:
    """Returns the claims about the mean over probes of `values` `[probe, picture, *axes]`.

    Then those about each probe by itself (column probe): a verdict says how many agree with it.
    """
    units = range(values.shape[1])
    rows = claim_rows(values.mean(0), axes, units, seed, **columns)
    for probe, own in enumerate(values):
        rows += claim_rows(own, axes, units, seed, **columns, probe=probe)
    return rows


def agreement(finding: Any, each: Sequence[Any]) -> str:
    """Returns how many probes have the finding of their mean, in words; of one probe nothing.

    >>> agreement("read", ["read", "read", "undecided"])
    '2 of 3 probes with other initialisations say the same'
    """
    if len(each) < 2:
        return ""
    same = sum(own == finding for own in each)
    return f"{same} of {len(each)} probes with other initialisations say the same"


def adjusted(table: pd.DataFrame, rows: Any, by: Sequence[str] = ()) -> pd.DataFrame:
    """Returns a table whose column p_holm is adjusted by Holm over some rows.

    Of `rows` (which rows, a boolean series), those with the same values of the columns `by` are
    one family; without columns, all of them are.  Other rows keep theirs.
    """
    if "p" not in table:
        return table
    p = table["p_holm"].copy()
    chosen = table[rows & table["p"].notna()]
    by = [column for column in by if column in table]
    families = chosen.groupby(by, dropna=False) if by else [((), chosen)]
    for _, family in families:
        p[family.index] = holm(family["p"].to_numpy(float))
    return table.assign(p_holm=p)


def judge(row: Any, least: float = LEAST, unless: str = "") -> Judgement:
    """Returns the outcome of a claim from its row of the table.

    `least` is the smallest difference from the null value that counts.  `unless` is a reason that
    leaves it undecided whatever the numbers are, such as a control that is not clean.
    """
    value, low, high, null = (float(row[name]) for name in ("value", "low", "high", "null"))
    n = int(row["n"])
    if unless:
        return Judgement("undecided", 0, unless)
    if not np.isfinite([value, low, high]).all():
        return Judgement("undecided", 0, f"no number from {counted(n, 'picture')}")
    is_clear = float(row["p_holm"]) <= ALPHA and not low <= null <= high
    if is_clear and abs(value - null) >= least:
        return Judgement("found", 1 if value > null else -1, format_interval(row))
    if null - least < low and high < null + least:
        excluded = max(abs(low - null), abs(high - null))
        reason = f"{format_interval(row)}: {counted(n, 'picture')} exclude more than {excluded:.2f}"
        return Judgement("not found", 0, reason)
    reason = f"{format_interval(row)} from {counted(n, 'picture')}"
    if is_clear:
        side = "above" if value > null else "below"
        slight = f"{side} {null:g}, by less than the {least:g} that counts"
        return Judgement("undecided", 0, f"{reason}: {slight}", slight)
    return Judgement("undecided", 0, reason)


def sentence(words: str) -> str:
    """Returns words as a sentence: a capital first and a full stop last."""
    return f"{words[0].upper()}{words[1:]}" + ("" if words.endswith(".") else ".")


FEW_PAIRS = (
    "fewer than two pairs are left there, whose two pictures the model answers correctly and whose "
    "scores are numbers"
)


def not_tested(
    directions: Sequence[str], tested: Sequence[str], part: str = "", why: str = FEW_PAIRS
) -> list[str]:
    """Returns a sentence on directions without enough pairs, if there are any.

    `part` is that of the experiment in which they are missing, `why` the reason in words.
    """
    missing = [direction for direction in directions if direction not in tested]
    if not missing:
        return []
    where = ", ".join(filter(None, ["Not tested", part]))
    return [f"{where}: {', '.join(missing)}; {why}."]
