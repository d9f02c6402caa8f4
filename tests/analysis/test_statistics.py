"""Intervals with known answers, exact small tests, and a calibrated null."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from hooked_vlm.analysis.statistics import (
    Interval,
    bootstrap,
    bootstrap_of,
    holm,
    paired_difference,
    sign_flip_test,
    simultaneous,
    wilson,
)
from hooked_vlm.errors import DataError


@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 50), (27, 50), (49, 50), (50, 50), (3, 7)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_equals_scipys(k, n, level):
    known = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    ours = wilson(k, n, level=level)
    assert ours.estimate == k / n
    assert ours.low == pytest.approx(known.low, abs=1e-12)
    assert ours.high == pytest.approx(known.high, abs=1e-12)


def test_wilson_known_values():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263).low == pytest.approx(0.2553, abs=5e-5)
    assert wilson(81, 263).high == pytest.approx(0.3662, abs=5e-5)
    assert (wilson(0, 20).low, round(wilson(0, 20).high, 4)) == (0.0, 0.1611)


@given(st.integers(1, 300), st.data())
@settings(max_examples=50)
def test_wilson_holds_its_estimate_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    interval, mirror = wilson(k, n), wilson(n - k, n)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-12)


def test_j2_rounding_of_a_sum_makes_no_rate_above_one():
    interval = wilson(7 * (1 + 5e-13), 7)
    assert interval.estimate == interval.high == 1.0
    with pytest.raises(DataError):
        wilson(7 * (1 + 1e-9), 7)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95.0])
def test_j2_a_level_is_between_0_and_1(level):
    for interval in (
        lambda: bootstrap(np.zeros(3), level=level),
        lambda: wilson(1, 2, level=level),
    ):
        with pytest.raises(DataError, match="expected a number between 0 and 1"):
            interval()


def test_a11_flips_test_symmetry_and_not_the_mean():
    """Draws of mean zero that are skewed are rejected in 0.65 of cases: see the docstring."""
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(200):
        rejected += sign_flip_test(np.where(rng.random(8) < 0.05, 0.95, -0.05)) <= 0.05
    assert 0.55 < rejected / 200 < 0.75


def test_wilson_of_an_array_is_that_of_each_entry():
    outcomes = np.random.default_rng(0).random((40, 3, 2)) < 0.7
    interval = wilson(outcomes.sum(axis=0), 40)
    assert interval.low.shape == (3, 2)
    for slot, kind in itertools.product(range(3), range(2)):
        single = wilson(int(outcomes[:, slot, kind].sum()), 40)
        assert interval.low[slot, kind] == single.low
        assert interval.at(slot, kind).high == single.high


def test_percentile_matches_students_interval_on_normal_data():
    values = np.random.default_rng(1).normal(size=30)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = bootstrap(values, n_resamples=40_000)
    width = known.high - known.low
    assert ours.low == pytest.approx(known.low, abs=0.05 * width)
    assert ours.high == pytest.approx(known.high, abs=0.05 * width)


@pytest.mark.parametrize("n", [10, 15])
def test_j2_few_pairs_get_students_interval_too(n):
    """The width that tells expanded intervals from plain ones: sqrt(n / (n - 1)) and t for z."""
    values = stats.norm.ppf((np.arange(n) + 0.5) / n)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = bootstrap(values, n_resamples=200_000)
    # At n = 15, leaving the factor out narrows the interval by 3.4 % and inverting it by 6.7 %.
    # A bootstrap of so few values is no normal distribution, which takes up to 0.8 % (and sampling
    # 0.3 %).
    assert ours.high - ours.low == pytest.approx(known.high - known.low, rel=0.02)
    same = bootstrap_of(values, lambda means: means, n_resamples=200_000)
    assert (same.low, same.high) == (pytest.approx(ours.low), pytest.approx(ours.high))


def test_bootstrap_resamples_the_same_rows_for_every_axis():
    values = np.random.default_rng(0).normal(size=(20, 4))
    together = bootstrap(np.stack([values, values + 3], axis=-1), n_resamples=500)
    assert together.estimate.shape == (4, 2)
    np.testing.assert_allclose(together.low[:, 1] - together.low[:, 0], 3, atol=1e-9)
    alone = bootstrap(values[:, 2], n_resamples=500)
    assert together.at(2, 0).low == pytest.approx(alone.low)
    assert together.at(2, 0).estimate == pytest.approx(alone.estimate)


def test_constant_values_have_no_width_and_no_nan():
    interval = bootstrap(np.full((10, 2), 0.3), n_resamples=200)
    np.testing.assert_allclose(np.stack([interval.low, interval.high]), 0.3)


def test_seed_decides_the_interval():
    values = np.random.default_rng(0).normal(size=25)
    first, again, other = (bootstrap(values, n_resamples=300, seed=s) for s in (0, 0, 1))
    assert (first.low, first.high) == (again.low, again.high)
    assert first.low != other.low


def test_blocks_do_not_change_the_sign_flip_or_bootstrap(monkeypatch):
    values = np.random.default_rng(0).normal(size=(40, 2))
    whole = bootstrap(values, n_resamples=400), sign_flip_test(values, n_resamples=400)
    monkeypatch.setattr("hooked_vlm.analysis.statistics._BLOCK", 40 * 64)
    parts = bootstrap(values, n_resamples=400), sign_flip_test(values, n_resamples=400)
    np.testing.assert_allclose(whole[0].low, parts[0].low)
    np.testing.assert_allclose(whole[1], parts[1])


def test_null_intervals_cover_zero_at_their_nominal_rate():
    """Simulated sweeps with no effect: skewed probabilities, same for both kinds."""
    rng = np.random.default_rng(0)
    covered, rejected, simulations = 0, 0, 400
    for seed in range(simulations):
        item = rng.normal(size=(50, 1))
        a, b = (1 / (1 + np.exp(-2 - item - rng.normal(size=(50, 1)))) for _ in range(2))
        covered += paired_difference(a, b, n_resamples=600, seed=seed).covers(0.0).item()
        rejected += int(sign_flip_test(a, b, n_resamples=600, seed=seed).item() <= 0.05)
    # Three standard errors of a rate of 0.05 over 400 simulations: 0.033.
    assert abs(covered / simulations - 0.95) < 0.033
    assert abs(rejected / simulations - 0.05) < 0.033


def test_holm_keeps_the_family_level_on_a_null_sweep():
    rng = np.random.default_rng(1)
    any_raw = any_holm = 0
    for seed in range(200):
        p = sign_flip_test(rng.normal(size=(30, 13)), n_resamples=400, seed=seed)
        any_raw += (p <= 0.05).any()
        any_holm += (holm(p) <= 0.05).any()
    assert any_raw / 200 > 0.3  # thirteen slots uncorrected: some "effect" half of the time
    assert any_holm / 200 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_a_real_difference_is_found_and_pairing_is_what_finds_it():
    rng = np.random.default_rng(0)
    item = rng.normal(scale=5, size=(60, 1))
    a = item + np.array([1.0, 0.0]) + rng.normal(scale=0.3, size=(60, 2))
    item = np.repeat(item, 2, axis=1)
    interval = paired_difference(a, item)
    assert not interval.covers(0.0)[0]
    assert interval.covers(1.0)[0]
    assert (holm(sign_flip_test(a, item)) <= 0.05).tolist() == [
        True,
        False,
    ]
    assert bootstrap(a).covers(float(item.mean())).all()  # unpaired, it drowns in the items


def test_sign_flip_is_exact_for_few_pairs():
    values = np.random.default_rng(0).normal(0.6, 1, size=(8, 2))
    known = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=2**8, axis=0
    ).pvalue
    np.testing.assert_allclose(sign_flip_test(values), known)
    assert sign_flip_test(np.ones(6)) == 2 / 2**6
    assert sign_flip_test(np.zeros(6)) == 1.0


def test_rounding_does_not_break_ties_of_the_sign_flip():
    whole = np.random.default_rng(0).integers(-3, 4, size=(9, 100))
    np.testing.assert_array_equal(sign_flip_test(whole * 0.1), sign_flip_test(whole))


def test_sampled_sign_flip_agrees_with_the_exact_one_and_is_never_zero():
    values = np.linspace(-1.0, 1.5, 12)
    exact = sign_flip_test(values, n_resamples=4096)
    assert 0.2 < exact < 0.8
    assert sign_flip_test(values, n_resamples=4000) == pytest.approx(exact, abs=0.03)
    assert sign_flip_test(np.ones(40), n_resamples=99) == 0.01


def test_holm_known_values():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([[0.9, 0.8]])), [[1.0, 1.0]])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50)
def test_holm_lies_between_raw_and_bonferroni(p):
    adjusted = holm(p)
    expected: Any = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(adjusted, expected, rtol=1e-12)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-12).all()


def test_tensors_are_welcome():
    values = torch.linspace(0, 1, 20)
    assert bootstrap(values.bfloat16(), n_resamples=50).n == 20
    assert paired_difference(values, values, n_resamples=50).estimate == 0.0


def test_interval_prints_and_indexes():
    assert str(Interval(0.5, 0.25, 0.75, 10, 0.95, "wilson")) == "0.500 [0.250, 0.750]"
    assert "shape=(3,)" in str(bootstrap(np.zeros((4, 3)), n_resamples=10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(np.zeros(1)), "at least 2 rows"),
        (lambda: bootstrap(np.array([0.0, np.nan])), "1 of 2 values are NaN"),
        (lambda: bootstrap(np.zeros(3), level=95.0), "level=95.0"),
        (lambda: bootstrap(np.zeros(3), level=0.0), "level=0.0"),
        (lambda: wilson(1, 2, level=1.0), "level=1.0"),
        (lambda: paired_difference(np.zeros((3, 2)), np.zeros(3)), "same pairs"),
        (lambda: wilson(3, 2), "0 <= successes <= n"),
        (lambda: wilson(0, 0), "n=0; expected a whole number of at least 1"),
        (lambda: holm([0.5, 1.5]), "outside"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_simultaneous_intervals_of_probabilities_end_at_their_bounds():
    values = np.random.default_rng(0).binomial(1, 0.95, size=(20, 5)).astype(float)
    free, cut = simultaneous(values), simultaneous(values, within=(0.0, 1.0))
    assert (free.high > 1).any()
    np.testing.assert_array_equal(cut.high, np.minimum(free.high, 1))
    np.testing.assert_array_equal(cut.low, free.low)
