"""Q5 and Q6 on planted models, whose mechanisms' places are known."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from helpers.planted_models import planted
from helpers.toy_grids import make_grid
from hooked_vlm.analysis.statistics import holm, sign_flip_test
from hooked_vlm.errors import CannotRunError, DataError
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import in_raster
from hooked_vlm.experiments.further import encoder_depth, redundancy
from hooked_vlm.experiments.further.encoder_attention import attention_shares
from hooked_vlm.experiments.further.encoder_depth import pooled
from hooked_vlm.experiments.further.redundancy import between_image_tokens
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.settings import stimulus_set


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")


@cache
def depth(coded: str) -> Result:
    config = encoder_depth.Config(pairs=2, images=24, batch_size=24)
    return encoder_depth.run(planted(coded), config, lambda *_: None)


def rows(result: Result, **wanted: Any) -> Any:
    table = result.table
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


@pytest.mark.parametrize("coded", ["background", "object"])
def test_the_order_is_found_at_the_depth_where_it_was_written(coded: str) -> None:
    result = depth(coded)
    layers = rows(result, quantity="swapped", kind="strip", direction="left")["layer"].tolist()
    assert layers == [0, 1, 2]  # before the one block, after it, after the projector
    for direction in ("left", "below"):
        for kind in ("strip", "object"):
            found = rows(result, quantity="swapped", kind=kind, direction=direction)
            flips = found.set_index("layer")["value"] > 0.9
            # Behind the block a swap flips exactly the tokens that are read.
            expected = kind == "strip" or coded == "object"
            assert flips[2] == flips[1] == expected
    shares = rows(result, quantity="background", axis="horizontal").set_index("layer")["value"]
    if coded == "background":
        assert shares[2] > 0.7
    else:
        assert shares[2] < 0.5
    assert "a probe reads the order" in result.verdict


def test_the_planted_head_attends_to_the_object_of_its_own_strip() -> None:
    found = rows(depth("background"), quantity="attention", axis="horizontal")
    found = found.set_index("kind")["value"]
    assert found["own object"] > 2 * found["other objects"]


def test_a_tokens_patches_are_averaged() -> None:
    patches = torch.arange(16.0).reshape(1, 16, 1)  # 4x4 patches, 2x2 tokens
    assert pooled(patches, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(pooled(patches, 4), patches)
    with pytest.raises(DataError, match="16 patches do not divide into 3x3"):
        pooled(patches, 3)


def test_even_attention_is_one() -> None:
    setting = Setting(planted("object"), stimulus_set("squares"), 8)
    even = torch.full((36, 36), 1 / 36)
    found = attention_shares(setting, "vertical", even)
    assert found is not None
    np.testing.assert_allclose(found, [1, 1])
    assert attention_shares(setting, "vertical", torch.ones(9, 9)[:, :7]) is None


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
def test_only_image_tokens_are_cut_off_from_one_another(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    setting = Setting(model, stimulus_set("squares"), 2)
    inputs = setting.inputs(setting.stimuli.items()[:2])
    mask = between_image_tokens(inputs)
    for b in range(2):
        positions = inputs.grids[b][0].positions.flatten()
        assert mask[b, 0].sum() == len(positions) ** 2 - len(positions)
        assert mask[b, 0][positions][:, positions].sum() == len(positions) ** 2 - len(positions)
    names = ["blocks.0.attn.hook_pattern", f"blocks.{model.cfg.n_layers - 1}.attn.hook_pattern"]
    with torch.no_grad():
        hooks = redundancy.knock_out(between_image_tokens(inputs))
        _, cache = model.run_with_cache(inputs, names, fwd_hooks=hooks)
    for site in names:
        cut = mask.expand_as(cache[site])
        assert cache[site][cut].abs().max() < 1e-6
        torch.testing.assert_close(cache[site].sum(-1), torch.ones(cache[site].shape[:-1]))


def test_vision_alone_answers_where_the_order_was_planted() -> None:
    config = redundancy.Config(items=6, batch_size=6)
    result = redundancy.run(planted("object"), config, lambda *_: None)
    every = rows(result, direction="all", quantity="accuracy").set_index("kind")["value"]
    assert every["both"] == every["vision only"] == 1
    assert every["LM only"] < 0.5 and every["neither"] < 0.5
    assert every["interaction"] == pytest.approx(
        every["both"] - every["vision only"] - every["LM only"] + every["neither"]
    )


def test_redundancy_has_a_verdict_for_each_axis_and_runs_on_each_task() -> None:
    config = redundancy.Config(items=6, batch_size=6)
    result = redundancy.run(planted("object"), config, lambda *_: None)
    said = result.verdict.splitlines()
    assert [line.split(":")[0] for line in said[:3]] == ["All", "Horizontal", "Vertical"]
    assert all(": found:" in line or "ndecided" in line or ": not found:" in line for line in said)
    steps = [step for step in registry.steps("reproduce") if step.experiment.id == "Q6"]
    assert [step.setting for step in steps] == ["squares", "shapes", "objects"]


def test_tests_of_all_sentences_are_one_family() -> None:
    odds = np.random.default_rng(0).normal(0.3, 1, size=(4, 40))
    values = np.zeros((4, 40, len(redundancy.QUANTITIES)))
    values[..., -1] = odds
    asked = {
        d: [Question((f"a{i}", f"b{i}", f"c{i}"), d) for i in range(40)] for d in ("left", "above")
    }
    table = redundancy._table({"left": values, "above": values}, asked, 0)
    rows = table[(table["kind"] == "interaction") & (table["quantity"] == redundancy.LOG_ODDS)]
    found = rows.set_index("direction")
    own = float(sign_flip_test(odds[0] - odds[1] - odds[2] + odds[3], seed=0))
    assert (found.loc[["horizontal", "vertical", "left", "above"], "p"] == own).all()
    assert found["p_holm"].tolist() == pytest.approx(holm(found["p"].to_numpy()).tolist())


def test_c1_tokens_are_read_in_the_order_of_their_cells() -> None:
    """A measured grid says which of the projector's rows a cell has; tiles have several."""
    rows = torch.tensor([[[[0, 3]], [[0, 2]]], [[[0, 1]], [[0, 0]]]])
    grid = make_grid(2, 2, projected=rows)
    features = torch.arange(2 * 4 * 3).float().reshape(2, 4, 3)
    inputs = Inputs({}, [[grid], [make_grid(2, 2)]])
    found = in_raster(features, inputs)
    assert torch.equal(found[0], features[0].flip(0)) and torch.equal(found[1], features[1])
    tiles = replace(grid, projected=rows + torch.tensor([1, 0]))
    with pytest.raises(CannotRunError, match="seen in tiles"):
        in_raster(features, Inputs({}, [[grid], [tiles]]))
