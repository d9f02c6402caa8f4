"""Verdicts: the grammar, the sentences of experiments on made-up results, and their calibration."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hooked_vlm.analysis.probes import mean_of_shares
from hooked_vlm.analysis.statistics import bootstrap, simultaneous
from hooked_vlm.experiments.dual_mechanisms import (
    final_token,
    ordering_ablation,
    ordering_probes,
    strip_swap,
)
from hooked_vlm.experiments.further import redundancy
from hooked_vlm.experiments.verdicts import Judgement, claim_rows, judge, not_tested
from hooked_vlm.stimuli.pairs import Question


DIRECTIONS = ("left", "right", "above", "below")


def judged(values: Any, units: Any = None, **bounds: float) -> Judgement:
    values = np.asarray(values, dtype=float)
    (row,) = claim_rows(values, {}, range(len(values)) if units is None else units, 0, **bounds)
    return judge(row)


def test_a_claim_is_found_not_found_or_undecided() -> None:
    assert judged(np.full(30, 0.4)).above and judged(np.full(30, -0.4)).below
    none = judged(np.zeros(200))
    assert none.outcome == "not found" and "200 pictures exclude more than 0.0" in none.reason
    few = judged(np.zeros(8))
    assert few.outcome == "undecided" and "from 8 pictures" in few.reason
    assert judged([1.0]).outcome == "undecided"
    (row,) = claim_rows(np.full(30, 0.4), {}, range(30), 0)
    assert judge(row, unless="the control is not clean").reason == "the control is not clean"
    slight = judged(np.full(120, 0.09))  # significant, and too small to be named
    assert slight.outcome == "undecided"
    assert slight.slight == "above 0, by less than the 0.1 that counts"
    assert slight.reason.endswith(f"120 pictures: {slight.slight}") and not few.slight
    assert judged(np.full(120, -0.09)).slight.startswith("below 0")
    # A difference that is only significant is none worth naming.
    assert judged(np.full(5000, 0.02)).outcome == "not found"


def test_e5_says_why_a_slight_order_is_undecided() -> None:
    numbers = {"value": 0.59, "low": 0.56, "high": 0.62, "null": 0.5, "p_holm": 0.001, "n": 227}
    said = ordering_ablation._order(pd.Series(numbers))
    assert said == (
        "undecided whether an order remains (0.59 [0.56, 0.62] right of those that name an end, "
        "227 pictures: above 0.5, by less than the 0.1 that counts)"
    )


def test_items_of_one_picture_are_one_observation() -> None:
    values = np.tile([0.5, 0.5, 0.5, 0.5], 6)
    assert judged(values).above
    assert judged(values, units=[0, 1, 2] * 8).outcome == "undecided"


# --- E4 on made-up results -------------------------------------------------------------------


def pairs_of_e4(
    strip: np.ndarray, inside: np.ndarray, n: int, binary: bool = False
) -> dict[str, xr.DataArray]:
    """Pairs whose swapped answer has these mean probabilities, by slot, in every direction."""
    rng = np.random.default_rng(0)
    made = {}
    for direction in DIRECTIONS:
        means = np.stack([strip, inside, np.zeros_like(strip)])[None, ..., None]
        means = np.repeat(means, n, axis=0).repeat(4, axis=-1)
        if binary:
            draws = (np.arange(n)[:, None, None, None] + 0.5) / n
            means = (draws < means).astype(float)
        values = (means + 0.001 * rng.normal(size=means.shape)).clip(0, 1)
        made[direction] = xr.DataArray(
            values,
            dims=("pair", "kind", "slot", "quantity"),
            coords={
                "pair": [f"{direction}: {i}, x, y" for i in range(n)],
                "kind": ["strip", "object", "background"],
                "slot": list(range(len(strip))),
                "quantity": list(strip_swap.QUANTITIES),
            },
        )
    return made


def verdict_of_e4(made: dict[str, xr.DataArray], n_layers: int) -> list[str]:
    table = strip_swap._table(made, n_layers, seed=0)
    return strip_swap._verdict(table, DIRECTIONS).splitlines()


def test_a3_e4_asserts_only_what_its_tests_show() -> None:
    flat = np.ones(7)
    as_in_paper = "strips flip the answer and object cells alone do not, as in the paper"
    # 27 and 24 of 50 pairs; a hair's breadth around one half; and two pairs, however clear.
    for strip, inside, n, binary in (
        (27 / 50, 24 / 50, 50, True),
        (0.505, 0.495, 50, False),
        (0.95, 0.05, 2, False),
    ):
        said = verdict_of_e4(pairs_of_e4(strip * flat, inside * flat, n, binary), 6)
        assert said[1].startswith("Left, right, above and below: undecided whether")
        assert as_in_paper not in said[1] and "unlike" not in said[1]
    # Objects at the last slot alone, where strips do nothing any more.
    inside = np.array([0.05] * 6 + [0.55])
    every, each = verdict_of_e4(pairs_of_e4(0.95 * flat, inside, 50), 6)
    assert as_in_paper in every and as_in_paper in each
    assert "(strips - objects 0.90 [" in every and each.endswith("(strips - objects 0.90).")
    # At one early slot, and not on average: it is not said that nothing flips.
    peak = np.array([0.05, 0.95, 0.05, 0.05, 0.05, 0.05, 0.05])
    said = verdict_of_e4(pairs_of_e4(peak, peak, 50), 6)
    assert "over the early slots on average; both do at slot 1" in said[0]
    assert (
        "early slots; object cells alone do at slot 1"
        in (verdict_of_e4(pairs_of_e4(0.95 * flat, peak, 50), 6)[0])
    )
    peak = np.array([0.05, 0.05, 0.05, 0.8, 0.9, 0.05, 0.05])  # the highest is no early slot
    assert "both do at slot 3" in verdict_of_e4(pairs_of_e4(peak, peak, 50), 6)[0]
    assert "do at" not in verdict_of_e4(pairs_of_e4(peak, peak, 2), 6)[0]  # two pairs
    said = verdict_of_e4(pairs_of_e4(0.05 * flat, 0.05 * flat, 50), 6)
    assert "flip the answer over the early slots, unlike in the paper" in said[0]
    assert "no difference between the two" in said[0]
    said = verdict_of_e4(pairs_of_e4(0.05 * flat, 0.95 * flat, 50), 6)
    assert "object cells alone flip the answer and strips do not, unlike in the paper" in said[0]


def test_conclusions_of_e3_and_e4_have_one_number_each() -> None:
    means: Any = {"accuracy": 0.95, "background": 0.9, "middle": 0.8, "three_one": 0.3}
    rows = rows_of_e3(30, **means) + [{**row, "probe": 0} for row in rows_of_e3(30, **means)]
    said = ordering_probes._verdict(pd.DataFrame(rows).assign(axis="horizontal")).splitlines()
    said += verdict_of_e4(pairs_of_e4(0.9 * np.ones(7), 0.3 * np.ones(7), 50), 6)
    assert len(said) == 3
    for line in said:  # one number with its interval, or one range
        assert len(re.findall(r"\d\.\d\d", line.split(" [")[0])) <= 1 and len(line) < 200


def test_a12_the_highest_slot_has_an_interval_for_the_highest_of_many() -> None:
    rng = np.random.default_rng(0)
    made = pairs_of_e4(np.full(7, 0.5), np.full(7, 0.5), 50)
    for values in made.values():
        values[:] = rng.uniform(size=values.shape)
    table = strip_swap._table(made, 6, seed=0)
    best = table[(table["quantity"] == "swapped, highest") & (table["kind"] == "strip")]
    for _, row in best.iterrows():
        own = table[
            (table["quantity"] == "swapped")
            & (table["kind"] == "strip")
            & (table["direction"] == row["direction"])
            & (table["slot"] == row["slot"])
        ].iloc[0]
        assert row["value"] == pytest.approx(own["value"])
        assert row["high"] - row["low"] > own["high"] - own["low"]


def test_a14_a_direction_without_pairs_is_said_and_the_rest_stands() -> None:
    made = pairs_of_e4(0.95 * np.ones(7), 0.05 * np.ones(7), 50)
    del made["left"]
    said = verdict_of_e4(made, 6)
    assert said[-1].startswith("Not tested: left;") and "as in the paper" in said[1]
    assert not_tested(DIRECTIONS, DIRECTIONS) == []


def test_a14_two_pairs_of_one_picture_do_not_stop_the_experiment() -> None:
    made = pairs_of_e4(np.ones(3), np.zeros(3), 2)
    for direction, values in made.items():
        made[direction] = values.assign_coords(
            pair=[f"{direction}: x, y, z", f"{direction}: z, y, x"]
        )
    said = verdict_of_e4(made, 2)
    assert said[1].startswith("Left, right, above and below: undecided")


# --- E2 on made-up results -------------------------------------------------------------------


def verdict_of_e2(means: np.ndarray, n: int = 50, spread: float = 0.01) -> str:
    """The verdict where the three answers have these mean probabilities `[slot, answer]`."""
    rng = np.random.default_rng(0)
    made = {}
    for direction in DIRECTIONS:
        values = np.zeros((len(means), n, len(final_token.QUANTITIES)))
        values[..., :3] = means[:, None] + spread * rng.normal(size=(len(means), n, 3))
        made[direction] = xr.DataArray(
            values.clip(0, 1),
            dims=("slot", "pair", "quantity"),
            coords={
                "slot": list(range(len(means))),
                "pair": [f"{direction} {i}" for i in range(n)],
                "quantity": list(final_token.QUANTITIES),
            },
        )
    return final_token._verdict(final_token._table(made, len(means) - 1, 0), DIRECTIONS)


def test_a13_e2_names_no_stage_in_noise() -> None:
    stages = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    assert "follow each other as in the paper" in verdict_of_e2(stages)
    for unclear in (stages * 0.001, np.array([[0.36, 0.33, 0.31], [0.33, 0.36, 0.31]])):
        said = verdict_of_e2(unclear, spread=0.0001)
        assert "undecided" in said.lower() and "as in the paper" not in said


def test_pairs_of_the_same_two_pictures_are_one_observation_of_e2() -> None:
    rng = np.random.default_rng(0)
    coords = {"slot": [0, 1], "pair": [f"left-right: {i}" for i in range(20)]}
    coords["quantity"] = list(final_token.QUANTITIES)
    values = rng.uniform(size=(2, 20, len(coords["quantity"])))
    one = xr.DataArray(values, dims=("slot", "pair", "quantity"), coords=coords)
    table = final_token._table({"left": one, "right": one}, 1, 0)
    assert {*table[table.direction == "all"]["n"]} == {20}
    (highest,) = table[table.quantity == final_token.HIGHEST].to_dict("records")
    best = one.sel(quantity="ordering").mean("pair")
    assert highest["slot"] == best.values.argmax()
    assert highest["value"] == pytest.approx(best.values.max())


# --- E3 ---------------------------------------------------------------------------------------


def rows_of_e3(n: int = 30, with_one: bool = True, p: float = 1 / 21, **means: float) -> list[dict]:
    """The claims' rows where their means over n pictures are these; others are at chance."""
    chance = {
        "accuracy": (1 / 3, 1 / 3),
        "background": (2 / 3, 1 / 3),
        "middle": (1 / 3, 1 / 3),
        "converged": (1 / 3, 1 / 3),
        "three_one": (0.0, 0.0),
    }
    names = {
        "accuracy": "accuracy, claim",
        "converged": "converged, claim",
        "background": "background, claim",
        "middle": "background, middle strip",
        "three_one": "background, three - one",
    }
    rows = []
    rng = np.random.default_rng(0)
    for key, (null, default) in chance.items():
        if key == "three_one" and not with_one:
            continue
        values = means.get(key, default) + 0.02 * rng.normal(size=n)
        low = -1.0 if key == "three_one" else 0.0
        about = {"null": null, "low": low, "high": 1.0, "quantity": names[key]}
        rows += claim_rows(values.clip(low, 1), {}, range(n), 0, **about)
    return [*rows, {"quantity": "p, shuffled", "value": p}]


def found_by_e3(*given: Any, **means: Any) -> str:
    """What E3 says of the claims of `rows_of_e3`."""
    return ordering_probes._found(pd.DataFrame(rows_of_e3(*given, **means)).set_index("quantity"))


def test_a1_e3_claims_strips_only_beyond_two_halves_and_one_object() -> None:
    full: Any = {"accuracy": 0.95, "background": 0.9, "middle": 0.8, "three_one": 0.3}
    assert "and from the background, as in the paper" in found_by_e3(**full)
    # A plain left/right split, and a background that codes its place with one object alone too.
    halves = found_by_e3(**{**full, "background": 0.64, "middle": 0.02, "three_one": 0.2})
    assert "as in the paper" not in halves
    alone = found_by_e3(**{**full, "three_one": 0.0}, n=200)
    assert "with one object alone" in alone and "as in the paper" not in alone
    assert "undecided whether from the background" in found_by_e3(
        **{**full, "background": 0.7, "three_one": 0.1}
    )
    assert "not tested here" in found_by_e3(with_one=False, **full)
    unclear = found_by_e3(with_one=False, **{**full, "background": 0.68})
    assert "undecided whether strips" in unclear


def test_a2_e3_reads_no_order_where_shuffled_labels_do_as_well() -> None:
    assert "order is read from the objects" in found_by_e3(accuracy=0.9)
    for said in (found_by_e3(accuracy=0.9, p=0.3), found_by_e3(accuracy=0.36)):
        assert "undecided whether it is read" in said or "no order is read" in said
    few = found_by_e3(8, converged=0.9)
    assert "undecided whether the paper's recipe reads an order; a probe fitted to" in few
    many = found_by_e3(400, converged=0.9)
    assert "its recipe reads no order; a probe fitted to convergence reads" in many


def test_a4_shares_of_tokens_have_intervals_over_images() -> None:
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        shares = rng.beta(40, 10, size=30)
        interval = mean_of_shares(shares)
        covered += interval.covers(0.8)
        widths.append(interval.high - interval.low)
    assert 0.9 <= covered / 200 <= 0.99
    assert np.mean(widths) < 0.06  # Wilson's interval of 30 images: 0.28
    assert mean_of_shares(np.ones(30)).low < 0.9


# --- E5 and Q6 ----------------------------------------------------------------------------------


def items(n: int) -> list[Question]:
    names = [f"n{i}" for i in range(n + 2)]
    return [Question((names[i], names[i + 1], names[i + 2]), "left") for i in range(n)]


def order_said(shares: tuple[float, float, float, float], n: int = 60) -> str:
    """What E5 says of answers of which these shares name right, other end, reference, nothing."""
    kinds = np.zeros((n, 4))
    kinds[np.arange(n), np.repeat(range(4), [round(s * n) for s in shares])] = 1
    asked = items(n)
    every = {"horizontal": {name for q in asked for name in q.entities}}
    (row,) = ordering_ablation.order_rows(kinds, asked, every, 0)
    return ordering_ablation._order(pd.Series(row))


def test_a6_a_loss_of_names_is_no_loss_of_order() -> None:
    # Two thirds right and one third outside the picture: never an ordering error.
    assert order_said((2 / 3, 0.0, 0.0, 1 / 3)).startswith("an order remains")
    # Half right and half the other end: no order, although a third of three would be less.
    assert order_said((0.5, 0.5, 0.0, 0.0), n=400).startswith("no order remains")
    assert order_said((0.5, 0.5, 0.0, 0.0), n=20).startswith("undecided")
    assert order_said((0.1, 0.9, 0.0, 0.0)).startswith("answers name the other end")
    assert "no answer names an end" in order_said((0.0, 0.0, 0.0, 1.0))


def test_a6_only_pictures_whose_entities_are_named_count() -> None:
    asked, kinds = items(10), np.tile([1.0, 0.0, 0.0, 0.0], (10, 1))
    (row,) = ordering_ablation.order_rows(kinds, asked, {"horizontal": {"n0", "n1", "n2"}}, 0)
    assert row["n"] == 1


def said_by_q6(odds: tuple[float, ...], n: int = 200, spread: float = 1.0) -> str:
    """What Q6 says where the log odds of the four cells have these means."""
    rng = np.random.default_rng(0)
    each = np.array(odds)[:, None] + spread * rng.normal(size=(4, n))
    values = np.zeros((4, n, len(redundancy.QUANTITIES)))
    values[..., 0], values[..., 1] = each > 0, each <= 0
    values[..., -2], values[..., -1] = 1 / (1 + np.exp(-each)), each
    table = redundancy._table({"left": values}, {"left": items(n)}, 0)
    return redundancy._verdict(table).splitlines()[0]


def test_a7_redundancy_is_judged_in_log_odds_below_the_ceiling() -> None:
    # .97, .82, .88 and .5 right, which are additive in log odds and were "redundant" in accuracy.
    additive = tuple(np.log([0.97 / 0.03, 0.82 / 0.18, 0.88 / 0.12, 1.0]))
    assert "the two add up in log odds" in said_by_q6(additive)
    assert "redundant" in said_by_q6((1.5, 1.4, 1.4, -3.0))
    assert "complementary" in said_by_q6((4.0, -1.0, -1.0, -1.0))
    assert "undecided: both and vision only and LM only are at the ceiling" in said_by_q6(
        (8.0, 8.0, 8.0, -3.0)
    )
    assert "rests on something else" in said_by_q6((4.0, 4.0, 4.0, 4.0))
    assert "one signal does nearly all of it (LM only)" in said_by_q6((4.0, -4.0, 4.0, -4.0))
    assert "undecided" in said_by_q6((1.0, 0.5, 0.5, -0.5), n=6)


# --- calibration -----------------------------------------------------------------------------

NULLS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "symmetric": lambda rng, n: rng.normal(0, 0.2, n).clip(-1, 1),
    "skewed": lambda rng, n: np.where(rng.random(n) < 0.05, 0.95, -0.05),
    "skewed, mild": lambda rng, n: rng.beta(0.5, 1.5, n) - 0.25,
    "binary near 0": lambda rng, n: (rng.random(n) < 0.02) - 0.02,
    "binary near 1": lambda rng, n: (rng.random(n) < 0.98) - 0.98,
    "binary": lambda rng, n: (rng.random(n) < 0.5) - 0.5,
}


@pytest.mark.parametrize("n", [2, 8, 50])
@pytest.mark.parametrize("null", NULLS)
def test_a_verdict_claims_nothing_under_the_null(null: str, n: int) -> None:
    rng, draws = np.random.default_rng(n), 200
    bounds = {"low": -1.0, "high": 1.0}
    false = sum(judged(NULLS[null](rng, n), **bounds).outcome == "found" for _ in range(draws))
    assert false <= 0.05 * draws + 2 * np.sqrt(draws * 0.05 * 0.95)


def test_a5_clusters_do_not_make_claims() -> None:
    """Each picture is asked twice, and its answers agree."""
    rng, draws, false, naive = np.random.default_rng(0), 300, 0, 0
    for _ in range(draws):
        values = np.repeat(rng.random(24) < 0.5, 2).astype(float)
        bounds = {"null": 0.5, "low": 0.0, "high": 1.0}
        false += judged(values, units=(np.arange(48) // 2).tolist(), **bounds).outcome == "found"
        naive += judged(values, **bounds).outcome == "found"
    assert false <= 0.05 * draws + 2 * np.sqrt(draws * 0.05 * 0.95)
    assert naive > 0.08 * draws  # which is what counting questions would do


@pytest.mark.parametrize(("effect", "n", "power"), [(0.3, 50, 0.9), (0.5, 20, 0.9), (0.9, 10, 0.9)])
def test_a_planted_effect_is_found(effect: float, n: int, power: float) -> None:
    rng = np.random.default_rng(0)
    found = [judged(rng.normal(effect, 0.35, n).clip(-1, 1)).above for _ in range(200)]
    assert np.mean(found) >= power


def test_a12_the_best_of_equal_slots_is_seldom_above_the_truth() -> None:
    rng, above, alone = np.random.default_rng(0), 0, 0
    for _ in range(300):
        values = rng.uniform(size=(50, 7))
        together, each = (f(values, n_resamples=800) for f in (simultaneous, bootstrap))
        best = int(together.estimate.argmax())
        above += together.low[best] > 0.5
        alone += each.low[best] > 0.5
    assert above <= 0.05 * 300 + 2 * np.sqrt(300 * 0.05 * 0.95)
    assert alone > 0.08 * 300


def test_tables_of_verdicts_can_be_written_as_csv() -> None:
    table = strip_swap._table(pairs_of_e4(np.ones(3), np.zeros(3), 10), 2, seed=0)
    assert table["value"].notna().all() and isinstance(table, pd.DataFrame)
