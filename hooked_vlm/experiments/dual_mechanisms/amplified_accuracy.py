"""From answers under amplification to numbers and a verdict: what E7 and R2 share.

Accuracy, corrected and broken answers at every strength; the change at a strength that was chosen
on other pictures; and each formula against its own random directions.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from hooked_vlm.analysis.bounded import by_unit
from hooked_vlm.analysis.statistics import Interval, wilson
from hooked_vlm.errors import counted
from hooked_vlm.experiments.answers import KINDS, OTHER
from hooked_vlm.experiments.tables import format_interval, interval_rows, mean_interval, select
from hooked_vlm.experiments.verdicts import (
    ALPHA,
    adjusted,
    agreement,
    claim_rows,
    judge,
    sentence,
)


FORMULAS = ("written, first", "written, last", "released", "orthonormal")
CONTROLS = ("random, same norms", "random, same energy", "random, orthonormal", "random, written")
CONTROL_OF = {
    "released": "random, same energy",
    "orthonormal": "random, orthonormal",
    "written, first": "random, written",
    "written, last": "random, written",
}
"""The random directions with which the verdict compares each formula."""
LEAST = 0.05
"""The smallest change of accuracy that the verdict names."""
FEWEST_CONTROLS = 20
"""Random directions below which the verdict is undecided: their rank is then no test at 0.05."""
FEWEST_ERRORS = 5
"""Pictures with an ordering error below which amplified order has nothing to repair."""
Outcomes = Mapping[str, Bool[np.ndarray, "seed alpha item"]]
"""Kind -> whether each answer is right; formulas have one seed."""


def table_of(
    right: Outcomes,
    pictures: Sequence[Hashable],
    alphas: Sequence[float],
    seed: int,
    kinds: Bool[np.ndarray, "item kind"] | None = None,
    again: Sequence[Outcomes] = (),
) -> pd.DataFrame:
    """Returns each kind's accuracy and changes at every strength, and at the chosen ones.

    The first of `alphas` is 0: without amplification.
    `pictures` has the picture of each item: two questions about one are one observation.  `kinds`
    are what the answers name without amplification (see `answers`).  `again` are the formulas with
    directions of other probes, for which the claims are repeated (column probe).
    """
    rows: list[dict] = []
    changes: dict[str, np.ndarray] = {}
    for kind, verdicts in right.items():
        share = verdicts.mean(0)  # over seeds
        base = share[0]  # alpha 0
        wrong = {"corrected": base < 0.5}
        if kinds is not None:
            wrong["corrected, order"] = wrong["corrected"] & kinds[:, OTHER]
        for alpha, now in zip(alphas, share, strict=True):
            for quantity, interval in _changes(base, now, wrong, pictures, seed).items():
                rows += interval_rows(
                    interval, {}, direction="all", kind=kind, alpha=alpha, quantity=quantity
                )
        changes[kind] = _held_out(verdicts, pictures, seed)
        best = int(share.mean(1).argmax())
        for quantity, values, alpha in (
            ("net, held-out alpha", changes[kind].mean(0), float("nan")),
            ("net, best alpha", share[best] - base, alphas[best]),
        ):
            interval = _mean(values, pictures, seed)
            rows += interval_rows(
                interval, {}, direction="all", kind=kind, alpha=alpha, quantity=quantity
            )
    rows += _against_random(changes, pictures, seed)
    for probe, own in enumerate([right, *again] if again else ()):
        of_probe = {k: _held_out(own[k], pictures, seed) for k in FORMULAS}
        rows += _against_random({**changes, **of_probe}, pictures, seed, probe=probe)
    if kinds is not None:
        for name, column in zip(KINDS, kinds.T, strict=True):
            interval = _mean(column.astype(float), pictures, seed)
            rows += interval_rows(interval, {}, direction="all", kind="baseline", quantity=name)
    table = pd.DataFrame(rows)
    return adjusted(table, table["p"].notna(), ["quantity", "probe"])  # over formulas


def _held_out(
    right: Bool[np.ndarray, "seed alpha item"],
    pictures: Sequence[Hashable],
    seed: int,
) -> Float[np.ndarray, "seed item"]:
    """Returns each item's change at the strength chosen on other pictures, by seed."""
    base = right.mean(0)[0]
    return np.stack([held_out_change(own, base, pictures, seed) for own in right.astype(float)])


def _mean(values: np.ndarray, pictures: Sequence[Hashable], seed: int) -> Interval:
    return mean_interval(by_unit(values, pictures), seed)


def _against_random(
    changes: Mapping[str, np.ndarray], pictures: Sequence[Hashable], seed: int, **columns: Any
) -> list[dict]:
    """Returns the claims of the verdict: each formula's change, and that beyond random ones."""
    rows: list[dict] = []
    for kind, control in CONTROL_OF.items():
        own = changes[kind].mean(0)
        about: dict[str, Any] = {"direction": "all", "kind": kind, **columns}
        rows += claim_rows(own, {}, pictures, seed, quantity="net, claim", **about)
        if control not in changes:
            continue
        random_ = changes[control]
        difference = own - random_.mean(0)
        rows += claim_rows(difference, {}, pictures, seed, quantity="real - random", **about)
        p = (1 + int((random_.mean(1) >= own.mean()).sum())) / (1 + len(random_))
        rows.append(
            {**about, "quantity": "p, random", "value": p, "low": p, "high": p, "n": len(random_)}
        )
    return rows


def _changes(
    base: np.ndarray,
    now: np.ndarray,
    wrong: Mapping[str, np.ndarray],
    pictures: Sequence[Hashable],
    seed: int,
) -> dict[str, Interval]:
    """Returns accuracy, net change, and shares corrected and broken where there are any."""
    found = {
        "accuracy": _share(now, pictures),
        "net": _mean(now - base, pictures, seed),
    }
    for name, those in wrong.items():
        if those.any():
            found[name] = _share(now, pictures, those)
    right = base >= 0.5
    if right.any():
        found["broken"] = _share(1 - now, pictures, right)
    return found


def _share(
    values: np.ndarray, pictures: Sequence[Hashable], those: np.ndarray | None = None
) -> Interval:
    """Returns Wilson's interval of the mean over pictures of some items' values."""
    every = np.ones(len(values), dtype=bool)
    chosen = np.flatnonzero(every if those is None else those).tolist()
    means = by_unit(values[chosen], [pictures[i] for i in chosen])
    return wilson(float(means.sum()), len(means))


def held_out_change(
    share: Float[np.ndarray, "alpha item"],
    base: Float[np.ndarray, " item"],
    pictures: Sequence[Hashable],
    seed: int,
) -> Float[np.ndarray, " item"]:
    """Returns each item's change at the strength that is best for the *other* half of the pictures.

    Halves are drawn with the seed, and all questions about a picture are in one half; of equal
    strengths the first counts.
    """
    names = list(dict.fromkeys(pictures))
    chosen = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    first = {names[i] for i in chosen}
    half = np.array([picture in first for picture in pictures], dtype=int)
    change = np.zeros(len(base))
    for side in (0, 1):
        if not (half != side).any():
            continue
        best = int(share[:, half != side].mean(1).argmax())
        change[half == side] = (share[best] - base)[half == side]
    return change


def verdict_of(table: pd.DataFrame) -> str:
    """Returns in words how amplification changes accuracy, compared with random directions."""
    accuracy = select(table, kind="released", quantity="accuracy", alpha=0.0).iloc[0]
    parts = [f"Accuracy without amplification {format_interval(accuracy)}"]
    errors = _baseline(table)
    if errors is not None:
        parts[0] += f"; answers name {errors}"
    corrected = select(table, kind="released", quantity="corrected, order")
    n_errors = int(corrected["n"].iloc[0]) if len(corrected) else 0
    nothing = ""
    if select(table, kind="released", quantity="corrected").empty:
        nothing = "nothing to correct: every answer is right without amplification"
    elif errors is not None and n_errors < FEWEST_ERRORS:
        nothing = (
            f"{counted(n_errors, 'picture')} with an ordering error: the other wrong answers are "
            "of names, which amplified order cannot repair"
        )
    for kind in FORMULAS:
        held, best = (_net(table, kind, q) for q in ("held-out alpha", "best alpha"))
        parts.append(
            f"{kind}: {_finding(table, kind, nothing)}. Accuracy changes by "
            f"{format_interval(held)} with alpha chosen on other pictures, by "
            f"{format_interval(best)} with the best alpha ({best['alpha']:g})"
            + _beside_random(table, kind)
        )
    return "\n".join(map(sentence, parts))


def _baseline(table: pd.DataFrame) -> str | None:
    rows = select(table, kind="baseline")
    if rows.empty:
        return None
    return ", ".join(f"{row['quantity']} {row['value']:.2f}" for _, row in rows.iterrows())


def _beside_random(table: pd.DataFrame, kind: str) -> str:
    rows = select(table, kind=CONTROL_OF[kind], quantity="net, held-out alpha")
    if rows.empty:
        return ""
    return f"; random directions {format_interval(rows.iloc[0])}"


def _finding(table: pd.DataFrame, kind: str, nothing: str) -> str:
    """Returns whether a formula improves accuracy more than random directions do, in words.

    Then how many probes alone give the same outcome.
    """
    if nothing:
        return f"undecided: {nothing}"
    here = select(table, kind=kind)
    probes = here["probe"] if "probe" in here else pd.Series(np.nan, here.index)
    said, reason = _outcome(here[probes.isna()].set_index("quantity"))
    each = [_outcome(own.set_index("quantity"))[0] for _, own in here.groupby(probes)]
    more = filter(None, [reason, agreement(said, each)])
    return f"{said} ({'; '.join(more)})" if reason else said


def _outcome(here: Any) -> tuple[str, str]:
    """Returns the outcome for one formula in words, and the size that it rests on."""
    if "real - random" not in here.index:
        return "undecided: no random directions were tried", ""
    n = int(here.loc["p, random", "n"])
    own, beyond = judge(here.loc["net, claim"], LEAST), judge(here.loc["real - random"], LEAST)
    if n < FEWEST_CONTROLS:
        said = f"undecided: {counted(n, 'random direction')}, and {FEWEST_CONTROLS} are needed"
        return said, ""
    if own.above and beyond.above and here.loc["p, random", "value"] <= ALPHA:
        beyond_them = f"{beyond.reason} beyond them"
        return "improves accuracy, more than random directions do", beyond_them
    if own.outcome == "not found" or own.below:
        return "does not improve accuracy", own.reason
    if beyond.outcome == "not found" or beyond.below:
        return "improves accuracy no more than random directions do", beyond.reason
    said = "undecided whether it improves accuracy beyond random directions"
    return said, beyond.reason


def _net(table: pd.DataFrame, kind: str, alpha: str) -> pd.Series:
    return select(table, kind=kind, quantity=f"net, {alpha}").iloc[0]
