"""E1 to E4 from end to end, on planted models whose answers are known (and the shipped ones)."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.forward_counter import count_forwards
from helpers.planted_models import planted
from hooked_vlm.errors import CannotRunError, DataError, HookedVLMWarning, UnsupportedModelError
from hooked_vlm.experiments.dual_mechanisms import final_token, strip_swap
from hooked_vlm.experiments.dual_mechanisms.failed_pairs import failing_pictures
from hooked_vlm.experiments.dual_mechanisms.swap_regions import ALIGNED, SwapRegions, cell_pairs
from hooked_vlm.experiments.options import Config
from hooked_vlm.experiments.registry import EXPERIMENTS, SUITES, steps
from hooked_vlm.experiments.result import SHOWN_CASES, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.geometry import PAPER_GEOMETRY
from hooked_vlm.stimuli.pairs import swap_pair
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.zoo import available


CORE = SUITES["dual-mechanisms"]
NUMBERS = {"value", "low", "high", "n"}
QUICK = Config(pairs=4, batch_size=8)
WIDE = Config(pairs=2, batch_size=80)  # where nothing depends on how questions are batched


def ran(name: str, coded: str, config: Config) -> tuple[Result, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    model = planted(coded)
    result = EXPERIMENTS[name].run(model, config, lambda done, total: told.append((done, total)))
    return result, told


@cache
def run(name: str, coded: str = "background") -> tuple[Result, list[tuple[int, int]]]:
    """A result, shared by the tests that look at it."""
    return ran(name, coded, QUICK if name in ("final-token", "strip-swap") else WIDE)


def rows(result: Result, **wanted: Any) -> pd.DataFrame:
    table = result.table
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


@pytest.mark.parametrize("name", CORE)
def test_results_are_whole_and_progress_reaches_its_total(name: str) -> None:
    result, told = run(name)
    assert set(result.table.columns) >= NUMBERS
    finite = result.table[["value", "low", "high"]]
    assert np.isfinite(finite.to_numpy()).all()
    assert (finite["low"] <= finite["value"] + 1e-9).all()
    assert (finite["value"] <= finite["high"] + 1e-9).all()
    assert (result.table["n"] > 0).all()
    for text in (result.verdict, result.claim, result.title, result.section, *result.notes):
        assert text.strip()
    assert result.images or name == "final-token"
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] > 0
    assert EXPERIMENTS[name].id == result.id


def test_e1_counts_every_item_once() -> None:
    result, _ = run("behaviour")
    assert result.table["direction"].tolist() == ["left", "right", "above", "below", "all"]
    assert result.table["n"].tolist() == [120, 120, 120, 120, 240]
    assert (result.table["value"] == 1).all()
    assert "(240 pictures)" in result.verdict
    assert "1.00" in result.verdict
    assert "equal in all directions" in result.verdict
    assert result.cases is not None
    assert len(result.cases.table) == 480 and result.cases.failing.empty
    assert result.cases.table["case"].is_unique


def test_e2_finds_the_three_stages_that_were_planted() -> None:
    result, _ = run("final-token")
    assert set(result.table["direction"]) == {"left", "right", "above", "below", "all"}
    assert result.table["site"].unique().tolist() == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    ]
    for direction in result.table["direction"].unique():
        for slot, quantity in enumerate(final_token.ANSWERS):
            here = rows(result, direction=direction, slot=slot).set_index("quantity")["value"]
            for answer in final_token.ANSWERS:
                assert here[answer] > 0.99 if answer == quantity else here[answer] < 0.01
                assert here[f"agreement, {answer}"] == (answer == quantity)
            odds = here[list(final_token.LOG_ODDS)]
            if quantity == "clean":
                assert (odds < -4).all()
            else:
                assert odds[f"log odds, {quantity}"] > 4
    assert "three stages follow each other as in the paper" in result.verdict
    assert "highest at slot 1" in result.verdict
    assert result.arrays["pairs_left"].sizes == {
        "slot": 3,
        "pair": 4,
        "quantity": 8,
    }
    assert result.cases is not None and not result.images
    each = result.cases.table
    assert each["ok"].all() and set(each["at slot"]) == {1} and len(each) == 16
    assert each["case"].is_unique and each["case"][0].startswith("left, horizontal: ")


def test_e2_names_the_pairs_whose_ordering_answer_is_never_the_most_probable() -> None:
    result, _ = run("final-token")
    values = result.arrays["pairs_left"].copy()
    values[{"pair": 2}] *= 0.4
    cases = final_token.cases_of({"left": values})
    assert cases.failing.index.tolist() == [2]
    assert cases.failing["ordering"].item() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("winners", "says"),
    [
        (["clean", "ordering", "attribute", "attribute"], "follow each other as in the paper"),
        (["clean", "", "ordering", "attribute"], "follow each other as in the paper"),
        (["clean", "attribute"], "Unlike in the paper, there is no ordering stage"),
        (["clean", "", "attribute"], "Undecided whether there is a stage of ordering"),
        (["clean"], "no ordering and no attribute stage"),
        (["clean", "ordering", "clean", "attribute"], "not in the paper's order"),
    ],
)
def test_e2_says_which_stage_is_not_there(winners: list[str], says: str) -> None:
    stages = {a: [i for i, w in enumerate(winners) if w == a] for a in final_token.ANSWERS}
    unclear = [i for i, winner in enumerate(winners) if not winner]
    assert says in final_token._against_the_paper(stages, unclear)


@pytest.mark.parametrize("coded", ["background", "object"])
def test_e3_finds_the_order_in_the_background_where_it_is(coded: str) -> None:
    result, _ = run("ordering-probes", coded)
    for axis in ("horizontal", "vertical"):
        here = rows(result, axis=axis)
        value = here[here["probe"].isna()].set_index("quantity")["value"]
        assert value["accuracy"] == 1 and value["p, shuffled"] == pytest.approx(1 / 21)
        assert 0.1 < value["shuffled"] < 0.56
        if coded == "background":
            assert value["background"] > 0.55
        else:
            assert value["background"] < 0.47
        assert value["background, shuffled"] < 0.5
    assert result.arrays["mean_maps"].dims == ("axis", "class", "row", "col")
    np.testing.assert_allclose(result.arrays["item_maps"].sum("class"), 1, rtol=1e-5)
    cells = result.arrays["object_cells"]
    assert cells.sum().item() == 6  # one cell for each of three objects on two axes
    assert set(result.images) == set(result.arrays["item_maps"]["item"].values.tolist())
    # The planted background codes its own place, whatever is shown: one object gives as much.
    assert "as in the paper" not in result.verdict
    assert result.verdict.count("the order is read from the objects") == 2
    assert result.headline.count("the order is read from the objects") == 2  # of both axes
    assert "5 of 5 probes with other initialisations say the same" in result.verdict


@pytest.mark.parametrize("coded", ["background", "object"])
def test_e4_tells_the_two_mechanisms_apart(coded: str) -> None:
    result, _ = run("strip-swap", coded)
    for direction in ("left", "right", "above", "below", "all"):
        for kind in ("strip", "object", "background"):
            here = rows(result, direction=direction, kind=kind)
            swapped = here[here["quantity"] == "swapped"].set_index("slot")["value"]
            clean = here[here["quantity"] == "clean"].set_index("slot")["value"]
            flips = kind in ("strip", coded)
            for slot in (0, 1):
                assert (swapped[slot] > 0.99) == flips
                assert (clean[slot] > 0.99) == (not flips)
            # Behind the block in which the answer is read, no swap does anything.
            assert swapped[2] < 0.01
            assert clean[2] > 0.99
        difference = rows(result, direction=direction, kind="strip - object")
        difference = difference[difference["quantity"] == "difference"].set_index("slot")
        assert difference["p_holm"].between(0, 1).all()
        expected = 1.0 if coded == "background" else 0.0
        assert difference["value"][0] == pytest.approx(expected, abs=0.01)
        assert difference["value"][2] == pytest.approx(0, abs=1e-6)
    assert result.cases is not None
    assert len(result.cases.table) == 16
    assert result.cases.table["ok"].all()  # strips hold the objects too, so they always flip
    assert set(result.images) == {"horizontal regions", "vertical regions"}
    every, each = result.verdict.splitlines()
    # Four pairs in a direction decide nothing, sixteen in all of them do.
    assert each.startswith("Left, right, above and below: undecided")
    found = "cells alone do not, as in" if coded == "background" else "alone flip the answer too"
    assert found in every


def test_e4_keeps_the_pairs_that_strips_do_not_flip_with_their_pictures() -> None:
    result, _ = run("strip-swap")
    n_layers = planted("background").cfg.n_layers
    halved = {
        name.removeprefix("pairs_"): values * xr.where(values["kind"] == "strip", 0.4, 1.0)
        for name, values in result.arrays.items()
    }
    cases = strip_swap.cases_of(halved, n_layers)
    assert not cases.table["ok"].any()
    setting = Setting(planted("background"), stimulus_set("squares"), 8)
    pairs = setting.pairs(swap_pair, 3, QUICK)
    shown = failing_pictures(setting, strip_swap.cleans(pairs), cases)
    assert list(shown) == list(cases.table["case"][:SHOWN_CASES])
    first = pairs["left"][0]
    assert shown[strip_swap.name_of(first)] == setting.picture(first.clean)


def test_the_controls_of_e4_have_the_cells_they_say() -> None:
    geometry = PAPER_GEOMETRY["qwen2-vl"]
    for axis in ("horizontal", "vertical"):
        pairs = {
            kind: cell_pairs(geometry, axis, kind) for kind in ("strip", "object", "background")
        }
        strip, inside, rest = (set(pairs[kind].targets) for kind in pairs)
        assert len(strip) == 96
        assert len(inside) == 8
        assert inside | rest == strip
        assert not inside & rest
        for swap in pairs.values():
            back = dict(zip(swap.targets, swap.sources, strict=True))
            assert all(back[back[cell]] == cell for cell in back)


@pytest.mark.filterwarnings("ignore:Pairing")
def test_gemmas_published_strips_warn_that_objects_do_not_meet() -> None:
    with pytest.warns(HookedVLMWarning, match="object cells"):
        cell_pairs(PAPER_GEOMETRY["gemma-3"], "horizontal", "strip")


@pytest.mark.parametrize("name", ["final-token", "strip-swap", "ordering-probes"])
def test_a_seed_gives_the_same_numbers_to_the_last_bit(name: str) -> None:
    first, _ = run(name)
    again, _ = ran(name, "background", QUICK if name != "ordering-probes" else WIDE)
    pd.testing.assert_frame_equal(first.table, again.table, check_exact=True)
    assert first.verdict == again.verdict
    for key, values in first.arrays.items():
        assert values.identical(again.arrays[key])


# --- what is said before anything runs ------------------------------------------------------


def nothing(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("name", CORE)
def test_a_model_without_a_vision_encoder_is_refused(name: str) -> None:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = HookedVLM(LlamaForCausalLM(config))
    with count_forwards(model) as forwards, pytest.raises(UnsupportedModelError, match="vision"):
        EXPERIMENTS[name].run(model, QUICK, nothing)
    assert not forwards


@pytest.mark.parametrize("name", CORE)
def test_a_tokenizer_that_splits_most_colours_is_refused(name: str) -> None:
    whole = planted("object")
    tokenizer = copy.deepcopy(whole.tokenizer)
    encode: Callable[..., list[int]] = tokenizer.encode

    def split(text: str, **options: Any) -> list[int]:
        return [*encode(text[:2], **options), *encode(text[2:], **options)]

    tokenizer.encode = lambda text, **options: (
        encode(text, **options) if text.strip().lower() in ("red", "blue") else split(text)
    )
    model = HookedVLM(whole.hf_model, SimpleNamespace(tokenizer=tokenizer))
    refused = pytest.raises(CannotRunError, match=r"2 of the 6 names .*\(red, blue\)")
    with count_forwards(model) as forwards, refused:
        EXPERIMENTS[name].run(model, QUICK, nothing)
    assert not forwards


@pytest.mark.parametrize("name", ["final-token", "strip-swap"])
def test_a_model_that_answers_nothing_correctly_is_told_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setting, "is_right", lambda self, questions: [False] * len(questions))
    with (
        pytest.warns(HookedVLMWarning, match="Too few tuples"),
        pytest.raises(DataError, match="nothing to intervene on"),
    ):
        EXPERIMENTS[name].run(planted("object"), QUICK, nothing)


def test_names_of_experiments_and_suites() -> None:
    found = steps("dual-mechanisms", "shapes")
    assert [step.experiment.id for step in found] == ["E1", "E2", "E3", "E4"]
    assert {step.setting for step in found} == {"shapes"}
    for name in ("strip-swap", "E4", "e4"):
        assert [(s.experiment.name, s.setting) for s in steps(name)] == [("strip-swap", "squares")]
    with pytest.raises(DataError, match="Did you mean 'strip-swap'"):
        steps("strip-swop")


def test_reproduce_runs_everything_and_every_step_once() -> None:
    found = steps("reproduce", "shapes")
    assert {step.experiment.name for step in found} == set(EXPERIMENTS) - {
        "coco-spatial",
        "coco-amplification",
        "whatsup-pooled",
        "box-ablation",
    }
    assert len({step.key for step in found}) == len(found)
    swaps = [step.setting for step in found if step.experiment.id == "E4"]
    assert swaps == ["squares", "shapes", "objects"]


@pytest.mark.filterwarnings("ignore:.*do not have the same shape")
@pytest.mark.parametrize(("layout", "differ"), [("qwen2-vl", False), ("gemma-3", True)])
def test_e4_adds_aligned_strips_where_published_ones_put_objects_off(
    layout: str, differ: bool
) -> None:
    expected = (
        pytest.warns(HookedVLMWarning, match="To map object to object") if differ else nullcontext()
    )
    with expected:
        regions = SwapRegions.of(PAPER_GEOMETRY[layout], ("horizontal", "vertical"))
    assert (ALIGNED in regions.kinds) == differ and not regions.notes
    aligned = cell_pairs(PAPER_GEOMETRY[layout], "horizontal", ALIGNED)
    left, right = (PAPER_GEOMETRY[layout].object_region("horizontal", place) for place in (0, 2))
    met = dict(zip(aligned.targets, aligned.sources, strict=True))
    assert {met[cell] for cell in left.cells} == set(right.cells)


@pytest.mark.parametrize("coded", ["background", "object"])
def test_e4_scores_by_probability_agreement_and_log_odds(coded: str) -> None:
    result, _ = run("strip-swap", coded)
    for slot in (0, 2):
        here = rows(result, direction="left", kind="strip", slot=slot).set_index("quantity")[
            "value"
        ]
        flipped = slot == 0
        assert here["agreement"] == flipped
        assert (here["swapped"] > 0.9) == flipped == bool(here["log odds"] > 2)
        assert here["log odds"] < 0 or flipped


@pytest.mark.slow
@pytest.mark.parametrize("model_name", available())
@pytest.mark.parametrize("name", CORE)
def test_on_the_shipped_models(name: str, model_name: str) -> None:
    model = HookedVLM.from_pretrained(model_name)
    result = EXPERIMENTS[name].run(model, QUICK, nothing)
    assert np.isfinite(result.table["value"]).all()
