"""Arrays as experiments measure them, drawn at random, through the experiment's rows and verdict.

Each function returns whether the verdict claims an effect, in any of its sentences.  With an
effect of 0 there is none, so that a claim is false.  `simulated_cases` lists them all.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import xarray as xr

from helpers import synthetic_results
from hooked_vlm.analysis import bounded, probes, statistics
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
    redundancy,
)
from hooked_vlm.experiments.result import Result
from hooked_vlm.stimuli.pairs import Question


Rng = np.random.Generator
SHAPES = ("symmetric", "skewed", "binary", "near 0", "near 1", "clustered")
DIRECTIONS = ("left", "right", "above", "below")
AXES = ("horizontal", "vertical")
KINDS = ["strip", "object", "background"]


@contextmanager
def fewer_resamples() -> Iterator[None]:
    """Fewer resamples keep the level of the tests; intervals that no claim uses need none.

    The functions are called without the checks of their arguments, which take a third of the time.
    """
    with ExitStack() as patched:
        for name in ("bounded_mean", "bounded_test"):
            few = partial(inspect.unwrap(getattr(bounded, name)), n_resamples=2000)
            patched.enter_context(patch.object(verdicts, name, few))
        for name in ("by_unit", "holm"):
            patched.enter_context(
                patch.object(verdicts, name, inspect.unwrap(getattr(verdicts, name)))
            )
        for module in (tables, probes):
            few = partial(inspect.unwrap(statistics.bootstrap), n_resamples=20)
            patched.enter_context(patch.object(module, "bootstrap", few))
        for module in (tables, amplified_accuracy):
            patched.enter_context(patch.object(module, "wilson", rate_alone))
        for module in (tables, encoder_depth):
            few = partial(inspect.unwrap(statistics.simultaneous), n_resamples=20)
            patched.enter_context(patch.object(module, "simultaneous", few))
        few = partial(inspect.unwrap(statistics.sign_flip_test), n_resamples=600)
        patched.enter_context(patch.object(redundancy, "sign_flip_test", few))
        yield


def rate_alone(successes: float, n: int) -> statistics.Interval:
    """A rate without its interval: no claim uses Wilson's."""
    return statistics.Interval(successes / n, np.nan, np.nan, n, 0.95, "none")


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


def pairs(values: np.ndarray, direction: str, quantities: tuple[str, ...]) -> xr.DataArray:
    """Measurements `[pair, kind, slot]`, for every quantity the same."""
    n, kinds, slots = values.shape
    return xr.DataArray(
        np.repeat(values[..., None], len(quantities), -1),
        dims=("pair", "kind", "slot", "quantity"),
        coords={
            "pair": [f"{direction}: a{i}, x, y{i}" for i in range(n)],
            "kind": KINDS[:kinds],
            "slot": list(range(slots)),
            "quantity": list(quantities),
        },
    )


def swapped(rng: Rng, shape: str, n: int, effect: float, slots: int = 5) -> np.ndarray:
    """Probabilities of strips, objects and strips without objects; strips above by the effect."""
    made = 0.5 + centred(rng, shape, n, 3 * slots).reshape(n, 3, slots)
    made[:, 0] += effect
    made[:, 1] -= effect
    return made.clip(0, 1)


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
    """In four directions, each with pairs of its own."""
    quantities = strip_swap.QUANTITIES
    made = {d: pairs(swapped(rng, shape, n, effect, 3), d, quantities) for d in DIRECTIONS}
    table = strip_swap._table(made, 2, 0)
    said = [strip_swap.finding(own) for _, own in table.groupby("direction")]
    return any("flip more than" in one or "undecided whether" not in one for one in said)


def e5(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Right answers at 1/2, in items, or in both questions about a picture at once."""
    asked, right = [], []
    for axis, directions in zip(AXES, (("left", "right"), ("above", "below")), strict=True):
        for direction in directions:
            asked += [Question((f"{axis}{i}", "x", f"b{i}"), direction) for i in range(n)]
        own = rng.random((2, n)) < 0.5 + effect
        right.append(own[[0, 0]] if shape == "clustered" else own)
    every = np.concatenate(right).ravel()
    kinds = np.stack([every, ~every, 0 * every, 0 * every], -1).astype(float)
    names = {q.axis: {name for one in asked for name in one.entities} for q in asked}
    rows = []
    for direction in (*DIRECTIONS, "all"):
        own = [i for i, q in enumerate(asked) if direction in (q.direction, "all")]
        some = [asked[i] for i in own]
        rows += ordering_ablation.order_rows(kinds[own], some, names, 0, direction=direction)
    table = ordering_ablation.over_sentences(pd.DataFrame(rows).assign(kind="removed"))
    said = [ordering_ablation._order(row) for _, row in table.iterrows()]
    return not all(one.startswith(("undecided", "no order")) for one in said)


def e6(rng: Rng, shape: str, n: int, effect: float) -> bool:
    made = {}
    for direction in DIRECTIONS:
        values = swapped(rng, shape, n, 0.0)
        values[:, 1, 2:4] = (values[:, 1, 2:4] + effect).clip(0, 1)
        made[direction] = pairs(values, direction, strip_swap.QUANTITIES)
    said = swap_under_ablation._verdict(swap_under_ablation._table(made, 4, 0), [])
    return not all("undecided whether" in line for line in said.splitlines())


def answered(rng: Rng, shape: str, n: int) -> tuple[np.ndarray, list[int], float]:
    """Answers of a model, the picture of each, and the rate at which they are right."""
    rate = {"near 0": 0.05, "near 1": 0.95}.get(shape, 0.4)
    base = rng.random(n) < rate
    if shape == "clustered":  # each picture is asked twice
        return np.tile(base, 2), [*range(n), *range(n)], rate
    return base, list(range(n)), rate


def e7(rng: Rng, shape: str, n: int, effect: float, random: float = 0.0) -> bool:
    """Strengths change answers at random; they correct a share of them by the effect.

    Random directions correct a share too; formulas are then as good as they are.
    """
    base, pictures, rate = answered(rng, shape, n)
    right = {}
    for kind in (*amplified_accuracy.FORMULAS, *amplified_accuracy.CONTROLS):
        seeds = 1 if kind in amplified_accuracy.FORMULAS else 20
        own = rng.random((seeds, 3, n)) < rate
        if random:
            own = base[:n] | (rng.random((seeds, 3, n)) < random)
        if kind == "released":
            own[:, 1:] |= rng.random((seeds, 2, n)) < effect
        right[kind] = own[..., np.arange(len(base)) % n]
        right[kind][:, 0] = base
    table = amplified_accuracy.table_of(right, pictures, (0.0, 1.0, 2.0), 0)
    return "improves accuracy, more than" in amplified_accuracy.verdict_of(table)


def background_shift(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """E9 on two axes, and Q4 on four variants: the background's share on the same pictures."""
    found = []
    for places, said in ((AXES, photographs._change), (range(4), composite_artefacts._apart)):
        moved = (centred(rng, shape, n, len(places)) + effect).clip(-1, 1)
        rows = []
        for values in moved.T:
            about: Any = {"quantity": compared.DIFFERENCE, "part": "ordering-probes"}
            rows += verdicts.claim_rows(values, {}, range(n), 0, **about)
        table = compared.over_sentences(pd.DataFrame(rows))
        found += [said(row) for _, row in table.iterrows()]
    return any(one in ("it rises", "it falls", True) for one in found)


def compared_swaps(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Q4 on two variants (E9 has one): swaps on two kinds of picture, at any kind and slot."""

    def of(values: np.ndarray) -> Result:
        arrays = {"pairs_left": pairs(values, "left", ("swapped",))}
        return replace(synthetic_results.e4(), arrays=arrays)

    parts = []
    first = of(np.full((n, 3, 3), 0.5))
    for variant in range(2):
        other = (0.5 + centred(rng, shape, n, 9).reshape(n, 3, 3) + effect).clip(0, 1)
        rows = compared.swap_rows(first, of(other), 0)
        parts.append(pd.DataFrame(rows).assign(variant=variant))
    table = compared.over_sentences(pd.concat(parts, ignore_index=True))
    return any("up to" in compared.said_swaps(own) for _, own in table.groupby("variant"))


def q5_swaps(rng: Rng, shape: str, n: int, effect: float) -> bool:
    rows = []
    for direction in DIRECTIONS:
        values = pairs(swapped(rng, shape, n, effect)[:, :2], direction, ("swapped",))
        values = values.isel(quantity=0, drop=True).rename(slot="site")
        own = values.transpose("pair", "kind", "site")
        rows += encoder_depth.swap_rows(own, 0, direction=direction)
    table = encoder_depth.over_sentences(pd.DataFrame(rows))
    each = [(str(kind), own) for (_, kind), own in table.groupby(["direction", "kind"])]
    return any("undecided" not in encoder_depth._flips(own, kind) for kind, own in each)
