"""The last table: what was predicted beside what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any


HEAD = "| what | predicted | measured | ratio | goal | verdict |\n|---|---:|---:|---:|---:|---|"
TINY = (
    "**Tiny shapes, for trying the program out: no figure here says anything about a GPU, "
    "and predictions are for one.**"
)


def table(
    before: Mapping[str, Any],
    again: Mapping[str, float] | None,
    parts: Sequence[Mapping[str, Any]],
    tiny: bool,
) -> str:
    """Returns the table as Markdown, with a line for each part above its rows.

    `before` is what predictions.json holds and `again` what this machine's own rates predict.
    """
    first, goals = before["predicted"], goals_of(before["counted"])
    lines = ["# benchmarks.gpu", ""]
    if tiny:
        lines += [TINY, ""]
    arrow = "; after an arrow is what the rates of part 0 predict" if again else ""
    lines.append(
        f"*Predicted* was written before anything was measured{arrow}. *Ratio* is measured ÷ "
        "predicted (the last one)."
    )
    for part in parts:
        title = f"{part['number']} {part['name']}: {part['status']}, {part['seconds']:.0f} s"
        lines += ["", f"**{title}**", "", HEAD]
        lines += [
            _line(row, first, again or first, goals.get(row["what"], {})) for row in part["rows"]
        ]
        shown = {row["what"] for row in part["rows"]}
        missing = [
            each
            for each in before["counted"]
            if each["part"] == part["name"] and each["what"] not in shown
        ]
        lines += [
            f"| {each['what']} | {shown_number(first[each['what']])} | | | | not measured |"
            for each in missing
        ]
    return "\n".join(lines) + "\n"


def goals_of(counted: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the goals that were set with the predictions, by what they are of."""
    return {
        each["what"]: {key: each[key] for key in ("least", "most") if key in each}
        for each in counted
    }


def _line(
    row: Mapping[str, Any],
    first: Mapping[str, float],
    last: Mapping[str, float],
    goal: Mapping[str, float],
) -> str:
    what, value = row["what"], row["value"]
    goal = {key: row[key] for key in ("least", "most") if key in row} or goal
    cells = [what, _predicted(first.get(what), last.get(what)), shown_number(value)]
    expected = last.get(what)
    is_number = isinstance(value, int | float)
    cells.append(f"{value / expected:.2f}" if expected and is_number else "")
    cells.append(", ".join(f"at {key} {shown_number(bound)}" for key, bound in goal.items()))
    said = verdict(row, goal)
    cells.append(f"{said} ({row['note']})" if row.get("note") else said)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def verdict(row: Mapping[str, Any], goal: Mapping[str, float]) -> str:
    """Returns whether a row is correct or meets its goal; nothing where it has neither."""
    if "correct" in row:
        return "correct" if row["correct"] else "WRONG"
    value = row["value"]
    if not goal or not isinstance(value, int | float):
        return ""
    met = value >= goal.get("least", float("-inf")) and value <= goal.get("most", float("inf"))
    return "met" if met else "missed"


def _predicted(first: float | None, last: float | None) -> str:
    if first is None:
        return ""
    same = last is None or shown_number(first) == shown_number(last)
    return shown_number(first) if same else f"{shown_number(first)} → {shown_number(last)}"


def shown_number(value: float | str | None) -> str:
    """Returns three digits of a number, and text as it is.

    >>> shown_number(593e12), shown_number(0.06), shown_number(None)
    ('5.93e+14', '0.06', '')
    """
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
