"""Whole experiments on simulated measurements: how often verdicts claim what is not there.

Each simulation draws the arrays that an experiment measures and goes through the experiment's own
rows and verdict.  A claim at any place of one sentence counts as one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.stats import binom

from helpers import synthetic_results
from hooked_vlm.analysis import bounded, statistics
from hooked_vlm.experiments import tables, verdicts
from hooked_vlm.experiments.dual_mechanisms import (
    amplified_accuracy,
    final_token,
    ordering_ablation,
    strip_swap,
    swap_under_ablation,
)
from hooked_vlm.experiments.further import (
    compared,
    composite_artefacts,
    encoder_depth,
    photographs,
    why_strips,
)
from hooked_vlm.experiments.result import Result
from hooked_vlm.stimuli.pairs import Question


Rng = np.random.Generator
Said = Callable[[Rng, str, int, float], bool]
"""(rng, shape, n, effect) -> whether the verdict claims an effect"""
SHAPES = ("symmetric", "skewed", "binary", "near 0", "near 1", "clustered")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer resamples keep the level of the tests; intervals that no claim uses need none."""
    for name in ("bounded_mean", "bounded_test"):
        monkeypatch.setattr(verdicts, name, partial(getattr(bounded, name), n_resamples=2000))
    for module in (tables, amplified_accuracy):
        monkeypatch.setattr(module, "bootstrap", partial(statistics.bootstrap, n_resamples=20))
    for module in (strip_swap, encoder_depth):
        few = partial(statistics.simultaneous, n_resamples=20)
        monkeypatch.setattr(module, "simultaneous", few)
    yield


def centred(rng: Rng, shape: str, n: int, places: int) -> np.ndarray:
    """Values in [-1/2, 1/2] of mean zero, `[pair, place]`."""
    size = (n, places)
    if shape == "symmetric":
        return rng.uniform(-0.5, 0.5, size)
    if shape == "skewed":
        return np.where(rng.random(size) < 0.1, -0.45, 0.05)
    if shape == "clustered":  # places of a pair agree
        return np.repeat((rng.random((n, 1)) < 0.5) - 0.5, places, axis=1)
    rate = {"binary": 0.5, "near 0": 0.05, "near 1": 0.95}[shape]
    return 0.5 * ((rng.random(size) < rate) - rate)


def pairs(values: np.ndarray, kinds: list[str], quantities: tuple[str, ...]) -> xr.DataArray:
    """Measurements `[pair, kind, slot]`, for every quantity the same."""
    n, _, slots = values.shape
    return xr.DataArray(
        np.repeat(values[..., None], len(quantities), -1),
        dims=("pair", "kind", "slot", "quantity"),
        coords={
            "pair": [f"left: a{i}, x, y{i}" for i in range(n)],
            "kind": kinds,
            "slot": list(range(slots)),
            "quantity": list(quantities),
        },
    )


def swapped(rng: Rng, shape: str, n: int, effect: float) -> np.ndarray:
    """Probabilities of strips, objects and strips without objects; strips above by the effect."""
    made = 0.5 + centred(rng, shape, n, 15).reshape(n, 3, 5)
    made[:, 0] += effect
    made[:, 1] -= effect
    return made.clip(0, 1)


KINDS = ["strip", "object", "background"]


def e2(rng: Rng, shape: str, n: int, effect: float) -> bool:
    half = centred(rng, shape, n, 5)
    values = np.zeros((5, n, len(final_token.QUANTITIES)))
    values[..., 0], values[..., 1] = (0.5 + half / 2 + effect / 2).T, (0.5 - half / 2).T
    made = xr.DataArray(
        values.clip(0, 1),
        dims=("slot", "pair", "quantity"),
        coords={
            "slot": range(5),
            "pair": [f"{i}" for i in range(n)],
            "quantity": list(final_token.QUANTITIES),
        },
    )
    table = final_token._table({"left": made}, 4, 0)
    said = final_token._verdict(table, ["left"])
    return not said.startswith("Answer by slot: slots 0-4 undecided")


def e4(rng: Rng, shape: str, n: int, effect: float) -> bool:
    made = pairs(swapped(rng, shape, n, effect), KINDS, strip_swap.QUANTITIES)
    said = strip_swap._verdict(strip_swap._table({"left": made}, 4, 0), ["left"])
    return "undecided whether" not in said.splitlines()[0] or "flip more than" in said


def e6(rng: Rng, shape: str, n: int, effect: float) -> bool:
    values = swapped(rng, shape, n, 0.0)
    values[:, 1, 2:4] = (values[:, 1, 2:4] + effect).clip(0, 1)
    made = pairs(values, KINDS, strip_swap.QUANTITIES)
    said = swap_under_ablation._verdict(swap_under_ablation._table({"left": made}, 4, 0), [])
    return "undecided" not in said


def e5(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Right answers at 1/2, in items, or in both questions about a picture at once."""
    right = rng.random(n) < 0.5 + effect
    asked = [Question((f"a{i}", "x", f"b{i}"), "left") for i in range(n)]
    if shape == "clustered":
        asked = [Question(q.entities, d) for q in asked for d in ("left", "right")]
        right = np.repeat(right, 2)
    kinds = np.stack([right, ~right, 0 * right, 0 * right], -1).astype(float)
    every = {"horizontal": {name for q in asked for name in q.entities}}
    (row,) = ordering_ablation.order_rows(kinds, asked, every, 0)
    return not ordering_ablation._order(pd.Series(row)).startswith(("undecided", "no order"))


def e7(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Answers that do not depend on directions; strengths above 0 correct a share of them."""
    alphas = (0.0, 1.0, 2.0)
    rate = {"near 0": 0.05, "near 1": 0.95}.get(shape, 0.4)
    items = 2 * n if shape == "clustered" else n
    right = {}
    for kind in (*amplified_accuracy.FORMULAS, *amplified_accuracy.CONTROLS):
        seeds = 1 if kind in amplified_accuracy.FORMULAS else 20
        right[kind] = rng.random((seeds, 3, items)) < rate
        if kind == "released":
            right[kind][:, 1:] |= rng.random((seeds, 2, items)) < effect
    base = rng.random(items) < rate
    for own in right.values():
        own[:, 0] = base
    table = amplified_accuracy.table_of(right, (np.arange(items) % n).tolist(), alphas, 0)
    return "improves accuracy, more than" in amplified_accuracy.verdict_of(table)


def background_shift(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """E9 and Q4: the difference of the background's share on the same pictures."""
    moved = centred(rng, shape, n, 1)[:, 0] + effect
    (row,) = verdicts.claim_rows(moved.clip(-1, 1), {}, range(n), 0)
    one = pd.Series(row)
    rises = photographs._change(one) in ("it rises", "it falls")
    return rises or composite_artefacts._apart(one)


def compared_swaps(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """E9 and Q4: swaps on two kinds of picture, at any kind and slot."""

    def of(values: np.ndarray) -> Result:
        arrays = {"pairs_left": pairs(values, KINDS, ("swapped",))}
        return replace(synthetic_results.e4(), arrays=arrays)

    first = np.full((n, 3, 5), 0.5)
    other = (0.5 + centred(rng, shape, n, 15).reshape(n, 3, 5) + effect).clip(0, 1)
    rows = compared.swap_rows(of(first), of(other), 0)
    return "up to" in compared.said_swaps(pd.DataFrame(rows))


def q5_swaps(rng: Rng, shape: str, n: int, effect: float) -> bool:
    values = pairs(swapped(rng, shape, n, effect)[:, :2], KINDS[:2], ("swapped",))
    values = (
        values.isel(quantity=0, drop=True).rename(slot="site").transpose("pair", "kind", "site")
    )
    table = pd.DataFrame(encoder_depth.swap_rows(values, 0))
    said = [encoder_depth._flips(table[table["kind"] == kind], kind) for kind in KINDS[:2]]
    return any("undecided" not in one for one in said)


def q5_reading(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Five probes at three depths, all of them at chance."""
    nulls = np.array([1 / 3, 2 / 3, 1 / 3])[:, None, None]
    read = [
        (nulls + 0.6 * centred(rng, shape, n, 15).reshape(3, 5, n) + effect).clip(0, 1)
        for _ in range(3)
    ]
    table = pd.DataFrame(encoder_depth.reading_claims(read, 2 / 3, 0))
    return "does not clearly read" not in encoder_depth._of_axis(table, 3)


def q8(rng: Rng, shape: str, n: int, effect: float) -> bool:
    values = 0.7 + 0.5 * centred(rng, shape, n, 18).T.reshape(3, 1, 3, n, 2)
    values[:, :, 1] -= effect
    shares = xr.DataArray(
        values.clip(0, 1),
        dims=("kind", "layer", "condition", "image", "quantity"),
        coords={
            "kind": list(why_strips.CUTS),
            "layer": [why_strips.ALL],
            "condition": [why_strips.INTACT, why_strips.CUT, why_strips.RANDOM],
            "quantity": list(why_strips.QUANTITIES),
        },
    )
    claims = pd.DataFrame(why_strips._claims(shares, why_strips.QUANTITIES, range(n), 0))
    each = [own for _, own in claims.groupby(["kind", "quantity"])]
    return any(why_strips.writes(own).outcome == "found" for own in each)


EXPERIMENTS: dict[str, tuple[Said, float]] = {
    "E2": (e2, 0.8),
    "E4": (e4, 0.4),
    "E5": (e5, 0.35),
    "E6": (e6, 0.45),
    "E7, R2": (e7, 0.6),
    "E9, Q4: background": (background_shift, 0.4),
    "E9, Q4: swaps": (compared_swaps, 0.45),
    "Q5: swaps": (q5_swaps, 0.4),
    "Q5: reading": (q5_reading, 0.33),
    "Q8": (q8, 0.45),
}
"""Each experiment, and a planted effect that it must find with 50 pictures."""


def share(name: str, shape: str, n: int, effect: float, draws: int) -> float:
    said, rng = EXPERIMENTS[name][0], np.random.default_rng(n)
    return float(np.mean([said(rng, shape, n, effect) for _ in range(draws)]))


def check_null(name: str, shape: str, n: int, draws: int) -> None:
    most = binom.ppf(0.999, draws, 0.05) / draws
    assert share(name, shape, n, 0.0, draws) <= most


DRAWS = {"E4": 1, "E7, R2": 1, "Q5: reading": 1}
"""Draws of each shape in the quick test, where they are not three: these have large tables."""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_verdict_claims_nothing_under_the_null(name: str) -> None:
    draws = DRAWS.get(name, 3)
    cases = zip(SHAPES, (50, 8, 20, 8, 8, 2), strict=True)
    claims = sum(draws * share(name, shape, n, 0.0, draws) for shape, n in cases)
    assert claims <= binom.ppf(0.999, draws * len(SHAPES), 0.05)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_verdict_finds_a_planted_effect(name: str) -> None:
    assert share(name, "symmetric", 50, EXPERIMENTS[name][1], DRAWS.get(name, 3)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8, 20, 50])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_verdict_claims_in_one_draw_of_twenty_at_most(name: str, shape: str, n: int) -> None:
    check_null(name, shape, n, 200)
