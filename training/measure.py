"""Measures the models of the study, and puts recipes and claims of the paper in one table.

    python -m training.measure --out training/runs

Each model's experiments are run once: their tables and verdicts go to `OUT/<model>/measured/`.
What counts as shown is stated in docs/experiments/what-makes-strips.md, which was written before
any model was measured.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.disk.files import write_file
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments.dual_mechanisms import ordering_probes, strip_swap
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import ORDER
from hooked_vlm.experiments.dual_mechanisms.swap_regions import strips_of
from hooked_vlm.experiments.dual_mechanisms.swap_under_ablation import CLAIM
from hooked_vlm.experiments.registry import select
from hooked_vlm.experiments.tables import format_interval
from hooked_vlm.experiments.tables import select as rows_of
from hooked_vlm.experiments.verdicts import Outcome, judge
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.prompts import DIRECTIONS
from training.batches import Encoder
from training.recipes import RECIPES, SEEDS
from training.study import accuracy


PAIRS = 30
MEASURED: Mapping[str, Mapping[str, Any]] = {
    "E1": {},
    "E2": {"pairs": PAIRS},
    "E3": {},
    "E4": {"pairs": PAIRS},
    "E5": {},
    "E6": {"pairs": PAIRS},
    "E7": {"setting": "squares-photos"},
    "Q5": {"pairs": PAIRS},
    "Q8": {},
}
"""The experiments, with what differs from their defaults; the setting is squares."""
ACCURACY = "held-out accuracy"
QUESTIONS = 480
LEAST_ACCURACY = 0.75
"""On squares of held-out colour triples, below which a recipe is not chosen."""
IN_PAPER = "from the background, as in the paper"


@dataclass(frozen=True)
class Shown:
    """One claim on one model: its outcome, and the number that it rests on."""

    outcome: Outcome
    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        mark = {"found": "yes", "not found": "no", "undecided": "?"}[self.outcome]
        if np.isnan(self.value):
            return mark
        if np.isnan(self.low):
            return f"{mark} ({self.value:.2f})"
        return f"{mark} ({self.value:.2f} [{self.low:.2f}, {self.high:.2f}])"


def _shown(outcome: Outcome, row: pd.Series) -> Shown:
    return Shown(outcome, float(row["value"]), float(row["low"]), float(row["high"]))


def ordering_stage(table: pd.DataFrame) -> Shown:
    """E2: at some slot the ordering answer is found to be the most probable one."""
    claims = rows_of(table, direction="all", quantity="ordering over others").sort_values("value")
    judged = [judge(row) for _, row in claims.iterrows()]
    best = claims.iloc[-1]
    for found, (_, row) in reversed(list(zip(judged, claims.iterrows(), strict=True))):
        if found.above:
            return _shown("found", row)
    none = all(found.below or found.outcome == "not found" for found in judged)
    return _shown("not found" if none else "undecided", best)


def in_the_background(table: pd.DataFrame) -> Shown:
    """E3: in both axes the order is read from the background."""
    said = [ordering_probes.finding(rows_of(table, axis=a))[0] for a in sorted(set(table["axis"]))]
    mean = table[table["probe"].isna() & (table["quantity"] == "background")]["value"].mean()
    if all(IN_PAPER in words for words in said):
        return Shown("found", float(mean))
    # One axis that clearly does not decides it, whatever the other does.
    against = any(IN_PAPER not in words and "undecided" not in words for words in said)
    return Shown("not found" if against else "undecided", float(mean))


def strips_not_objects(table: pd.DataFrame) -> Shown:
    """E4: over the early slots strips flip the answer, objects do not, and strips do so more."""
    every = rows_of(table, direction="all", quantity=strip_swap.EARLY).set_index("kind")
    strips = strips_of([str(kind) for kind in every.index if kind != "strip - object"])
    strip, inside = (judge(every.loc[kind], least=0.0) for kind in (strips, "object"))
    apart = judge(every.loc["strip - object"])
    row: pd.Series = every.loc["strip - object"]  # type: ignore[assignment]
    if strip.above and inside.below and apart.above:
        return _shown("found", row)
    against = strip.below or inside.above or apart.below or apart.outcome == "not found"
    return _shown("not found" if against else "undecided", row)


def order_remains(table: pd.DataFrame) -> Shown:
    """E5: an order remains after the encoder's is removed."""
    (_, row), *_ = rows_of(table, direction="all", kind="removed", quantity=ORDER).iterrows()
    found = judge(row)
    if found.above:
        return _shown("found", row)
    none = found.below or found.outcome == "not found"
    return _shown("not found" if none else "undecided", row)


def own_order_is_late(table: pd.DataFrame) -> Shown:
    """E6: in most of the four directions, objects flip the answer under ablation above slot 0.

    A direction without enough pairs is undecided.
    """
    outcomes: dict[str, Outcome] = dict.fromkeys(DIRECTIONS, "undecided")
    claims = rows_of(table, quantity=CLAIM) if len(table) else table
    for direction, own in claims.groupby("direction") if len(claims) else ():
        judged = {int(row["slot"]): judge(row, least=0.0) for _, row in own.iterrows()}
        flips = [slot for slot, found in judged.items() if found.above]
        if flips and 0 not in flips:
            outcomes[str(direction)] = "found"
        elif not flips and all(found.below for found in judged.values()):
            outcomes[str(direction)] = "not found"
    shares = {o: list(outcomes.values()).count(o) / len(outcomes) for o in set(outcomes.values())}
    for outcome in ("found", "not found"):
        if shares.get(outcome, 0.0) > 0.5:
            return Shown(outcome, shares.get("found", 0.0))
    return Shown("undecided", shares.get("found", 0.0))


CLAIMS: Mapping[str, tuple[str, Callable[[pd.DataFrame], Shown]]] = {
    "ordering stage": ("E2", ordering_stage),
    "strips in the background": ("E3", in_the_background),
    "strips, not objects": ("E4", strips_not_objects),
    "an order remains": ("E5", order_remains),
    "own order is late": ("E6", own_order_is_late),
}


def measure(folder: Path) -> None:
    """Runs the experiments on a model, but for those that are there, and its accuracy."""
    out = folder / "measured"
    out.mkdir(exist_ok=True)
    waiting = [id_ for id_ in (ACCURACY, *MEASURED) if not (out / f"{id_}.json").exists()]
    if not waiting:
        return
    model = HookedVLM.from_pretrained(str(folder), local_files_only=True)
    for id_ in waiting:
        if id_ == ACCURACY:
            rng = random.Random("held out")
            right = accuracy(model.hf_model, Encoder(model.processor), rng, n=QUESTIONS)
            _write(out, id_, {"verdict": f"{right:.4f}", "table": False})
            continue
        found = select(id_)
        config = found.config(**{"setting": "squares", **MEASURED[id_]})
        try:
            result = found.run(model, config, lambda *_: None)
        except CannotRunError as error:
            _write(out, id_, {"verdict": f"Not measured: {error}", "table": False})
            continue
        if len(result.table):
            result.table.to_csv(out / f"{id_}.csv", index=False)
        _write(out, id_, {"verdict": result.verdict, "table": bool(len(result.table))})


def _write(out: Path, id_: str, found: dict[str, Any]) -> None:
    write_file(out / f"{id_}.json", json.dumps(found, indent=1) + "\n")
    print(f"{out.parent.name}: {id_} {found['verdict'].splitlines()[0]}", flush=True)  # noqa: T201


def claims_of(folder: Path) -> dict[str, Shown]:
    """Returns what a measured model shows.

    Of an experiment that could not run, or has no numbers, the claim is undecided.
    """
    found = {}
    for claim, (id_, judged) in CLAIMS.items():
        about = json.loads((folder / "measured" / f"{id_}.json").read_text())
        if about["table"]:
            found[claim] = judged(pd.read_csv(folder / "measured" / f"{id_}.csv"))
        else:
            found[claim] = Shown("undecided", float("nan"))
    return found


def table(out: Path) -> pd.DataFrame:
    """Returns a row for each model that is measured: recipe, seed, accuracy, and each claim."""
    rows = []
    for name, seed in product(RECIPES, SEEDS):
        folder = out / f"{name}-{seed}" / "measured"
        if not all((folder / f"{id_}.json").exists() for id_ in (ACCURACY, *MEASURED)):
            continue
        found = claims_of(folder.parent)
        accurate = json.loads((folder / f"{ACCURACY}.json").read_text())["verdict"]
        shown = sum(each.outcome == "found" for each in found.values())
        about = {"recipe": name, "seed": seed, ACCURACY: float(accurate)}
        rows.append({**about, **found, "claims shown": shown})
    return pd.DataFrame(rows)


SWAPPED = {"strip": "strips", "object": "objects", "background": "strips without objects"}
"""Regions that E4 exchanges, and what they are in words."""


def swaps(out: Path, slot: int | None = None) -> pd.DataFrame:
    """Returns a row for each measured model: what E4's swaps do at a slot (default: early ones).

    Columns are recipe, seed and those of `SWAPPED`: the probability of the swapped answer, all
    directions together, with its 95 % interval.
    """
    where: dict[str, Any] = {"quantity": "swapped", "slot": slot}
    if slot is None:
        where = {"quantity": strip_swap.EARLY}
    rows = []
    for name, seed in product(RECIPES, SEEDS):
        file = out / f"{name}-{seed}" / "measured" / "E4.csv"
        if not file.exists():
            continue
        found = rows_of(pd.read_csv(file), direction="all", **where)
        by_kind = found.set_index("kind")
        told = {words: format_interval(by_kind.loc[kind]) for kind, words in SWAPPED.items()}
        rows.append({"recipe": name, "seed": seed, **told})
    return pd.DataFrame(rows)


def differ(one: Sequence[Shown], other: Sequence[Shown]) -> bool:
    """Whether two recipes differ in a number: all seeds of one on one side of all of the other.

    Where numbers have intervals, these must not overlap either.
    """

    def bounds(shown: Shown) -> tuple[float, float]:
        is_exact = np.isnan(shown.low)
        return (shown.value, shown.value) if is_exact else (shown.low, shown.high)

    lows, highs = ([bounds(s)[i] for s in one] for i in (0, 1))
    low, high = ([bounds(s)[i] for s in other] for i in (0, 1))
    return max(highs) < min(low) or max(high) < min(lows)


def chosen(found: pd.DataFrame) -> str:
    """Returns the recipe that the rule chooses, which was written before anything was measured.

    Raises `CannotRunError` where a recipe is not measured with every seed, and where none is
    accurate enough.
    """
    done = found.groupby("recipe").size() if len(found) else pd.Series(dtype=int)
    missing = [name for name in RECIPES if done.get(name, 0) < len(SEEDS)]
    if missing:
        raise CannotRunError(
            f"Not measured with every seed: {', '.join(missing)}. The rule chooses among all."
        )
    scores = {}
    for name, own in found.groupby("recipe"):
        if own[ACCURACY].min() < LEAST_ACCURACY:
            continue
        apart = [shown.value for shown in own["strips, not objects"]]
        scores[str(name)] = (own["claims shown"].sum(), float(np.nan_to_num(apart, nan=-1).mean()))
    if not scores:
        raise CannotRunError(
            f"No recipe has an accuracy of {LEAST_ACCURACY} in every seed, so none is chosen."
        )
    return max(scores, key=lambda name: scores[name])


def main() -> None:
    """Measures every finished model and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=list(RECIPES), action="append")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append")
    arguments = parser.parse_args()
    for name, seed in product(arguments.recipe or RECIPES, arguments.seed or SEEDS):
        if (arguments.out / f"{name}-{seed}" / "training.json").exists():
            measure(arguments.out / f"{name}-{seed}")
    found = table(arguments.out)
    print(found.to_string(index=False))  # noqa: T201
    try:
        print(f"Chosen: {chosen(found)}")  # noqa: T201
    except CannotRunError as error:
        print(error)  # noqa: T201


if __name__ == "__main__":
    main()
