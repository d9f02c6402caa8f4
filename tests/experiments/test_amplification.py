"""E7: exact at alpha 0, honest about what it breaks, and about how alpha was chosen."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.planted_models import planted
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.dual_mechanisms import amplification
from hooked_vlm.experiments.dual_mechanisms.amplification import (
    Config,
    Plan,
    outcomes,
)
from hooked_vlm.experiments.dual_mechanisms.amplified_accuracy import (
    CONTROLS,
    FORMULAS,
    held_out_change,
    table_of,
    verdict_of,
)
from hooked_vlm.experiments.further import alpha_transfer
from hooked_vlm.experiments.registry import select
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.stimuli.settings import stimulus_set


QUICK = Config(
    setting="squares",
    items=3,
    alphas=(0.0, 4.0),
    controls=2,
    batch_size=12,
)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(planted("object"), stimulus_set("squares"), 12)


def test_alpha_0_is_an_exact_replay(setting: Setting) -> None:
    plan = Plan.of(setting, "horizontal", QUICK)
    inputs = setting.inputs(plan.asked)
    with torch.no_grad():
        clean = setting.model(inputs)
        for (_, _, alpha), steer in plan.conditions(QUICK).items():
            logits = setting.model.run_with_hooks(inputs, [steer])
            assert torch.equal(logits, clean) == (alpha == 0)


def test_questions_are_about_pictures_that_the_probe_has_not_seen(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list = []
    fit = amplification.fit_directions

    def noted(setting: Setting, questions: list, *seeds: int) -> tuple:
        seen.extend(q.entities for q in questions)
        return fit(setting, questions, *seeds)

    monkeypatch.setattr(amplification, "fit_directions", noted)
    plan = Plan.of(setting, "vertical", Config(setting="squares", items=0))
    assert {q.direction for q in plan.asked} == {"above", "below"}
    asked = {q.entities for q in plan.asked}
    assert not asked & set(seen)
    assert len(asked) == len(seen) == 60


def test_every_condition_of_every_item_is_there(setting: Setting) -> None:
    plan = Plan.of(setting, "horizontal", QUICK)
    found = outcomes(setting, plan, plan.asked, QUICK)
    assert set(found) == {*FORMULAS, *CONTROLS}
    assert {found[kind].shape for kind in FORMULAS} == {(1, 2, 6)}
    assert {found[kind].shape for kind in CONTROLS} == {(2, 2, 6)}
    for verdicts in found.values():
        assert verdicts[:, 0].all()  # the planted model is right where nothing is done


def test_controls_have_the_energy_they_say(setting: Setting) -> None:
    plan = Plan.of(setting, "horizontal", QUICK)
    norms = plan.directions.norm(dim=1)
    assert set(plan.controls) == set(CONTROLS)
    for kind, rows in plan.controls.items():
        assert len(rows) == 2
        for each in rows:
            if kind == "random, orthonormal":
                torch.testing.assert_close(each @ each.T, torch.eye(len(each)))
                continue
            torch.testing.assert_close(each.norm(dim=1), norms[: len(each)])
            assert not torch.allclose(each, plan.directions[: len(each)], atol=1e-2)
    assert [len(rows[0]) for rows in plan.controls.values()] == [3, 3, 2, 1]


def test_corrected_and_broken_are_counted_apart() -> None:
    base = np.array([True, True, True, False, False])
    now = np.array([False, True, True, True, False])
    right = {kind: np.stack([base, now])[None] for kind in (*FORMULAS, *CONTROLS)}
    table = table_of(right, list("abcde"), (0.0, 3.0), 0)
    rows: Any = table[(table["kind"] == "released") & (table["alpha"] == 3)]
    rows = rows.set_index("quantity")
    assert rows.loc["corrected", ["value", "n"]].tolist() == [0.5, 2]
    assert rows.loc["broken", "value"] == pytest.approx(1 / 3)
    assert rows.loc["net", "value"] == 0
    assert "improves accuracy, more" not in verdict_of(table)


def test_a5_both_questions_about_a_picture_are_in_one_half() -> None:
    pictures = [f"picture {i // 2}" for i in range(40)]
    share = np.zeros((3, 40))
    share[1, :20] = share[2, 20:] = 1  # a strength that is good for some pictures alone
    for seed in range(10):
        change = held_out_change(share, share[0], pictures, seed)
        assert (change[0::2] == change[1::2]).all()


def test_a_strength_is_chosen_on_the_other_half() -> None:
    rng = np.random.default_rng(0)
    gains = []
    for seed in range(40):  # no strength helps: the best one on the items reads high
        share = rng.random((16, 60)) < 0.5
        base = share[0].astype(float)
        change = held_out_change(share.astype(float), base, range(60), seed)
        gains.append((change.mean(), (share.mean(1).max() - base.mean())))
    held, best = np.mean(gains, axis=0)
    assert abs(held) < 0.04 < 0.06 < best

    share = np.zeros((3, 8))
    share[1] = 1  # one strength corrects everything, for both halves
    assert (held_out_change(share, share[0], range(8), 0) == 1).all()


def said_by_e7(
    gain: float, random_gain: float, n_controls: int = 20, other_end: bool = True, n: int = 80
) -> str:
    """What E7 says where a share of wrong answers are corrected by the directions and by chance."""
    rng = np.random.default_rng(0)
    base = np.arange(n) % 2 == 0
    right = {}
    for kind in (*FORMULAS, *CONTROLS):
        seeds = n_controls if kind in CONTROLS else 1
        share = random_gain if kind in CONTROLS else gain
        now = base | (rng.random((seeds, n)) < share)
        right[kind] = np.stack([np.broadcast_to(base, now.shape), now], axis=1)
    kinds = np.zeros((n, 4), dtype=bool)
    kinds[np.arange(n), np.where(base, 0, 1 if other_end else 3)] = True
    verdict = verdict_of(table_of(right, range(n), (0.0, 4.0), 0, kinds))
    return next(line for line in verdict.splitlines() if line.startswith("Released"))


def test_a8_amplification_is_held_against_its_own_random_directions() -> None:
    assert "improves accuracy, more than random directions do" in said_by_e7(0.9, 0.1)
    assert "no more than random directions do" in said_by_e7(0.6, 0.6, n=400)
    assert "undecided: 3 random directions, and 20 are needed" in said_by_e7(0.9, 0.1, 3)
    assert "does not improve accuracy" in said_by_e7(0.0, 0.0)
    assert "undecided whether" in said_by_e7(0.5, 0.3, n=30)


def test_a9_amplified_order_is_not_blamed_for_names() -> None:
    said = said_by_e7(0.9, 0.1, other_end=False)
    assert "undecided: 0 pictures with an ordering error" in said
    assert "which amplified order cannot repair" in said


def test_a8_nothing_to_correct_is_no_negative_finding() -> None:
    base = np.ones((1, 2, 40), dtype=bool)
    right: Any = dict.fromkeys((*FORMULAS, *CONTROLS), base)
    kinds = np.tile([True, False, False, False], (40, 1))
    said = verdict_of(table_of(right, range(40), (0.0, 4.0), 0, kinds))
    assert "undecided: nothing to correct" in said and "does not improve" not in said


def test_the_share_of_probes_with_the_same_outcome_is_said() -> None:
    """Of five probes two have directions that correct answers, and three do not."""
    rng, n = np.random.default_rng(0), 80
    base = np.arange(n) % 2 == 0

    def answers(gain: float, seeds: int = 1) -> np.ndarray:
        now = base | (rng.random((seeds, n)) < gain)
        return np.stack([np.broadcast_to(base, now.shape), now], axis=1)

    right = {kind: answers(0.9) for kind in FORMULAS} | {k: answers(0.1, 20) for k in CONTROLS}
    again = [{kind: answers(gain) for kind in FORMULAS} for gain in (0.9, 0.0, 0.0, 0.0)]
    table = table_of(right, range(n), (0.0, 4.0), 0, again=again)
    alone = table_of(right, range(n), (0.0, 4.0), 0)
    assert "(0." in verdict_of(alone) and "probes" not in verdict_of(alone)
    said = next(line for line in verdict_of(table).splitlines() if line.startswith("Released"))
    assert said.startswith("Released: improves accuracy, more than random directions do")
    assert "2 of 5 probes with other initialisations say the same" in said
    # The numbers without a probe are those of the first one, as without the others.
    means = table[table["probe"].isna()].drop(columns="probe").reset_index(drop=True)
    assert means.equals(alone)


def test_a_whole_run(setting: Setting) -> None:
    told: list[tuple[int, int]] = []
    result = amplification.run(setting.model, QUICK, lambda *step: told.append(step))
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] == 2
    table = result.table
    assert set(table["kind"]) == {*FORMULAS, *CONTROLS, "baseline"}
    assert "corrected" not in set(table["quantity"])  # nothing was wrong
    assert "nothing to correct" in result.verdict
    assert np.isfinite(table[["value", "low", "high"]].to_numpy()).all()


def test_strength_is_carried_over_from_every_setting_to_every_other() -> None:
    model = planted("object")
    config = alpha_transfer.Config(
        settings=("squares", "squares-photos"), items=2, alphas=(0.0, 4.0), batch_size=12
    )
    told: list[tuple[int, int]] = []
    result = alpha_transfer.run(model, config, lambda *step: told.append(step))
    assert told[0] == (0, 8) and told[-1] == (8, 8)
    net = result.table[result.table["quantity"] == "net"]
    assert sorted(zip(net["source"], net["target"], strict=True)) == [
        ("squares", "squares"),
        ("squares", "squares-photos"),
        ("squares-photos", "squares"),
        ("squares-photos", "squares-photos"),
    ]
    assert set(net[net["source"] == net["target"]]["kind"]) == {"itself"}
    intact = result.table[result.table["kind"] == "intact"].set_index("target")["value"]
    assert intact["squares"] == 1
    transferred = net[net["kind"] == "transferred"]
    assert set(transferred["alpha"]) <= {0.0, 4.0}
    # The planted model is right everywhere: no strength helps.
    assert "nothing to transfer" in result.verdict or " of 1, that harm: " in result.verdict


@pytest.mark.parametrize("alphas", [(4.0, 0.0), (4.0, 8.0), (0.0, 4.0, 4.0), ()])
@pytest.mark.parametrize("name", ["E7", "Q1", "R2"])
def test_strengths_begin_with_none_and_are_different(name: str, alphas: tuple[float, ...]) -> None:
    # All changes are from the accuracy without amplification: (4, 0) once gave that of strength 4.
    make: Any = select(name).config
    with pytest.raises(DataError, match=r"different strengths, first 0|alphas is empty"):
        make(alphas=alphas)
