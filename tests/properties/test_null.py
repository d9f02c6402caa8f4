"""Where there is no effect, intervals cover zero, and tests reject, as often as they say.

The experiments' own chain on data without an effect: 50 pairs, seven slots, kinds measured on
the same pairs; probabilities crowded at 0 and 1, with ties.
"""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from helpers.planted_models import planted
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.analysis.statistics import (
    bootstrap,
    holm,
    paired_difference,
    sign_flip_test,
    wilson,
)
from hooked_vlm.experiments.dual_mechanisms.swap_regions import cell_pairs
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.stimuli.pairs import swap_pair
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.sweeps.sweep import Sweep, final_logits


PAIRS, SLOTS = 50, 7


def allowed(replicates: int, rate: float) -> tuple[float, float]:
    """Rates between which a calibrated one lies, but for one time in a thousand."""
    low, high = binom.ppf([0.0005, 0.9995], replicates, rate)
    return low / replicates, high / replicates


def probabilities(rng: np.random.Generator, shape: str, size: tuple[int, ...]) -> np.ndarray:
    """Probabilities of an answer as sweeps give them."""
    if shape == "even":
        return rng.uniform(0, 1, size)
    if shape == "crowded":  # mostly near 0 or 1
        return rng.beta(0.3, 0.3, size)
    return np.round(rng.beta(0.2, 2.0, size), 1)  # nearly all 0, with many ties


def two_kinds(rng: np.random.Generator, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Two kinds on the same pairs `[pair, slot]`, of one distribution, slots alike in a pair."""
    common = probabilities(rng, shape, (PAIRS, 1))
    mixed = [
        np.where(
            rng.random((PAIRS, SLOTS)) < 0.4, common, probabilities(rng, shape, (PAIRS, SLOTS))
        )
        for _ in range(2)
    ]
    return mixed[0], mixed[1]


@pytest.mark.parametrize("shape", ["even", "crowded", "ties"])
def test_intervals_of_differences_cover_zero_at_their_rate(shape: str) -> None:
    rng, replicates = np.random.default_rng(1), 300
    covered = []
    for seed in range(replicates):
        a, b = two_kinds(rng, shape)
        interval = paired_difference(a, b, n_resamples=1000, seed=seed)
        covered.append(interval.covers(0.0))
    low, _ = allowed(replicates, 0.95)
    by_slot = np.mean(covered, axis=0)
    assert (by_slot >= low - 0.01).all(), by_slot  # a hundredth for 50 skewed pairs
    assert 0.93 <= by_slot.mean() <= 0.975


@pytest.mark.parametrize("shape", ["even", "crowded", "ties"])
def test_no_slot_is_rejected_in_more_than_one_family_of_twenty(shape: str) -> None:
    rng, replicates = np.random.default_rng(2), 300
    rejected = []
    for seed in range(replicates):
        a, b = two_kinds(rng, shape)
        p = sign_flip_test(a, b, n_resamples=2000, seed=seed)
        rejected.append((holm(p) <= 0.05).any())
    _, high = allowed(replicates, 0.05)
    assert np.mean(rejected) <= high


@pytest.mark.parametrize("rate", [0.05, 1 / 3, 0.9])
def test_intervals_of_rates_cover_the_rate(rate: float) -> None:
    rng, replicates = np.random.default_rng(3), 4000
    counts = rng.binomial(PAIRS, rate, replicates)
    covered = [wilson(float(count), PAIRS).covers(rate) for count in counts]
    assert 0.93 <= np.mean(covered) <= 0.985


def test_tokens_are_not_observations() -> None:
    """Were tokens resampled instead of pairs, the interval would be far too short."""
    rng, replicates = np.random.default_rng(4), 200
    by_pair, by_token = [], []
    for seed in range(replicates):
        # 16 tokens of a pair share nearly all that they have.
        values = rng.normal(0, 1, (PAIRS, 1)) + rng.normal(0, 0.2, (PAIRS, 16))
        by_pair.append(bootstrap(values.mean(1), n_resamples=1000, seed=seed).covers(0.0))
        by_token.append(bootstrap(values.ravel(), n_resamples=300, seed=seed).covers(0.0))
    assert np.mean(by_pair) >= allowed(replicates, 0.95)[0]
    assert np.mean(by_token) < 0.6


def test_a_planted_model_without_the_effect_shows_none() -> None:
    """Swaps in noisy runs of a model that reads objects alone: strips do no more than objects.

    The same noise stands under both kinds, so their difference is noise of one distribution;
    over many draws, intervals of it cover zero, and the family is rarely rejected.
    """
    model = planted("object")
    setting = Setting(model, stimulus_set("squares"), 16)
    tuples = [("red", "green", "blue"), ("gray", "black", "brown"), ("blue", "red", "gray")] * 4
    pairs = [swap_pair("left", names) for names in tuples]
    source = setting.inputs([pair.counterfactual for pair in pairs])
    regions = {k: cell_pairs(setting.geometry, "horizontal", k) for k in ("strip", "object")}
    sweep = Sweep(
        setting.inputs([pair.clean for pair in pairs]),
        {"kind": list(regions), "slot": [0, 1, 2]},
        make=lambda kind, slot: Patch(slot, at=regions[kind], source=source),
    )
    answers = [pair.swapped_answer for pair in pairs]
    logits = sweep.run(
        model, lambda x: final_logits(x).flatten(1), dims=("pair", "token"), logits_to_keep=1
    )
    values = torch.from_numpy(logits.values)
    clean = target_probability(values.flatten(0, 1).flatten(0, 1), model.tokenizer, answers * 6)
    exact = clean.reshape(2, 3, len(pairs)).numpy()
    np.testing.assert_allclose(exact[0], exact[1], atol=1e-4)  # no effect to begin with

    covered, rejected, noise = [], [], torch.Generator().manual_seed(0)
    for seed in range(120):
        shaken = values + 3 * torch.randn(values.shape, generator=noise)
        found = target_probability(
            shaken.flatten(0, 1).flatten(0, 1), model.tokenizer, answers * 6
        ).reshape(2, 3, len(pairs))
        strip, inside = (kind.T.numpy() for kind in found)
        covered.append(paired_difference(strip, inside, n_resamples=1000, seed=seed).covers(0.0))
        p = sign_flip_test(strip, inside, n_resamples=2000, seed=seed)
        rejected.append((holm(p) <= 0.05).any())
    assert np.mean(covered) >= allowed(360, 0.95)[0] - 0.02  # twelve pairs are few
    assert np.mean(rejected) <= allowed(120, 0.05)[1]
