"""Measures the models of the study, and puts recipes and claims of the paper in one table.

    python -m training.measure --out study

Each model's experiments are run once: their tables and verdicts go to `OUT/<model>/measured/`.
What counts as shown is stated in docs/experiments/what-makes-strips.md, which was written before
any model was measured.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments.dual_mechanisms import ordering_probes, strip_swap
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import ORDER
from hooked_vlm.experiments.dual_mechanisms.swap_regions import strips_of
from hooked_vlm.experiments.dual_mechanisms.swap_under_ablation import CLAIM
from hooked_vlm.experiments.registry import select
from hooked_vlm.experiments.tables import select as rows_of
from hooked_vlm.experiments.verdicts import Outcome, judge
from hooked_vlm.model.vlm import HookedVLM
from training.recipes import RECIPES


PAIRS = 30
MEASURED = {
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
LEAST_ACCURACY = 0.9
"""On held-out colour triples, below which a recipe is not chosen."""
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
        if np.isnan(self.low):
            return f"{mark} ({self.value:.2f})"
        return f"{mark} ({self.value:.2f} [{self.low:.2f}, {self.high:.2f}])"


def _shown(outcome: Outcome, row: pd.Series) -> Shown:
    return Shown(outcome, float(row["value"]), float(row["low"]), float(row["high"]))


def ordering_stage(table: pd.DataFrame) -> Shown:
    """E2: at some slot the ordering answer is found to be the most probable one."""
    claims = rows_of(table, direction="all", quantity="ordering over others")
    judged = [judge(row) for _, row in claims.iterrows()]
    best = claims.sort_values("value").iloc[-1]
    if any(found.above for found in judged):
        return _shown("found", best)
    none = all(found.below or found.outcome == "not found" for found in judged)
    return _shown("not found" if none else "undecided", best)


def in_the_background(table: pd.DataFrame) -> Shown:
    """E3: in both axes the order is read from the background."""
    said = [ordering_probes.finding(rows_of(table, axis=a))[0] for a in sorted(set(table["axis"]))]
    mean = table[table["probe"].isna() & (table["quantity"] == "background")]["value"].mean()
    if all(IN_PAPER in words for words in said):
        return Shown("found", float(mean))
    return Shown("undecided" if any("undecided" in w for w in said) else "not found", float(mean))


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
    """E6: in most directions, objects flip the answer under ablation at a slot above 0."""
    claims = rows_of(table, quantity=CLAIM)
    outcomes: list[Outcome] = []
    for _, own in claims.groupby("direction"):
        judged = {int(row["slot"]): judge(row, least=0.0) for _, row in own.iterrows()}
        flips = [slot for slot, found in judged.items() if found.above]
        if flips and 0 not in flips:
            outcomes.append("found")
        elif not flips and all(found.below for found in judged.values()):
            outcomes.append("not found")
        else:
            outcomes.append("undecided")
    share = float(np.mean([outcome == "found" for outcome in outcomes])) if outcomes else 0.0
    if share > 0.5:
        return Shown("found", share)
    none = np.mean([outcome == "not found" for outcome in outcomes or ["undecided"]]) > 0.5
    return Shown("not found" if none else "undecided", share)


CLAIMS: Mapping[str, tuple[str, Callable[[pd.DataFrame], Shown]]] = {
    "ordering stage": ("E2", ordering_stage),
    "strips in the background": ("E3", in_the_background),
    "strips, not objects": ("E4", strips_not_objects),
    "an order remains": ("E5", order_remains),
    "own order is late": ("E6", own_order_is_late),
}


def measure(folder: Path) -> None:
    """Runs the experiments on a model, but for those that are there."""
    out = folder / "measured"
    out.mkdir(exist_ok=True)
    model = None
    for id_, options in MEASURED.items():
        if (out / f"{id_}.json").exists():
            continue
        model = model or HookedVLM.from_pretrained(str(folder), local_files_only=True)
        experiment = select(id_)
        config = experiment.config(**{"setting": "squares", **options})
        try:
            result = experiment.run(model, config, lambda *_: None)
        except CannotRunError as error:
            said = {"verdict": f"Not measured: {error}", "table": False}
        else:
            result.table.to_csv(out / f"{id_}.csv", index=False)
            said = {"verdict": result.verdict, "table": True}
        part = out / f"{id_}.part"
        part.write_text(json.dumps(said, indent=1) + "\n")
        part.replace(out / f"{id_}.json")
        print(f"{folder.name}: {id_} {said['verdict'].splitlines()[0]}", flush=True)  # noqa: T201


def claims_of(folder: Path) -> dict[str, Shown]:
    """Returns what a measured model shows; a claim whose experiment could not run is left out."""
    found = {}
    for claim, (id_, judged) in CLAIMS.items():
        file = folder / "measured" / f"{id_}.csv"
        if file.exists():
            found[claim] = judged(pd.read_csv(file))
    return found


def held_out_accuracy(folder: Path) -> float:
    """Returns the accuracy at the end of a model's log."""
    return float(pd.read_csv(folder / "training_log.csv")["held_out"].iloc[-1])


def table(out: Path) -> pd.DataFrame:
    """Returns a row for each measured model: recipe, seed, accuracy, and each claim."""
    rows = []
    for name in RECIPES:
        for folder in sorted(out.glob(f"{name}-[0-9]")):
            if not (folder / "measured").exists():
                continue
            found = claims_of(folder)
            rows.append(
                {
                    "recipe": name,
                    "seed": int(folder.name[-1]),
                    "held-out accuracy": held_out_accuracy(folder),
                    **found,
                    "claims shown": sum(shown.outcome == "found" for shown in found.values()),
                }
            )
    return pd.DataFrame(rows)


def chosen(found: pd.DataFrame) -> str:
    """Returns the recipe that the rule chooses, which was written before anything was measured.

    Raises `CannotRunError` where no recipe is accurate enough.
    """
    scores = {}
    for name, own in found.groupby("recipe"):
        if own["held-out accuracy"].min() < LEAST_ACCURACY:
            continue
        apart = [shown.value for shown in own["strips, not objects"] if isinstance(shown, Shown)]
        scores[str(name)] = (own["claims shown"].sum(), float(np.mean(apart)) if apart else -1.0)
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
    arguments = parser.parse_args()
    for name in RECIPES:
        for folder in sorted(arguments.out.glob(f"{name}-[0-9]")):
            if (folder / "training.json").exists():
                measure(folder)
    found = table(arguments.out)
    print(found.to_string(index=False))  # noqa: T201
    if len(found):
        print(f"Chosen: {chosen(found)}")  # noqa: T201


if __name__ == "__main__":
    main()
