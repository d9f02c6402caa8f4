"""What counts as shown in the study of recipes, on models whose mechanisms are known."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from helpers.planted_models import planted
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import ORDER
from hooked_vlm.experiments.dual_mechanisms.swap_under_ablation import CLAIM
from hooked_vlm.experiments.registry import select
from training import measure, results, study
from training.measure import Shown
from training.recipes import RECIPES


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
        (dict.fromkeys(("left", "right", "above"), (0.1, 0.9)) | {"below": (0.1, 0.1)}, "found"),
        ({"left": (0.1, 0.9), "right": (0.1, 0.9)}, "undecided"),  # of four, not of those tested
        (dict.fromkeys(("left", "right", "above", "below"), (0.9, 0.9)), "undecided"),
        (dict.fromkeys(("left", "right", "above"), (0.1, 0.1)), "not found"),
        ({}, "undecided"),
    ],
)
def test_an_order_that_is_computed_late(by_direction: Any, outcome: str) -> None:
    found = [
        claim(value=value, direction=direction, slot=slot, quantity=CLAIM)
        for direction, values in by_direction.items()
        for slot, value in enumerate(values)
    ]
    assert measure.own_order_is_late(pd.DataFrame(found)).outcome == outcome


def rows(**recipes: list[tuple[float, int, float]]) -> pd.DataFrame:
    """A table of models: accuracy, number of claims and difference of E4 for each seed.

    Recipes that are not given show nothing, with an accuracy of 0.95.
    """
    every = {name: [(0.95, 0, 0.0)] * 2 for name in RECIPES} | recipes
    return pd.DataFrame(
        {
            "recipe": name,
            measure.ACCURACY: accuracy,
            "claims shown": n,
            "strips, not objects": Shown("undecided", apart),
        }
        for name, seeds in every.items()
        for accuracy, n, apart in seeds
    )


def test_the_rule_chooses_by_claims_then_by_strips_among_accurate_recipes() -> None:
    good = {"captions": [(0.95, 2, 0.0), (0.95, 2, 0.1)]}

    def chosen(*other: tuple[float, int, float]) -> str:
        return measure.chosen(rows(**good, contrastive=list(other)))

    assert chosen((0.8, 3, -0.5), (0.95, 2, -0.5)) == "contrastive"
    assert chosen((0.95, 1, 0.4), (0.99, 3, 0.4)) == "contrastive"
    assert chosen((0.74, 5, 1.0), (1.0, 5, 1.0)) == "captions"
    unmeasured = (0.95, 4, float("nan"))
    assert chosen(unmeasured, unmeasured) == "contrastive"
    with pytest.raises(CannotRunError, match="Not measured with every seed: contrastive"):
        chosen(unmeasured)
    with pytest.raises(CannotRunError, match=r"0\.75 in every seed"):
        measure.chosen(rows(**{name: [(0.5, 5, 1.0)] * 2 for name in RECIPES}))


def test_recipes_differ_where_all_seeds_and_their_intervals_do() -> None:
    low, high = Shown("found", 0.1, 0.0, 0.2), Shown("found", 0.5, 0.4, 0.6)
    assert measure.differ([low, low], [high, high]) and measure.differ([high], [low])
    assert not measure.differ([low, high], [high, high])
    assert not measure.differ([low, Shown("found", 0.3, 0.2, 0.45)], [high, high])
    assert measure.differ([Shown("found", 0.1)], [Shown("found", 0.2)])


def test_the_page_has_each_model_the_differences_and_the_choice(tmp_path: Any) -> None:
    found = rows(
        captions=[(0.95, 2, 0.0), (0.95, 2, 0.1)], contrastive=[(0.9, 3, 0.4), (0.9, 2, 0.5)]
    )
    found = found[found["recipe"].isin(["captions", "contrastive"])].assign(seed=[0, 1, 0, 1])
    alike = pd.Series([Shown("undecided", 0.25)] * 4, index=found.index)
    found = found.assign(**dict.fromkeys(set(measure.CLAIMS) - set(found), alike))
    swapped = pd.DataFrame([{"recipe": "captions", "seed": 0, "strips": "0.50 [0.40, 0.60]"}])
    text = results.tables(found, {None: swapped, 0: swapped})
    assert "| `captions` | 0 | 0.50 [0.40, 0.60] |" in text
    without = results.tables(found, {None: swapped.iloc[:0]})
    assert all(words in text and words not in without for words in results.SWAPS.values())
    assert "| `captions` | 0 | 0.95 | ? (0.25) |" in text
    # 0.0 and 0.1 lie below 0.4 and 0.5, and have no intervals; all other claims are equal.
    assert "| `contrastive` | `captions` | strips, not objects |" in text
    assert "The rule chooses none yet. Not measured with every seed: end-to-end" in text
    assert results.differences(found.iloc[:3]) == []  # one seed decides nothing
    page = tmp_path / "page.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.write_into(page, text)
    assert page.read_text() == f"before\n{results.BEGIN}\n{text}\n{results.END}\nafter\n"
    page.write_text("none")
    with pytest.raises(ValueError, match="lacks the marks"):
        results.write_into(page, text)


@pytest.mark.filterwarnings("ignore")  # of pairs that are too few
@pytest.mark.slow
def test_a_model_that_shows_nothing_is_measured_and_stands_in_the_table(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "MEASURED", {id_: {"pairs": 2, "batch_size": 80} for id_ in ("E2", "E4", "E6")}
    )
    monkeypatch.setattr(measure, "QUESTIONS", 4)
    monkeypatch.setattr(
        measure, "CLAIMS", {c: v for c, v in measure.CLAIMS.items() if v[0] in ("E2", "E4", "E6")}
    )
    recipe = replace(RECIPES["end-to-end"], steps=1, batch=2)
    folder = study.train_model(recipe, 0, tmp_path)
    measure.measure(folder)
    found = measure.table(tmp_path)
    assert found["recipe"].tolist() == ["end-to-end"] and found["claims shown"].tolist() == [0]
    assert {shown.outcome for shown in found["strips, not objects"]} == {"undecided"}
    with pytest.raises(CannotRunError, match="Not measured with every seed"):
        measure.chosen(found)


def test_a_number_says_what_it_bears() -> None:
    assert str(Shown("found", 0.5, 0.25, 0.75)) == "yes (0.50 [0.25, 0.75])"
    assert str(Shown("undecided", 0.5)) == "? (0.50)"
    assert str(Shown("undecided", float("nan"))) == "?"


def test_swaps_are_those_of_e4_over_the_early_slots_or_at_one(tmp_path: Any) -> None:
    folder = tmp_path / "captions-1" / "measured"
    folder.mkdir(parents=True)
    kinds = ("strip", "object", "background")
    about = {"direction": "all", "quantity": "swapped, early slots", "low": 0.1, "high": 0.9}
    rows = [{"kind": kind, "value": 0.2 * i, **about} for i, kind in enumerate(kinds, 1)]
    others = [{**rows[0], "direction": "left"}]
    for slot in (0, 1):
        at = {"quantity": "swapped", "slot": slot, "value": 0.3 + slot}
        others += [{**row, **at} for row in rows]
    pd.DataFrame([*others, *rows]).to_csv(folder / "E4.csv")
    (row,) = measure.swaps(tmp_path).to_dict("records")
    assert row == {
        "recipe": "captions",
        "seed": 1,
        "strips": "0.20 [0.10, 0.90]",
        "objects": "0.40 [0.10, 0.90]",
        "strips without objects": "0.60 [0.10, 0.90]",
    }
    (row,) = measure.swaps(tmp_path, slot=0).to_dict("records")
    assert row["strips"] == row["objects"] == "0.30 [0.10, 0.90]"
