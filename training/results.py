"""Writes what the models of the study show into its page.

    python -m training.results --out training/runs

The page docs/experiments/what-makes-strips.md has the tables between two marks; all else of it is
written by hand.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from hooked_vlm.disk.files import write_file
from hooked_vlm.errors import CannotRunError
from training.measure import ACCURACY, CLAIMS, chosen, differ, swaps, table
from training.recipes import RECIPES, SEEDS


PAGE = Path("docs/experiments/what-makes-strips.md")
SWAPS = {
    None: "What swaps do (E4): the probability of the mirrored picture's answer, mean over the "
    "early slots, when these tokens of the two pictures are exchanged.",
    0: "The same at slot 0, before the language model's first block has moved anything.",
}
"""By slot (None: the early ones): what is said above a table of swaps."""
BESIDE = (
    "Recipes beside the one that they vary, where both seeds of both are measured: the claims in "
    "which neither seeds nor intervals overlap."
)
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def tables(found: pd.DataFrame, swapped: Mapping[int | None, pd.DataFrame]) -> str:
    """Returns the results in Markdown: claims, E4's swaps, which recipes differ, and the choice.

    `found` is `measure.table`'s, `swapped` has those of `measure.swaps` for `SWAPS`.  Recipes are
    compared with the one that they vary, where both seeds of both are measured.
    """
    head = ["recipe", "seed", "accuracy", *CLAIMS, "claims shown"]
    lines = [
        [f"`{row['recipe']}`", row["seed"], f"{row[ACCURACY]:.2f}"]
        + [row[claim] for claim in CLAIMS]
        + [row["claims shown"]]
        for _, row in found.iterrows()
    ]
    parts = [_markdown(head, lines)]
    for slot, rows in swapped.items():
        if len(rows):
            named = rows.assign(recipe=[f"`{name}`" for name in rows["recipe"]])
            parts += [SWAPS[slot], _markdown([*named], named.to_numpy().tolist())]
    if compared := differences(found):
        parts += [BESIDE, _markdown(["recipe", "beside", "differs in"], compared)]
    try:
        parts.append(f"The rule chooses `{chosen(found)}`.")
    except CannotRunError as error:
        parts.append(f"The rule chooses none yet. {error}")
    return "\n\n".join(parts)


def differences(found: pd.DataFrame) -> list[list[str]]:
    """Returns for each measured recipe the one that it varies, and the claims that differ."""
    by_recipe = {str(name): own for name, own in found.groupby("recipe") if len(own) == len(SEEDS)}
    rows = []
    for name in RECIPES:
        base = "end-to-end" if name.startswith("end-to-end-") else "captions"
        if name == base or not {name, base} <= set(by_recipe):
            continue
        one, other = by_recipe[name], by_recipe[base]
        claims = [claim for claim in CLAIMS if differ(list(one[claim]), list(other[claim]))]
        rows.append([f"`{name}`", f"`{base}`", ", ".join(claims) or "nothing"])
    return rows


def _markdown(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_into(page: Path, text: str) -> None:
    """Replaces what is between the marks of a page; raises `ValueError` where it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"'{page}' lacks the marks {BEGIN} and {END}.")
    write_file(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    """Parses the command line and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    swapped = {slot: swaps(arguments.out, slot) for slot in SWAPS}
    write_into(arguments.page, tables(table(arguments.out), swapped))


if __name__ == "__main__":
    main()
