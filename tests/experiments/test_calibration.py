"""Whole experiments on simulated measurements: how often verdicts claim what is not there.

`tests/helpers/simulated_cases.py` lists the cases; a claim in any sentence of a verdict counts.
`python tests/calibration.py` writes the measured shares to docs/measured/calibration.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import calibration
import pandas as pd
import pytest
from scipy.stats import binom

from helpers.simulated import SHAPES, fewer_resamples
from helpers.simulated_cases import CASES, LIMIT, SIZES, claimed, most
from hooked_vlm.experiments.verdicts import adjusted


@pytest.fixture(autouse=True)
def few_resamples() -> Iterator[None]:
    with fewer_resamples():
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_verdict_claims_nothing_under_the_null(name: str) -> None:
    draws = CASES[name].quick
    cases = zip(SHAPES, (50, 8, 20, 8, 8, 2), strict=True)
    claims = sum(claimed(name, shape, n, 0.0, draws) for shape, n in cases)
    assert claims <= binom.ppf(0.999, draws * len(SHAPES), LIMIT)


@pytest.mark.parametrize("name", CASES)
def test_a_verdict_finds_a_planted_effect(name: str) -> None:
    case = CASES[name]
    assert claimed(name, "symmetric", 50, case.effect, case.quick) == case.quick


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_a_verdict_claims_in_one_draw_of_twenty_at_most(name: str, shape: str, n: int) -> None:
    assert claimed(name, shape, n, 0.0, 200) <= most(200)


def test_one_family_has_the_sentences_of_all_directions() -> None:
    rows = [{"quantity": "a", "p": p, "p_holm": p} for p in (0.01, 0.02, 0.04)]
    rows += [{"quantity": "b", "p": 0.04, "p_holm": 0.04}, {"quantity": "a"}]
    table = pd.DataFrame(rows)
    found = adjusted(table, table["quantity"] == "a")["p_holm"]
    assert found.tolist()[:4] == pytest.approx([0.03, 0.04, 0.04, 0.04]) and found.isna()[4]


def test_the_page_shows_the_shape_with_the_most_claims() -> None:
    about = {"case": "E2", "n": 8, "effect": 0.0}
    rows = [
        {**about, "shape": "skewed", "draws": 75, "claims": 0},
        {**about, "shape": "binary", "draws": 200, "claims": 8},
        {**about, "shape": "symmetric", "effect": 0.8, "draws": 50, "claims": 50},
        *({**about, "shape": s, "n": 2, "draws": 20, "claims": 0} for s in SHAPES),
    ]
    page = calibration.page(rows)
    assert "| 2 | no shape | 120 | 0.000 [0.000, 0.030] |" in page
    assert "| 8 | binary | 200 | 0.040 [0.017, 0.077] | 0.105 |" in page
    assert "| E2 | clean over others, 0.8 | 1.000 [0.929, 1.000] |" in page


def test_the_measured_cases_are_within_their_limit() -> None:
    file = Path(calibration.DOCS) / "calibration.json"
    rows = json.loads(file.read_text())
    assert {row["case"] for row in rows} == set(CASES)
    for row in rows:
        if row["effect"]:
            assert row["claims"] >= 0.9 * row["draws"], row
        else:
            assert row["claims"] <= most(row["draws"]), row
