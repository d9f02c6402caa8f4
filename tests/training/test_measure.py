"""What counts as shown in the study of recipes, on models whose mechanisms are known."""

from typing import Any

import pandas as pd
import pytest

from helpers.planted_models import planted
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import ORDER
from hooked_vlm.experiments.dual_mechanisms.swap_under_ablation import CLAIM
from hooked_vlm.experiments.registry import select
from training import measure
from training.measure import Shown


def table_of(id_: str, coded: str, tmp_path: Any, **options: Any) -> pd.DataFrame:
    """The table of an experiment on a planted model, as it is read from its file."""
    found = select(id_)
    result = found.run(planted(coded), found.config(setting="squares", **options), lambda *_: None)
    result.table.to_csv(tmp_path / "table.csv", index=False)
    return pd.read_csv(tmp_path / "table.csv")


@pytest.mark.filterwarnings("ignore:Attention scores or patterns")
@pytest.mark.parametrize(
    ("name", "coded", "outcome"),
    [
        ("strips, not objects", "background", "found"),
        ("strips, not objects", "object", "not found"),
        ("ordering stage", "background", "found"),
        ("strips in the background", "attention", "found"),
        ("strips in the background", "object", "not found"),
    ],
)
def test_claims_on_models_that_are_known(
    name: str, coded: str, outcome: str, tmp_path: Any
) -> None:
    id_, judged = measure.CLAIMS[name]
    pairs = {"pairs": 12} if id_ in ("E2", "E4", "E6") else {}
    shown = judged(table_of(id_, coded, tmp_path, batch_size=60, **pairs))
    assert shown.outcome == outcome, shown


def claim(**columns: Any) -> dict[str, Any]:
    """A row of a table about a claim with the null value 1/2, clearly above it or below it."""
    value = columns.pop("value")
    sure = {"low": value - 0.05, "high": value + 0.05, "p_holm": 0.001 if value != 0.5 else 1.0}
    return {"value": value, "null": 0.5, "n": 40, **sure, **columns}


@pytest.mark.parametrize(
    ("value", "outcome"), [(0.9, "found"), (0.1, "not found"), (0.5, "not found")]
)
def test_an_order_that_remains(value: float, outcome: str) -> None:
    every = claim(value=value, direction="all", kind="removed", quantity=ORDER)
    one = claim(value=0.9, direction="left", kind="removed", quantity=ORDER)
    assert measure.order_remains(pd.DataFrame([one, every])).outcome == outcome
    unclear = {**every, "low": 0.1, "high": 0.9, "p_holm": 1.0}
    assert measure.order_remains(pd.DataFrame([unclear])).outcome == "undecided"


@pytest.mark.parametrize(
    ("by_direction", "outcome"),
    [
        ({"left": (0.1, 0.9), "right": (0.1, 0.9), "above": (0.1, 0.1)}, "found"),
        ({"left": (0.9, 0.9), "right": (0.9, 0.9), "above": (0.1, 0.9)}, "undecided"),
        ({"left": (0.1, 0.1), "right": (0.1, 0.1), "above": (0.1, 0.9)}, "not found"),
        ({"left": (0.1, 0.9), "right": (0.1, 0.1)}, "undecided"),
        ({}, "undecided"),
    ],
)
def test_an_order_that_is_computed_late(by_direction: Any, outcome: str) -> None:
    found = [
        claim(value=value, direction=direction, slot=slot, quantity=CLAIM)
        for direction, values in by_direction.items()
        for slot, value in enumerate(values)
    ]
    columns = {"direction", "slot", "quantity", "value"}
    made = pd.DataFrame(found) if found else pd.DataFrame(columns=list(columns))
    assert measure.own_order_is_late(made).outcome == outcome


def rows(**recipes: list[tuple[float, int, float]]) -> pd.DataFrame:
    """A table of models: accuracy, number of claims and difference of E4 for each seed."""
    return pd.DataFrame(
        {
            "recipe": name,
            "held-out accuracy": accuracy,
            "claims shown": n,
            "strips, not objects": Shown("undecided", apart),
        }
        for name, seeds in recipes.items()
        for accuracy, n, apart in seeds
    )


def test_the_rule_chooses_by_claims_then_by_strips_among_accurate_recipes() -> None:
    good, better = [(0.95, 2, 0.0), (0.95, 2, 0.1)], [(0.9, 3, -0.5), (0.95, 2, -0.5)]
    assert measure.chosen(rows(a=good, b=better)) == "b"
    assert measure.chosen(rows(a=good, b=[(0.95, 1, 0.4), (0.99, 3, 0.4)])) == "b"
    assert measure.chosen(rows(a=good, b=[(0.89, 5, 1.0), (1.0, 5, 1.0)])) == "a"
    with pytest.raises(CannotRunError, match=r"0\.9 in every seed"):
        measure.chosen(rows(a=[(0.5, 5, 1.0)]))


def test_a_number_says_what_it_bears() -> None:
    assert str(Shown("found", 0.5, 0.25, 0.75)) == "yes (0.50 [0.25, 0.75])"
    assert str(Shown("undecided", 0.5)) == "? (0.50)"
