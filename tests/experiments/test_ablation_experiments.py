"""E5 and E6 on planted models: where the order is, removing it takes the answer away."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from helpers.planted_models import GEOMETRY, planted
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.dual_mechanisms import ordering_ablation, swap_under_ablation
from hooked_vlm.experiments.dual_mechanisms.order_removal import (
    REMOVALS,
    check_cover,
    references,
    removed,
)
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting, sampled
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.geometry import AXES, PAPER_GEOMETRY, Geometry
from hooked_vlm.stimuli.settings import stimulus_set


@cache
def e5(coded: str) -> Result:
    config = ordering_ablation.Config(items=8, batch_size=8)
    return ordering_ablation.run(planted(coded), config, lambda *_: None)


def accuracy(result: Result, **wanted: Any) -> dict[str, float]:
    table = result.table
    for column, value in {"quantity": "accuracy", "direction": "all", **wanted}.items():
        table = table[table[column] == value]
    return dict(zip(table["kind"], table["value"], strict=True))


@pytest.mark.parametrize("coded", ["background", "object"])
def test_without_the_planted_order_the_answer_is_gone(coded: str) -> None:
    found = accuracy(e5(coded))
    assert set(found) == set(REMOVALS)
    assert found["intact"] == found["itself"] == 1
    assert found["removed"] < 0.5 and found["mean"] < 0.5
    # Eight questions in a direction: too few to exclude an order.
    assert "as in the paper" not in e5(coded).verdict
    kinds = accuracy(e5(coded), quantity="other end")
    assert kinds["removed"] + found["removed"] <= 1


def test_the_halves_tell_where_the_order_was() -> None:
    background, inside = accuracy(e5("background")), accuracy(e5("object"))
    assert background["objects only"] == 1 and background["background only"] < 0.5
    assert inside["background only"] == 1 and inside["objects only"] < 0.5
    assert inside["in place"] == 1  # each object's code is its own place's


def test_differences_are_paired_with_intact_runs() -> None:
    table = e5("object").table
    rows = table[(table["quantity"] == "difference") & (table["direction"] == "left")]
    rows: Any = rows.set_index("kind")
    found = accuracy(e5("object"), direction="left")
    for kind in set(REMOVALS) - {"intact"}:
        assert rows.loc[kind, "value"] == pytest.approx(found[kind] - found["intact"])
    assert rows.loc["itself", ["low", "high"]].tolist() == [0, 0]
    assert rows.loc["itself", "p_holm"] == 1
    assert (rows["n"] == 8).all()


def test_sampled_items_are_seeded_and_balanced() -> None:
    setting = Setting(planted("object"), stimulus_set("squares"), 8)
    left = sampled(setting, "left", 7, 0)
    assert len(left) == 7 == len(set(left)) and {q.direction for q in left} == {"left"}
    assert left == sampled(setting, "left", 7, 0) != sampled(setting, "left", 7, 1)
    assert len(sampled(setting, "left", 0, 0)) == len(sampled(setting, "left", 500, 0)) == 120


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
@pytest.mark.parametrize("setting_name", ["squares", "objects-photos"])
def test_the_recipe_writes_every_image_token_once_from_where_it_says(
    name: str, setting_name: str
) -> None:
    model = HookedVLM.from_pretrained(name)
    setting = Setting(model, stimulus_set(setting_name), 2)
    questions = setting.stimuli.items(("above",))[:2]
    found = references(setting, questions)
    site = "blocks.0.hook_resid_pre"
    with torch.no_grad():
        _, cache = model.run_with_cache(
            found.inputs, site, fwd_hooks=removed(found), stop_at_layer=1
        )
    after, before = cache[site], found.itself.cache[site]
    layout, middle = setting.geometry, setting.geometry.object_region("vertical", 1)
    for b, grid in enumerate(found.inputs.grids):
        positions = grid[0].positions.flatten()
        text = torch.ones(after.shape[1], dtype=torch.bool)
        text[positions] = False
        assert torch.equal(after[b, text], before[b, text])
        for place in range(3):
            here = layout.object_region("vertical", place).positions(grid[0])
            source = found.in_middle[place].cache[site][b, middle.positions(grid[0])]
            assert torch.equal(after[b, here], source)
        outside = layout.background("vertical").positions(grid[0])
        assert torch.equal(after[b, outside], found.empty.cache[site][b, outside])
        assert len(outside) + 3 * len(middle.positions(grid[0])) == len(positions)


@pytest.mark.parametrize("geometry", [*PAPER_GEOMETRY.values(), GEOMETRY])
@pytest.mark.parametrize("axis", AXES)
def test_the_papers_layouts_are_covered(geometry: Geometry, axis: str) -> None:
    check_cover(geometry, axis)


def test_a_layout_that_is_not_covered_is_refused() -> None:
    class Gapped(Geometry):
        def background(self, axis: str) -> Any:
            return super().background(axis) - self.strip_region(axis, 0)

    with pytest.raises(DataError, match="leave out 44 cells and cover 0 more than once"):
        check_cover(Gapped(12, 16, 2, 2, (4, 4, 4)), "horizontal")


def test_questions_of_two_axes_are_refused() -> None:
    setting = Setting(planted("object"), stimulus_set("squares"), 8)
    questions = [setting.stimuli.items((d,))[0] for d in ("left", "above")]
    with pytest.raises(DataError, match="questions of one axis"):
        references(setting, questions)


@pytest.mark.slow
@pytest.mark.parametrize("coded", ["object", "background"])
def test_a_model_without_an_order_of_its_own_has_no_pair_to_swap(coded: str) -> None:
    config = swap_under_ablation.Config(pairs=2, batch_size=60)
    with pytest.warns(UserWarning, match="Too few tuples"):
        result = swap_under_ablation.run(planted(coded), config, lambda *_: None)
    assert result.table.empty
    assert "no order of its own" in result.verdict


def test_the_swap_stands_under_the_removal() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    config = swap_under_ablation.Config(pairs=2, batch_size=4)
    told: list[tuple[int, int]] = []
    result = swap_under_ablation.run(model, config, lambda *step: told.append(step))
    table = result.table
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    assert set(table["kind"]) == {"strip", "object", "background"}
    assert set(table["slot"]) == set(range(model.cfg.n_layers + 1))
    assert np.isfinite(table[["value", "low", "high"]].to_numpy()).all()
    setting = Setting(model, stimulus_set("squares"), 4)
    for direction, n in result.config["pairs"].items():
        assert n <= 2
        tuples = result.arrays[f"pairs_{direction}"]
        assert tuples.sizes["pair"] == n
    assert result.cases is not None and result.arrays
    best = {
        str(pair): float(values.sel(pair=pair).max())
        for found in result.arrays.values()
        for values in [found.sel(kind="object", quantity="swapped", slot=slice(1, None))]
        for pair in values["pair"].values
    }
    each = result.cases.table.set_index("case")
    assert dict(each["swapped"]) == pytest.approx(best)
    assert dict(each["ok"]) == {pair: value > 0.5 for pair, value in best.items()}
    assert set(result.images) == set(result.cases.failing["case"])
    assert swap_under_ablation.right_when_removed(setting, []) == []
