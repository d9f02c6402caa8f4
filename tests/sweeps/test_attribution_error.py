"""An estimate beside the exact sweep: known answers, prompts as the unit, errors in words."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import pearsonr, spearmanr

from hooked_vlm.errors import DataError
from hooked_vlm.sweeps.attribution_error import QUANTITIES, agreement_table, attribution_error


def sweeps(
    prompts: int = 40, noise: float = 0.3
) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """An exact sweep, an estimate with noise, and clean scores that differ by prompt."""
    random = np.random.default_rng(0)
    clean = xr.DataArray(10 * random.normal(size=prompts), dims="batch")
    effects = random.normal(size=(2, 5, prompts))
    coords = {"kind": ["a", "b"], "slot": range(5)}
    exact = xr.DataArray(effects, dims=("kind", "slot", "batch"), coords=coords)
    return exact + noise * random.normal(size=effects.shape) + clean, exact + clean, clean


def test_it_is_of_effects_and_known() -> None:
    estimate, exact, clean = sweeps()
    found = attribution_error(estimate, exact, clean)
    x, y = ((a - clean).values.ravel() for a in (estimate, exact))
    assert found.pearson.estimate == pytest.approx(pearsonr(x, y)[0])
    assert found.spearman.estimate == pytest.approx(spearmanr(x, y)[0])
    assert found.error.estimate == pytest.approx(np.abs(x - y).mean())
    assert found.size.estimate == pytest.approx(np.abs(y).mean())
    assert found.sign.estimate == pytest.approx((np.sign(x) == np.sign(y)).mean())
    assert (found.cells, found.error.n) == (10, 40)
    for quantity in QUANTITIES:
        interval = getattr(found, quantity)
        assert interval.low < interval.estimate < interval.high
    assert "Pearson 0.9" in str(found)


def test_no_effect_everywhere_does_not_agree() -> None:
    """Clean scores alone would make it look well correlated."""
    _, exact, clean = sweeps()
    nothing = xr.zeros_like(exact) + clean
    assert np.corrcoef(nothing.values.ravel(), exact.values.ravel())[0, 1] > 0.9
    found = attribution_error(nothing, exact, clean)
    assert np.isnan(found.pearson.estimate) and np.isnan(found.spearman.low)
    assert found.sign.estimate == 0
    assert found.error.estimate == pytest.approx(found.size.estimate)


def test_perfect_agreement_and_one_prompt() -> None:
    _, exact, clean = sweeps(prompts=1)
    found = attribution_error(exact, exact, clean)
    assert found.pearson.estimate == pytest.approx(1)
    assert (found.sign.estimate, found.error.estimate) == (1, 0)
    assert np.isnan(found.pearson.low) and np.isnan(found.error.high)


def test_signs_are_those_of_effects_that_are_there() -> None:
    exact = xr.DataArray([[0.0, 1.0, -1.0], [0.0, 2.0, 1e-9]], dims=("cell", "batch"))
    estimate = xr.DataArray([[5.0, 1.0, 1.0], [-5.0, 1.0, -1.0]], dims=("cell", "batch"))
    assert attribution_error(estimate, exact, 0).sign.estimate == pytest.approx(2 / 3)


def test_a_table_by_axis() -> None:
    estimate, exact, clean = sweeps()
    table = agreement_table(estimate, exact, clean, ["slot"], n_resamples=200)
    assert list(table.columns) == ["slot", "quantity", "value", "low", "high", "n"]
    assert len(table) == 5 * len(QUANTITIES)
    row = table[(table["slot"] == 3) & (table["quantity"] == "error")].iloc[0]
    one = attribution_error(estimate.sel(slot=3), exact.sel(slot=3), clean, n_resamples=200)
    assert (row["value"], row["low"]) == (one.error.estimate, one.error.low)
    both = agreement_table(estimate, exact, clean, ["kind", "slot"], n_resamples=50)
    assert len(both) == 10 * len(QUANTITIES)


def test_what_cannot_be_compared_is_said() -> None:
    estimate, exact, clean = sweeps()
    with pytest.raises(DataError, match="same sweep and metric"):
        attribution_error(estimate.isel(slot=[0]), exact, clean)
    with pytest.raises(DataError, match="no axis 'pair'"):
        attribution_error(estimate, exact, clean, prompt="pair")
    with pytest.raises(DataError, match="no axis 'layer'"):
        agreement_table(estimate, exact, clean, ["layer"])
    with pytest.raises(DataError, match="NaN or infinite"):
        attribution_error(estimate.where(estimate > 0), exact, clean)
