"""The same for experiments that read probes (E3, E8, Q5, Q7, Q8), and for Q1 and Q6."""

import re

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import expit

from helpers.simulated import AXES, DIRECTIONS, Rng, answered, centred
from hooked_vlm.experiments.dual_mechanisms import order_reading, ordering_probes
from hooked_vlm.experiments.further import (
    absolute_or_relative,
    alpha_transfer,
    cut_verdicts,
    encoder_depth,
    gap_verdicts,
    grid_probes,
    redundancy,
)
from hooked_vlm.stimuli.pairs import Question


PROBES = 2
"""Probes with other initialisations: a verdict is about their mean."""


def shares(rng: Rng, shape: str, n: int, mean: float, effect: float = 0.0) -> np.ndarray:
    """Shares of tokens of this mean, `[probe, image]`; for yes/no shapes all tokens or none."""
    if shape in ("binary", "clustered"):
        made = rng.random(n) < mean + effect
        return np.repeat(made[None].astype(float), PROBES, axis=0)
    widest = 2 * min(mean, 1 - mean)
    return (mean + effect + widest * centred(rng, shape, n, PROBES).T).clip(0, 1)


def e3(rng: Rng, shape: str, n: int, effect: float, background: bool = False) -> bool:
    """Probes at chance; or well above, where the background is read with one object too."""
    rows = []
    for axis in AXES:
        accuracy, halves = (0.9, 2 / 3) if background else (1 / 3, 2 / 3)
        own = 0.0 if background else effect
        right = shares(rng, shape, n, accuracy, own)
        chance = np.stack([shares(rng, shape, n, 1 / 3)[0] for _ in range(20)])
        read = {
            "accuracy, claim": right,
            "converged, claim": shares(rng, shape, n, accuracy, own)[:1],
            "background, claim": shares(rng, shape, n, 0.9 if background else halves),
            "background, middle strip": shares(rng, shape, n, 0.8 if background else 1 / 3),
        }
        surplus = centred(rng, shape, n, PROBES).T + (effect if background else 0.0)
        read[ordering_probes.SURPLUS] = surplus.clip(-1, 1)
        rows += ordering_probes.claims(read, halves, 0, axis)
        made = order_reading.accuracy_rows(right, read["converged, claim"][0], chance, 0)
        rows += [{**row, "axis": axis} for row in made]
    table = ordering_probes.over_sentences(pd.DataFrame(rows))
    found = [ordering_probes.finding(table[table["axis"] == axis])[0] for axis in AXES]
    if background:  # that the objects' order is read is true here
        return any("from the background, as in the paper" in said for said in found)
    claims = ("order is read from", "convergence reads the order")
    return any(claim in said for said in found for claim in claims)


def e3_background(rng: Rng, shape: str, n: int, effect: float) -> bool:
    return e3(rng, shape, n, effect, background=True)


def e8(rng: Rng, shape: str, n: int, effect: float) -> bool:
    rows = []
    for k in (2, 3):
        for label in grid_probes.LABELS:
            made = grid_probes.claims(shares(rng, shape, n, 1 / k, effect), k, 0)
            rows += [{**row, "kind": f"{k}x{k}", "axis": label} for row in made]
    table = grid_probes.over_sentences(pd.DataFrame(rows))
    means = table[table["probe"].isna()]
    return any(grid_probes._read(row) == "read" for _, row in means.iterrows())


def q5_reading(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Probes at three depths, all of them at chance, on two axes."""
    nulls = np.array([1 / 3, 2 / 3, 1 / 3])[:, None, None]
    rows = []
    for axis in AXES:
        noise = [centred(rng, shape, n, 3 * PROBES).T.reshape(3, PROBES, n) for _ in range(3)]
        read = [(nulls + 0.6 * one + effect).clip(0, 1) for one in noise]
        rows += encoder_depth.reading_claims(read, 2 / 3, 0, axis=axis)
    table = encoder_depth.over_sentences(pd.DataFrame(rows))
    said = [encoder_depth._of_axis(table[table["axis"] == axis], 3) for axis in AXES]
    return any("does not clearly read" not in one for one in said)


def q1(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Strengths change answers at random, on three settings; directions do not matter."""
    settings = ("squares", "shapes", "objects")
    config = alpha_transfer.Config(settings=settings, alphas=(0.0, 1.0, 2.0))
    right, asked = {}, {}
    for target in settings:
        base, pictures, rate = answered(rng, shape, n)
        direction = [DIRECTIONS[i // n] for i in range(len(base))]
        names = [(f"a{i}", "x", f"b{i}") for i in pictures]
        asked[target] = [Question(name, d) for name, d in zip(names, direction, strict=True)]
        for source in settings:
            now = rng.random((2, n)) < rate + (1 - rate) * effect
            every = now[:, np.arange(len(base)) % n]
            right[source, target] = np.stack([base, *every]).astype(float)
    said = alpha_transfer._verdict(alpha_transfer._table(right, asked, config), settings)
    helped = re.findall(r"that help: (\d+) of \d+, that harm: (\d+)", said)
    return any(int(count) for counts in helped for count in counts)


def q6(rng: Rng, shape: str, n: int, effect: float, signals: bool = True) -> bool:
    """Two signals that add up in log odds; or none, so that nothing is needed."""
    means = np.array([1.6, 0.8, 0.8, 0.0]) if signals else np.zeros(4)
    # With an effect, each can replace the other.
    means = means + effect * np.array([0.0, 1.0, 1.0, -1.0] if signals else [2.0, 2.0, 2.0, -2.0])
    values, asked = {}, {}
    for direction in DIRECTIONS:
        odds = means[:, None] + 6.0 * centred(rng, shape, n, 4).T
        own = np.zeros((4, n, len(redundancy.QUANTITIES)))
        own[..., 0], own[..., 1] = odds > 0, odds <= 0
        own[..., -2], own[..., -1] = expit(odds), odds
        values[direction] = own
        asked[direction] = [Question((f"a{i}", direction, f"b{i}"), direction) for i in range(n)]
    said = redundancy._verdict(redundancy._table(values, asked, 0))
    claim = ("found: redundant", "found: complementary") if signals else (": found:",)
    return any(one in said for one in claim)


def q6_none(rng: Rng, shape: str, n: int, effect: float) -> bool:
    return q6(rng, shape, n, effect, signals=False)


def q7(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Readings that are relative and absolute alike, at two gaps on two axes."""
    rows = []
    for axis in AXES:
        accuracy = absolute_or_relative._accuracy_claim(np.full((PROBES, n), 0.95), 0)
        rows += [{**row, "axis": axis} for row in accuracy]
        for gap in (0, 1):
            relative = (0.5 + centred(rng, shape, n, PROBES).T + effect).clip(0, 1)
            three = np.stack([relative, 1 - relative, 0 * relative], axis=-1)[None].repeat(2, 0)
            one = np.zeros_like(three)
            one[..., 1] = 1
            made = absolute_or_relative._claims(three, one, np.full((PROBES, n), 0.95), 0)
            for shown, values in (("three", three), ("alone", one)):
                made += absolute_or_relative._share_rows(values, 0, shown=shown)
            rows += [{**row, "axis": axis, "gap": gap} for row in made]
    table = gap_verdicts.adjusted(pd.DataFrame(rows).assign(place=np.nan))
    return "the code is mostly" in gap_verdicts.verdict(table, (0, 1))


def q8(rng: Rng, shape: str, n: int, effect: float) -> bool:
    """Cuts that do nothing, on two axes."""
    parts = []
    for axis in AXES:
        noise = centred(rng, shape, n, 18 * PROBES).T.reshape(3, 1, 3, PROBES, 2, n)
        noise = noise.swapaxes(-1, -2)  # of one picture: all cuts, conditions and quantities
        values = 0.7 + 0.5 * noise
        values[:, :, 1] -= effect
        made = xr.DataArray(
            values.clip(0, 1),
            dims=("kind", "layer", "condition", "probe", "image", "quantity"),
            coords={
                "kind": list(cut_verdicts.CUTS),
                "layer": [cut_verdicts.ALL],
                "condition": [cut_verdicts.INTACT, cut_verdicts.CUT, cut_verdicts.RANDOM],
                "quantity": list(cut_verdicts.QUANTITIES),
            },
        )
        parts.append(pd.DataFrame(cut_verdicts.claims(made, cut_verdicts.QUANTITIES, 0)))
        parts[-1]["axis"] = axis
    table = cut_verdicts.over_sentences(pd.concat(parts, ignore_index=True))
    means = table[table["probe"].isna()].groupby(["axis", "kind", "quantity"])
    return any(cut_verdicts.writes(own).outcome == "found" for _, own in means)
