"""What counts once on own data, and the verdicts of E2, E4 and D1: on made-up scores, and on a
model whose answers are known to come from the objects' cells, or from the background alone."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from helpers.planted_models import planted
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments import batches
from hooked_vlm.experiments.batches import OBSERVATION, numbers_only
from hooked_vlm.experiments.dual_mechanisms import strip_swap
from hooked_vlm.experiments.own import box_ablation, transfer
from hooked_vlm.experiments.own.setting import (
    ANYWHERE,
    AS_MANY,
    OTHERS,
    OwnPair,
    control_of,
    observations,
)
from hooked_vlm.experiments.registry import select
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.stimuli.own import OwnData
from hooked_vlm.stimuli.own.items import OwnItem, Picture
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.settings import stimulus_set


def pair(one: str, other: str) -> OwnPair:
    item = OwnItem(
        id=f"{one}{other}",
        image=Picture(one, None),
        question="?",
        answer="a",
        counterfactual=Picture(other, None),
        counterfactual_answer="b",
    )
    return OwnPair(item, item.on_counterfactual())


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["ab", "ba", "ab"], "aaa"),
        (["ab", "cd"], "ac"),
        (["ab", "ac", "ad"], "aaa"),  # one picture with three counterfactuals
        (["ab", "cd", "bc", "ef"], "aaae"),  # connected by a third pair
        (["dc", "cb", "ba"], "aaa"),
    ],
)
def test_pairs_that_share_a_picture_are_one_observation(pairs: list[str], expected: str) -> None:
    assert observations([pair(*one) for one in pairs]) == list(expected)


STATED = (ANYWHERE, OTHERS, AS_MANY, "box cup")
COMPARED = (ANYWHERE, "box cup")
KINDS = (*STATED, control_of("box cup"))


def scores(n: int, quantities: tuple[str, ...], means: dict[str, float]) -> xr.DataArray:
    """Scores of `n` pairs at five slots, every quantity with its kind's mean, up to noise."""
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, (n, 1, 5, 1))
    own = np.array([means.get(kind, 0.1) for kind in KINDS]).reshape(1, -1, 1, 1)
    shape = (n, len(KINDS), 5, len(quantities))
    return xr.DataArray(
        np.broadcast_to(own + noise, shape).copy(),
        dims=("pair", "kind", "slot", "quantity"),
        coords={
            "pair": [f"{i}" for i in range(n)],
            OBSERVATION: ("pair", [f"{i}" for i in range(n)]),
            "kind": list(KINDS),
            "slot": list(range(5)),
            "quantity": list(quantities),
        },
    )


def transferred(values: xr.DataArray) -> pd.DataFrame:
    return transfer._table({"all questions": values}, 4, 0, STATED, COMPARED)


def ablated(values: xr.DataArray) -> pd.DataFrame:
    none = values.sel(kind=[ANYWHERE]).assign_coords(kind=["none"]) * 0 + 0.9
    whole = xr.concat([values, none], dim="kind")
    pairs = [(kind, control_of(kind)) for kind in COMPARED]
    return box_ablation._table({"all questions": whole}, 4, 0, STATED, pairs)


TABLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "E2, E4": (transferred, strip_swap.QUANTITIES),
    "D1": (ablated, box_ablation.QUANTITIES),
}


@pytest.mark.parametrize(("table_of", "quantities"), TABLES.values(), ids=TABLES)
def test_a_pair_and_its_mirror_give_the_intervals_of_one(
    table_of: Any, quantities: tuple[str, ...]
) -> None:
    once = scores(6, quantities, {ANYWHERE: 0.9})
    twice = xr.concat([once, once], dim="pair")
    one, two = table_of(once), table_of(twice)
    assert set(two["n"]) == {6}
    numbers = ["value", "low", "high", "n", "p", "p_holm"]
    np.testing.assert_allclose(one[numbers], two[numbers])


def test_a_box_differs_from_as_many_other_cells_or_does_not() -> None:
    found = {ANYWHERE: 0.9, "box cup": 0.9}
    for control, more in ((0.1, "more than"), (0.88, "no more than")):
        table = transferred(
            scores(60, strip_swap.QUANTITIES, {**found, control_of("box cup"): control})
        )
        said = transfer._flips(table, STATED, COMPARED)
        assert f"box cup {more} {AS_MANY}: " in said
        assert f"{control_of('box cup')} yes" not in said  # it is compared with, and not told of
        assert said.startswith("All questions: does the answer flip? boxes yes, 0.90")


def test_the_highest_slot_has_an_interval_over_observations() -> None:
    values = scores(6, strip_swap.QUANTITIES, {ANYWHERE: 0.9})
    twice = xr.concat([values, values], dim="pair")
    said = [
        transfer._stages(transfer._table({"x": own}, 4, 0, [ANYWHERE])) for own in (values, twice)
    ]
    assert said[0] == said[1]
    assert "is highest at slot" in said[0]


def test_a_direction_with_one_observation_left_is_left_out() -> None:
    values = scores(3, strip_swap.QUANTITIES, {})
    values[2] = np.nan
    shared = values.assign_coords({OBSERVATION: ("pair", ["0", "0", "2"])})
    assert set(numbers_only({"one": shared, "two": values})[0]) == {"two"}
    with pytest.raises(CannotRunError, match="In no direction do two pairs"):
        numbers_only({"one": shared})


@cache
def squares() -> OwnData:
    """Twelve pictures of squares and their mirror images, as a user's own data with boxes."""
    setting = Setting(planted("object"), stimulus_set("squares"), 24)
    boxes = {}
    for place, name in enumerate(("first", "second", "third")):
        rows, cols = np.array(sorted(setting.geometry.object_region("horizontal", place))).T
        edges = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        boxes[name] = [8 * int(edge) for edge in edges]
    rows = []
    for asked in setting.stimuli.items(["left"]):
        first, second, third = asked.entities
        if first > third:
            continue
        mirrored = Question((third, second, first), asked.direction)
        row = {"image": setting.picture(asked), "question": setting.stimuli.prompt(asked)}
        row |= {"answer": asked.target, "boxes": boxes}
        row |= {"counterfactual": setting.picture(mirrored)}
        rows.append({**row, "counterfactual_answer": mirrored.target})
    return OwnData.read(rows[::5][:12])


def run(name: str, coded: str) -> Result:
    experiment = select(name)
    assert experiment.run_on is not None
    return experiment.run_on(planted(coded), squares(), experiment.config(setting="own"))


@pytest.mark.parametrize(
    ("name", "coded", "said"),
    [
        (
            "strip-swap",
            "object",
            ["boxes yes, 1.00", "all other cells no, 0.00", "Boxes more than"],
        ),
        ("strip-swap", "background", ["boxes no, 0.00", "all other cells yes, 1.00"]),
        ("box-ablation", "object", ["Boxes: a fall of the answer's probability at slots 0-1"]),
        (
            "box-ablation",
            "background",
            [
                "Boxes: a fall of the answer's probability at no slot",
                "cells: a fall of the answer's probability at slots 0-1",
            ],
        ),
        ("final-token", "object", ["slots 0-1 clean; slot 2 the counterfactual's"]),
    ],
)
def test_the_verdict_finds_where_the_answer_was_planted(
    name: str, coded: str, said: list[str]
) -> None:
    verdict = run(name, coded).verdict
    for one in said:
        assert one in verdict, verdict


@pytest.mark.parametrize(
    ("name", "module", "unit"),
    [("strip-swap", batches, "pair"), ("box-ablation", box_ablation, "question")],
)
def test_a_nan_in_one_cell_leaves_out_its_pair_alone(
    name: str, module: Any, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = module.scored_numbers, []

    def broken(score: Any, logits: Any) -> Any:
        calls.append(1)
        logits = logits.clone()
        if len(calls) == 1:
            logits[0] = np.nan
        return usual(score, logits)

    monkeypatch.setattr(module, "scored_numbers", broken)
    result = run(name, "object")
    assert f"Left out, all questions: 1 {unit} with scores that are not numbers." in result.verdict
    assert "nan" not in result.verdict
    assert set(result.table["n"]) == {11}
