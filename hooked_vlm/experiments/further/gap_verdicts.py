"""What Q7's numbers allow to be said: of each gap between the objects, and of the gaps together."""

from collections.abc import Mapping, Sequence

import pandas as pd

from hooked_vlm.errors import counted
from hooked_vlm.experiments import verdicts
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import CHANCE
from hooked_vlm.experiments.further.close_objects import EDGES, READINGS
from hooked_vlm.experiments.tables import format_interval, format_names, select
from hooked_vlm.experiments.verdicts import Judgement, agreement, judge, sentence


BOTH = "both edges"
DIFFERENCE, SURPLUS = "relative - absolute", "relative, three - one"
CONTROL = "control, centre"
ACCURACY = "accuracy, claim"
MOSTLY = 0.5
"""The share of the control's tokens that must be read as their place."""
NAMES = {
    "horizontal": {EDGES["start"]: "left edge", EDGES["end"]: "right edge"},
    "vertical": {EDGES["start"]: "top edge", EDGES["end"]: "bottom edge"},
}


def apart(gap: int) -> str:
    """Returns how far apart objects stand, in words."""
    return f"{counted(gap, 'token')} apart"


def adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with the p-values of the main claims adjusted over all axes and gaps.

    The claims of each single probe are a family of their own.
    """
    main = (table["quantity"] == DIFFERENCE) & (table["kind"] == BOTH)
    return verdicts.adjusted(table, main, ["probe"])


def verdict(table: pd.DataFrame, gaps: Sequence[int]) -> str:
    measured = [int(gap) for gap in dict.fromkeys(table["gap"].dropna())]
    parts = []
    for axis in dict.fromkeys(table["axis"]):
        here = select(table, axis=axis)
        own = {gap: here[here["gap"].isna() | (here["gap"] == gap)] for gap in measured}
        findings = {gap: found(_means(rows)) for gap, rows in own.items()}
        parts.append(f"{axis}: {over_gaps(findings)}")
        for gap, rows in own.items():
            parts.append(f"{axis}, objects {apart(gap)}: {_of_gap(rows, axis, findings[gap])}")
    missing = [gap for gap in sorted(set(gaps)) if gap not in measured]
    if missing:
        parts.append(
            f"not tested: objects {format_names([apart(gap) for gap in missing])}; there they do "
            "not fit, or none of them leaves the strip of its order"
        )
    return "\n".join(map(sentence, parts))


WORDS = {1: "mostly relative", -1: "mostly absolute"}


def over_gaps(findings: Mapping[int, Judgement]) -> str:
    """Returns what the gaps show together; no gap speaks for another."""
    by_gap = [f"{_outcome(found)} {apart(gap)}" for gap, found in findings.items()]
    if {found.sign for found in findings.values()} >= {1, -1}:
        return (
            f"the answer differs with the gap between the objects: {', '.join(by_gap)} (other "
            "objects leave their strips at other gaps, so this need not be the gap's doing)"
        )
    return f"by gap between the objects: {', '.join(by_gap)}"


def _outcome(found: Judgement) -> str:
    """Returns an outcome in a few words, without its reason."""
    if found.outcome == "found":
        return WORDS[found.sign]
    if found.outcome == "not found":
        return "as much relative as absolute"
    return "undecided"


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows that are not about a single probe or object."""
    return rows[rows["probe"].isna() & rows["place"].isna()]


def _of_gap(here: pd.DataFrame, axis: str, finding: Judgement) -> str:
    means, probes = _means(here), here.dropna(subset="probe")
    shares = _shares_in_words(select(means, shown="three", kind=BOTH))
    edges = [
        f"{NAMES[axis][label]}: {_shares_in_words(select(means, shown='three', kind=label))}"
        for label in EDGES.values()
    ]
    alone = select(means, shown="alone", kind=BOTH, quantity="relative").iloc[0]
    control = select(means, quantity=CONTROL).iloc[0]
    each = [judge(row) for _, row in probes.iterrows()]
    same = agreement(finding.finding, [own.finding for own in each])
    if finding.outcome == "undecided":
        words = f"undecided whether relative or absolute: {finding.reason}"
    else:
        words = f"the code is {_outcome(finding)}"
        if finding.outcome == "not found":
            words += f" ({finding.reason})"
        if same:
            words += f" ({same})"
    return (
        f"{words}. Where order and strip differ, tokens are read as {shares}; {'; '.join(edges)}. "
        f"Alone at the same cells, an object is read as the relative place in "
        f"{format_interval(alone)}; control in the centre {format_interval(control)}"
    )


def _shares_in_words(rows: pd.DataFrame) -> str:
    shares = rows.set_index("quantity")
    return ", ".join(f"{reading} {format_interval(shares.loc[reading])}" for reading in READINGS)


def found(means: pd.DataFrame) -> Judgement:
    """Returns whether the relative reading outweighs the absolute one, or the reverse."""
    both = select(means, kind=BOTH)
    row = select(both, quantity=DIFFERENCE).iloc[0]
    reason = _unclean(means)
    found = judge(row, unless=reason)
    if not found.above:
        return found
    surplus = judge(select(both, quantity=SURPLUS).iloc[0])
    if surplus.above:
        return found
    return judge(row, unless=f"one object alone is read nearly so (three - one {surplus.reason})")


def _unclean(means: pd.DataFrame) -> str:
    """Returns the reason for which the readings at the edges say nothing, or ''."""
    accuracy = judge(select(means, quantity=ACCURACY).iloc[0])
    if not accuracy.above:
        return f"the probe does not read the order of usual pictures ({accuracy.reason})"
    control = judge(select(means, quantity=CONTROL).iloc[0], least=0.0)
    if not control.above:
        return f"the control in the centre is not read correctly ({control.reason})"
    other = select(means, shown="three", kind=BOTH, quantity="other").iloc[0]
    if other["value"] > CHANCE:
        return f"many tokens are read as neither ({format_interval(other)})"
    edges = select(means, quantity=DIFFERENCE)
    signs = {label: judge(select(edges, kind=label).iloc[0]) for label in EDGES.values()}
    if {judgement.sign for judgement in signs.values()} == {1, -1}:
        sides = "; ".join(f"{label} {j.reason}" for label, j in signs.items())
        return f"the edges differ (relative - absolute: {sides})"
    return ""
