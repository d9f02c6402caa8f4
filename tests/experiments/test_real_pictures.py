"""What'sUp and COCO-spatial, read from a small faithful copy of how they lie on disk."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from PIL import Image

from helpers import synthetic_results
from helpers.photograph_folders import CAPTION, PREPOSITIONS, picture
from helpers.planted_models import planted
from hooked_vlm.analysis.probes import object_examples
from hooked_vlm.errors import DataError, HookedVLMWarning, RegionError
from hooked_vlm.experiments.dual_mechanisms import amplification
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions, cell_pairs, strips_of
from hooked_vlm.experiments.further import (
    coco_amplification,
    coco_published,
    coco_spatial,
    compared,
    composite_artefacts,
    whatsup_pooled,
    whatsup_probe,
)
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli import squares
from hooked_vlm.stimuli.datasets import coco, coco_boxes, whatsup
from hooked_vlm.stimuli.pairs import Question, swap_pair
from hooked_vlm.stimuli.settings import stimulus_set


SATELLITES = ("red", "green", "blue", "coffee-cup")
SHADES = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "coffee-cup": (9, 9, 9)}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Set A around two references, with every kind of untidiness that the real one has."""
    entries = []
    for reference in ("chair", "armchair"):
        for satellite in SATELLITES:
            for preposition in PREPOSITIONS:
                name = f"{satellite}_{preposition}_{reference}.jpeg"
                picture(tmp_path / "data" / "controlled_images" / name, SHADES[satellite])
                captions = [CAPTION.format(satellite, p, reference) for p in PREPOSITIONS]
                given = f"data/controlled_images/{name}"
                if reference == "armchair":
                    given = f"controlled_images/{name}"
                entries.append({"image_path": given, "caption_options": captions})
    folder = tmp_path / "data" / "controlled_images"
    (folder / "red_on_chair.jpeg").unlink()  # in the list, not in the folder
    picture(folder / "red_on_chair2.jpeg", (1, 1, 1))  # the reverse
    picture(folder / "red_beside_chair.jpeg", (1, 1, 1))
    entries.append({"image_path": "data/controlled_images/red_beside_chair.jpeg"})
    picture(folder / "blue_on_stool.jpeg", (1, 1, 1))
    entries.append({"image_path": "blue_on_stool.jpeg", "caption_options": ["one"]})
    entries.append({"image": "nothing"})
    (tmp_path / "data" / "controlled_images_dataset.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("inside", [False, True])
def test_what_matches_is_read_and_the_rest_is_listed(copy: Path, inside: bool) -> None:
    found = whatsup.load(copy / "data" if inside else copy)
    assert len(found.items) == 2 * 16 - 1
    assert all(item.path.exists() and len(item.captions) == 4 for item in found.items)
    assert {i.satellite for i in found.items} == set(SATELLITES)
    said = "\n".join(found.problems)
    assert "red_on_chair.jpeg' is missing" in said
    assert "'red_beside_chair' is not <satellite>_<preposition>_<reference>" in said
    assert "'blue_on_stool.jpeg' has no four captions" in said
    assert "no image_path" in said
    assert "'red_on_chair2.jpeg' is in the folder and not in the list" in said
    assert found.satellites("chair") == found.satellites("armchair") == SATELLITES


def test_the_other_set_has_other_prepositions(tmp_path: Path) -> None:
    name = "cap_in-front_of_bowl.jpeg"
    picture(tmp_path / "data" / "controlled_clevr" / name, (5, 5, 5))
    entry = {"image_path": f"data/controlled_clevr/{name}", "caption_options": list("abcd")}
    (tmp_path / "data" / "controlled_clevr_dataset.json").write_text(json.dumps([entry]))
    (item,) = whatsup.load(tmp_path, "B").items
    assert (item.satellite, item.preposition, item.reference) == ("cap", "in-front_of", "bowl")
    with pytest.raises(DataError, match="with a preposition among left_of, right_of, on, under"):
        whatsup.parse_name("cap_in-front_of_bowl")


def test_a_list_that_is_not_there_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data/controlled_images_dataset\.json.*Expected is"):
        whatsup.load(tmp_path)
    (tmp_path / "controlled_images_dataset.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        whatsup.load(tmp_path)
    with pytest.raises(DataError, match="A and B"):
        whatsup.load(tmp_path, "C")


def test_faults_of_a_list_are_said(copy: Path) -> None:
    listing = copy / "data" / "controlled_images_dataset.json"
    entries = json.loads(listing.read_text())
    entries.append(entries[0])
    entries[1]["caption_options"] = [
        "A blue thing under a chair",
        *entries[1]["caption_options"][1:],
    ]
    listing.write_text(json.dumps(entries))
    found = whatsup.load(copy)
    assert len(found.items) == 2 * 16 - 1  # one listed twice is one
    said = "\n".join(found.problems)
    assert "'red_left_of_chair.jpeg' is entry 0 too" in said
    assert "'red_right_of_chair.jpeg' has the correct caption 'A blue thing under a chair'" in said
    listing.write_text(json.dumps({"items": entries}))
    with pytest.raises(DataError, match="has a dict; expected a list"):
        whatsup.load(copy)
    listing.write_text(json.dumps([{"image_path": "data/controlled_images/none_on_chair.jpeg"}]))
    with pytest.raises(DataError, match=r"can be used .of 1.; .*looked for in data/controlled_im"):
        whatsup.load(copy)


def test_pairs_and_sets_count_only_when_whole(copy: Path) -> None:
    found = whatsup.load(copy)
    right = [item.preposition != "under" for item in found.items]
    rates = whatsup.accuracies(found, right)
    assert rates["single"].n == 31 and rates["single"].estimate == pytest.approx(23 / 31)
    # 8 pairs of left and right, all right; 7 whole pairs of on and under, all wrong.
    assert rates["pair"].n == 15 and rates["pair"].estimate == pytest.approx(8 / 15)
    assert rates["set"].n == 7 and rates["set"].estimate == 0
    with pytest.raises(DataError, match="Got 3 verdicts for 31 items"):
        whatsup.accuracies(found, [True] * 3)


def test_composites_join_two_photographs_at_the_middle(copy: Path) -> None:
    found = whatsup.load(copy)
    image = np.asarray(whatsup.composite(found, "red", "chair", "blue", 48), dtype=int)
    assert image.shape == (48, 48, 3)
    assert abs(image[:, :24] - SHADES["red"]).max() < 12
    assert abs(image[:, 24:] - SHADES["blue"]).max() < 12
    with pytest.raises(DataError, match=r"no photograph hat_left_of_chair\.jpeg"):
        whatsup.composite(found, "hat", "chair", "blue", 48)


def test_seams_can_be_moved_and_blended() -> None:
    dark, light = (Image.new("L", (8, 8), v) for v in (0, 200))
    row = np.asarray(whatsup.joined(dark, light, 8))[0, :, 0]
    assert row.tolist() == [0, 0, 0, 0, 200, 200, 200, 200]
    moved = np.asarray(whatsup.joined(dark, light, 8, shift=2))[0, :, 0]
    assert moved.tolist() == [0] * 6 + [200] * 2
    blended = np.asarray(whatsup.joined(dark, light, 8, blend=4))[0, :, 0].tolist()
    assert blended == sorted(blended) and blended[:2] == [0, 0] and blended[-2:] == [200, 200]
    assert 0 < blended[3] < blended[4] < 200


def test_a_setting_of_composites(copy: Path) -> None:
    stimuli = stimulus_set("whatsup-chair", data=copy)
    assert stimuli.directions == ("left", "right") and stimuli.axes == ("horizontal",)
    items = stimuli.items(("left",))
    assert len(items) == 12 and {q.reference for q in items} == {"chair"}
    assert stimuli.prompt(items[0]) == "The object on the floor to the left of the chair is a(n) "
    layout = stimuli.layout(12, 4)
    assert np.asarray(
        stimuli.picture(Question(("red", "chair", "blue"), "left"), layout)
    ).shape == (
        48,
        48,
        3,
    )
    with pytest.raises(DataError, match=r"not one\. Experiments that show one object alone"):
        stimuli.scene((None, "red", None), "horizontal", layout)
    with pytest.raises(DataError, match="needs your copy of What'sUp"):
        stimulus_set("whatsup-chair")
    with pytest.raises(DataError, match="right of 'table' for 0 objects"):
        stimulus_set("whatsup-table", data=copy)


def test_names_that_a_tokenizer_splits_are_left_out(copy: Path) -> None:
    setting = Setting(planted("object"), stimulus_set("whatsup-chair", data=copy), 4)
    assert setting.names == ("red", "green", "blue")  # "coffee-cup" is several tokens
    assert len(setting.stimuli.items(("right",))) == 6
    assert setting.inputs(setting.stimuli.items(("right",))[:2]).grids


@pytest.mark.filterwarnings("ignore:Pairing")  # strips as published put objects a column off
@pytest.mark.filterwarnings("ignore:.*do not have the same shape")
@pytest.mark.parametrize("reference", whatsup.REFERENCES)
@pytest.mark.parametrize("n_tokens", [8, 12, 16, 24])
def test_regions_are_the_published_ones_or_scaled(reference: str, n_tokens: int) -> None:
    layout = whatsup.layout_of(reference, n_tokens, 14)
    strips = [layout.strip_region("horizontal", place) for place in range(3)]
    assert (np.sum([strip.mask for strip in strips], axis=0) == 1).all()
    for place in (0, 2):
        assert len(layout.object_region("horizontal", place) - strips[place]) == 0
    assert len(layout.background("horizontal")) > n_tokens
    if (reference, n_tokens) == ("table", 16):
        with pytest.raises(RegionError, match=r"96.*64"):
            cell_pairs(layout, "horizontal", "strip")
    else:
        assert cell_pairs(layout, "horizontal", "strip")
    assert cell_pairs(layout, "horizontal", "object")
    regions = SwapRegions.of(layout, ["horizontal"])
    pairs = regions.pairs["horizontal"]
    assert bool(regions.refused) == ((reference, n_tokens) == ("table", 16))
    strips = pairs[strips_of(regions.kinds)]
    assert strips.target.mask[layout.object_region("horizontal", 0).mask].all()
    if regions.refused:
        assert "96" in regions.notes[0] and "strip" not in pairs
        assert set(pairs["background"].targets) | set(pairs["object"].targets) == set(
            strips.targets
        )
        assert len(pairs["background"]) + len(pairs["object"]) == len(strips)
    with pytest.raises(DataError, match="place 0, vertical, is none"):
        layout.object_region("vertical", 0)


def test_published_regions_to_the_cell() -> None:
    chair = whatsup.layout_of("chair", 16, 14)
    assert chair.place_box("horizontal", 0) == (3 * 14, 12 * 14, 6 * 14, 15 * 14)
    assert len(chair.strip_region("horizontal", 0)) == 6 * 16
    table = whatsup.layout_of("table", 12, 28)
    assert len(table.object_region("horizontal", 2)) == 5 * 3
    probe = whatsup.layout_of("armchair", 64, 14).probe_region("horizontal", 1)
    rows, cols = np.nonzero(probe.mask)
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (24, 60, 20, 44)
    with pytest.raises(DataError, match="'armchair'"):
        whatsup.layout_of("armchiar", 12, 14)


# COCO


@pytest.mark.parametrize("inside", [False, True])
def test_spatial_items_are_read_and_problems_listed(spatial: Path, inside: bool) -> None:
    found = coco.load(spatial / "data" if inside else spatial)
    bear, cup = found.items
    assert (bear.subject, bear.side, bear.reference) == ("teddy bear", "left", "oven")
    assert (cup.side, cup.axis, bear.axis) == ("above", "vertical", "horizontal")
    assert bear.path.name == "000000000042.jpg"
    said = "\n".join(found.problems)
    assert "picture 7 is not in val2017/" in said
    assert "'Two dogs' cannot be read" in said
    assert "not [image id" in said
    assert len(found.problems) == 3


def test_a_question_has_both_orders_and_counts_when_both_are_right(spatial: Path) -> None:
    bear, cup = coco.load(spatial).items
    assert bear.questions() == (
        "Using the oven as the reference point, which side is the teddy bear on? Answer with one "
        "word: left or right.",
        "Using the oven as the reference point, which side is the teddy bear on? Answer with one "
        "word: right or left.",
    )
    assert cup.questions("choice")[1] == "Is the cup below or above the dog? Answer with one word."
    assert bear.is_right(["Left.", " left"]) and not bear.is_right(["left", "right"])
    (alone,) = coco.load(spatial, "coco_qa_one_obj").items
    assert alone.reference is None
    with pytest.raises(DataError, match="side questions need two"):
        alone.questions()


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'coco_qa_two_obj'"):
        coco.load(tmp_path, "coco_two_obj")
    with pytest.raises(DataError, match=r"data/vg_qa_two_obj\.json.*Expected is"):
        coco.load(tmp_path, "vg_qa_two_obj")


# Experiments


def test_joined_pictures_differ_from_whole_ones_where_they_should() -> None:
    plain = stimulus_set("squares")
    layout = plain.layout(12, 8)
    question = Question(("red", "green", "blue"), "left")
    drawn = {
        variant: np.asarray(
            composite_artefacts.composites(plain, variant).picture(question, layout), dtype=int
        )
        for variant in composite_artefacts.VARIANTS
    }
    whole, simple = drawn["whole"], drawn["joined"]
    assert (abs(whole - simple)[:, :48] <= 1).all()  # the left half is the whole picture's
    assert (abs(whole - simple)[:, 48:] > 1).any()
    for place, color in enumerate(("red", "green", "blue")):
        x0, y0, x1, y1 = layout.place_box("horizontal", place)
        for image in drawn.values():
            assert abs(image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] - squares.COLORS[color]).max() <= 2
    moved = np.any(abs(drawn["seam moved"] - simple) > 1, axis=(0, 2))
    assert moved[48:60].any() and not moved[60:].any() and not moved[:48].any()
    assert not (abs(drawn["half mirrored"] - simple) > 1)[:, :48].any()
    with pytest.raises(DataError, match="no variant"):
        composite_artefacts.composites(plain, "cut")


@pytest.mark.slow
def test_composites_are_compared_with_whole_pictures() -> None:
    config = composite_artefacts.Config(pairs=2, batch_size=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)  # the planted model knows white alone
        result = composite_artefacts.run(planted("object"), config, lambda *_: None)
    probes = result.table[result.table["part"] == "ordering-probes"]
    assert set(probes["variant"]) == set(composite_artefacts.VARIANTS)
    assert set(probes["axis"]) == {"horizontal"}
    found = probes[probes["quantity"] == "accuracy"].set_index("variant")["value"]
    assert (found > 0.9).all()
    assert set(result.images) == set(composite_artefacts.VARIANTS)
    assert "whole" in result.verdict


def test_composites_of_ones_own_photographs_are_compared_with_uncut_ones(copy: Path) -> None:
    config = composite_artefacts.Config(setting="whatsup-chair", data=copy, pairs=2, batch_size=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)
        result = composite_artefacts.run(planted("object"), config, lambda *_: None)
    variants = composite_artefacts.VARIANTS[1:]
    assert set(result.images) == {*variants, composite_artefacts.UNCUT}
    probes = result.table[result.table["part"] == "ordering-probes"]
    assert set(probes["variant"]) == {*variants, composite_artefacts.UNCUT}
    uncut = probes[probes["variant"] == composite_artefacts.UNCUT].set_index("quantity")["n"]
    assert uncut["background"] == 2  # of 3 things on 2 sides, a quarter (rounded up) is held out
    less = probes[probes["quantity"] == "paired difference"]
    assert set(less["variant"]) == set(variants[1:])
    stimuli = stimulus_set("whatsup-chair", data=copy)
    layout = stimuli.layout(12, 4)
    drawn = {
        variant: np.asarray(
            composite_artefacts.composites(stimuli, variant, copy).picture(
                Question(("red", "chair", "blue"), "left"), layout
            ),
            dtype=int,
        )
        for variant in variants
    }
    for image in drawn.values():
        assert abs(image[:, :16] - SHADES["red"]).max() < 12
        assert abs(image[:, 34:] - SHADES["blue"]).max() < 12


def test_pairs_that_two_kinds_of_picture_keep_are_compared() -> None:
    def of(shift: float, *names: str) -> Result:
        values = np.array([[[0.2 + 0.001 * i, 0.5]] for i in range(len(names))]) + shift
        pairs = xr.DataArray(
            values[..., None],
            dims=("pair", "kind", "slot", "quantity"),
            coords={
                "pair": list(names),
                "kind": ["strip"],
                "slot": [0, 1],
                "quantity": ["swapped"],
            },
        )
        return replace(synthetic_results.e4(), arrays={"pairs_left": pairs})

    names = [f"pair {i}" for i in range(80)]  # bounded tests need many
    rows = compared.swap_rows(of(0.0, *names), of(0.3, *names[:0:-1]), seed=0)
    assert [row["n"] for row in rows] == [79, 79]
    assert rows[1]["value"] == pytest.approx(0.3) and rows[1]["p_holm"] < 0.05
    said = compared.said_swaps(pd.DataFrame(rows))
    assert said.startswith("strip: up to 0.3") and "79 common pairs" in said
    assert compared.swap_rows(of(0.0, "a", "b"), of(0.0, "b", "c"), seed=0) == []
    assert "too few common pairs" in compared.said_swaps(
        pd.DataFrame(columns=["part", "quantity", "kind"])
    )


def test_coco_spatial_counts_items_right_in_both_orders(
    spatial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"teddy bear": ("left", "left"), "cup": ("above", "below")}
    monkeypatch.setattr(
        coco_spatial, "_answers", lambda model, items, style: [answers[i.subject] for i in items]
    )
    config = coco_spatial.Config(data=spatial)
    result = coco_spatial.run(planted("object"), config, lambda *_: None)
    rows = result.table.set_index(["axis", "quantity"])["value"]
    assert rows["horizontal", "accuracy"] == 1 and rows["vertical", "accuracy"] == 0
    assert rows["all", "accuracy"] == 0.5 and rows["all", "single"] == 0.75
    assert any("Unusable entries: 3" in note for note in result.notes)
    with pytest.raises(DataError, match="--data FOLDER"):
        coco_spatial.run(planted("object"), coco_spatial.Config(), lambda *_: None)


def test_coco_spatial_asks_a_model(spatial: Path) -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    config = coco_spatial.Config(data=spatial, style="choice")
    result = coco_spatial.run(model, config, lambda *_: None)
    assert result.table.set_index(["axis", "quantity"])["n"]["all", "single"] == 4


# Boxes, and amplification on COCO-spatial


def test_boxes_are_those_of_the_captions_things(boxed: Path) -> None:
    found = coco_boxes.with_boxes(coco.load(boxed).items, boxed)
    assert len(found.items) == 11
    assert set(found.problems) == {
        "picture 2: 2 boxes of 'cup'; the largest that fits the caption is used",
        "picture 12: no box of 'dog'",
    }
    for one in found.items:
        first, second = one.by_class  # left and right, or above and below
        edge = 0 if one.item.axis == "horizontal" else 1
        assert first[edge] < second[edge]
        assert one.subject == (first if one.item.side in ("left", "above") else second)
    (boxed / "annotations" / "instances_val2017.json").write_text('{"annotations": [{}]}')
    with pytest.raises(DataError, match=r"is not COCO's: expected are 'categories'"):
        coco_boxes.with_boxes((), boxed)
    (boxed / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match=r"annotations_trainval2017\.zip"):
        coco_boxes.with_boxes((), boxed)


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
def test_amplification_on_photographs_with_boxes(
    boxed: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedVLM.from_pretrained(name)
    config = coco_amplification.Config(data=boxed, style="reference", alphas=(0.0, 2.0), controls=2)
    with pytest.raises(DataError, match=r"horizontal: \d of 6 items correct, too few"):
        coco_amplification.run(model, config, lambda *_: None)  # it was not taught such questions
    observed = coco_amplification.observed

    def all_right(*given):
        return [replace(told, right=True) for told in observed(*given)]

    monkeypatch.setattr(coco_amplification, "observed", all_right)
    told: list[tuple[int, int]] = []
    result = coco_amplification.run(model, config, lambda *step: told.append(step))
    assert told[-1] == (200, 200)
    table = result.table
    assert set(table["kind"].dropna()) == {*amplification.FORMULAS, *amplification.CONTROLS}
    unchanged = table[(table["alpha"] == 0) & (table["quantity"] == "net")]
    assert (unchanged["value"] == 0).all() and (unchanged["n"] == 11).all()
    fixed = table[table["quantity"] == "published, fixed"]
    assert (fixed[fixed["alpha"] == 0]["value"] == 0).all()  # the listings that failed fail again
    read = table[table["quantity"] == "probe, held out"]
    assert list(read["axis"]) == ["horizontal", "vertical"] and (read["n"] == 1).all()
    assert "11 items)" in result.verdict and "horizontal" in result.verdict


def test_a_probe_of_photographs_is_given_the_means_of_boxes(boxed: Path) -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    item = coco_boxes.with_boxes(coco.load(boxed).items, boxed).items[0]
    (told,) = coco_amplification.observed(model, [item], "reference")
    grid = coco_amplification.inputs_of(model, [item], "reference").grids[0][0]
    for box, mean in zip(item.by_class, told.things, strict=True):
        assert torch.equal(told.tokens[grid.box(*box).tokens].mean(0), mean)
    assert not torch.allclose(told.things[0], told.things[1])


# --- B2: R2's published count, boxes of a detector, boxes on the captioned side ------------


def edit_annotations(folder: Path, change: Callable[[list[dict]], None]) -> None:
    file = folder / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    change(content["annotations"])
    file.write_text(json.dumps(content))


def test_b2_an_item_is_fixed_when_its_failed_listings_become_right(spatial: Path) -> None:
    bear, cup = coco.load(spatial).items
    assert coco_published.listings(bear, ["left", "right"]) == (1, 0)
    assert coco_published.listings(bear, ["above", "right"]) == (-1, 0)  # not of its axis
    assert coco_published.listings(cup, ["sofa", ""]) == (-1, -1)
    before = np.array([[1, 0], [0, 0], [1, 1], [-1, 0], [-1, 1], [-1, -1]])
    # The first item's right listing breaks, and nobody looks; the second is fixed by half.
    now = np.array([[0, 1], [1, 0], [0, 0], [0, 1], [0, 0], [1, 1]], dtype=bool)
    accuracy, fixed, n, n_wrong = coco_published.published_accuracy(before, now)
    assert (n, n_wrong) == (5, 3)  # the last item has no prediction of its axis
    assert fixed == pytest.approx(2 / 3)
    assert accuracy == pytest.approx((2 + 2) / 5)
    ours = now.all(1).mean()
    assert ours == pytest.approx(1 / 6)  # by the same answers, both orders right


def test_b2_boxes_lie_on_the_captioned_side_or_fit_no_probe(
    boxed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(annotations: list[dict]) -> None:
        first, second = (a for a in annotations if a["image_id"] == 1)
        first["bbox"], second["bbox"] = second["bbox"], first["bbox"]
        # The larger cup of picture 2 contradicts its caption, the smaller one does not.
        annotations.append({"image_id": 2, "category_id": 1, "bbox": [60, 8, 20, 50]})

    edit_annotations(boxed, swap)
    found = coco_boxes.with_boxes(coco.load(boxed).items, boxed)
    odd = [one for one in found.items if not one.is_as_captioned]
    assert [one.item.image_id for one in odd] == ["1"]
    assert any("picture 1: the boxes of 'cup' and 'dog' contradict" in p for p in found.problems)
    (second,) = (one for one in found.items if one.item.image_id == "2")
    assert second.is_as_captioned and second.subject == (8, 8, 28, 28)

    fits: list[int] = []
    fitted, observed = coco_amplification.fitted, coco_amplification.observed
    monkeypatch.setattr(
        coco_amplification,
        "fitted",
        lambda told, seed: (fits.append(len(told)), fitted(told, seed))[1],
    )
    monkeypatch.setattr(
        coco_amplification,
        "observed",
        lambda *given: [replace(t, right=True, listings=(0, -1)) for t in observed(*given)],
    )
    config = coco_amplification.Config(data=boxed, alphas=(0.0, 2.0), controls=1)
    result = coco_amplification.run(
        HookedVLM.from_pretrained("tiny-qwen2-vl"), config, lambda *_: None
    )
    assert fits == [5, 5]  # of six items to the left and right, and of five above and below
    asked = result.table[result.table["quantity"] == "net"]
    assert set(asked["n"]) == {11}
    published = result.table[result.table["quantity"] == "published, fixed"]
    assert set(published["kind"]) == {*amplification.FORMULAS, *amplification.CONTROLS}
    assert set(published["n"]) == {11}
    assert "Published count" in result.verdict
    assert any("no answer can break" in note for note in result.notes)


def test_b2_a_detector_s_boxes_are_used_where_coco_has_none(boxed: Path) -> None:
    file = boxed / "detected.json"
    entries = [
        {"image_id": 12, "name": "Dog", "bbox": [60, 10, 10, 10], "score": 0.9},
        {"image_id": 1, "name": "dog", "bbox": [0, 0, 5, 5]},  # COCO has one
    ]
    file.write_text(json.dumps(entries))
    items = coco.load(boxed).items
    found = coco_boxes.with_boxes(items, boxed, file)
    assert len(found.items) == 12
    last = found.items[-1]
    assert last.item.image_id == "12" and last.reference == (60, 10, 70, 20)
    assert any("picture 12: the box of 'dog' is a detected one" in p for p in found.problems)
    assert found.items[0].reference == coco_boxes.with_boxes(items, boxed).items[0].reference
    config = coco_amplification.Config(data=boxed, boxes=file)
    config.check()
    assert config.files()["boxes"] == file
    file.write_text(json.dumps([{"image_id": 12, "label": "dog"}]))
    with pytest.raises(DataError, match=r"Entry 0 of .*detected\.json.*expected is"):
        config.check()


# --- B7: COCO's wording follows the model --------------------------------------------------


@pytest.mark.parametrize(
    ("name", "style"), [("tiny-qwen2-vl", "reference"), ("tiny-gemma-3", "choice")]
)
def test_b7_questions_are_worded_as_for_the_model_s_kind_of_encoder(
    spatial: Path, monkeypatch: pytest.MonkeyPatch, name: str, style: str
) -> None:
    model, asked = HookedVLM.from_pretrained(name), []
    monkeypatch.setattr(
        coco_spatial,
        "_answers",
        lambda model, items, style: asked.append(style) or [["left"] * 2 for _ in items],
    )
    result = coco_spatial.run(model, coco_spatial.Config(data=spatial), lambda *_: None)
    assert asked == [style] and result.config["style"] == style
    assert any("chosen by the model's encoder" in note for note in result.notes)
    assert coco_spatial.style_of(model, "choice") == "choice"
    assert coco_amplification.Config().style == coco_spatial.Config().style == "auto"


# --- B5: What'sUp as published -------------------------------------------------------------


def test_b5_probe_boxes_are_rounded_as_published() -> None:
    published = {  # rows, then columns, on 12 tokens
        "chair": ((9, 11, 2, 4), (3, 11, 4, 8), (9, 11, 7, 10)),
        "table": ((7, 11, 1, 3), (3, 11, 3, 9), (7, 11, 9, 10)),
        "armchair": ((9, 11, 1, 4), (4, 11, 3, 8), (9, 11, 8, 10)),
    }
    for reference, boxes in published.items():
        layout = whatsup.layout_of(reference, 12, 28)
        for place, (r0, r1, c0, c1) in enumerate(boxes):
            region = layout.probe_region("horizontal", place)
            assert region.cells == tuple((r, c) for r in range(r0, r1) for c in range(c0, c1))
            assert not region & layout.background("horizontal")
        examples = object_examples(
            torch.zeros(2, 144, 3), [layout.probe_region("horizontal", place) for place in range(3)]
        )
        assert len(examples.y) == 2 * sum((b[1] - b[0]) * (b[3] - b[2]) for b in boxes)


def pooled(folder: Path) -> dict[str, Setting]:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    return {
        name: Setting(model, stimulus_set(f"whatsup-{name}", data=folder), 16)
        for name in whatsup.REFERENCES
    }


def test_b5_another_number_of_composites_than_published_is_said(three: Path) -> None:
    said = whatsup.count_difference(whatsup.load(three))
    assert "80 composites (chair 30, table 20, armchair 30); the paper has 1074" in said
    sizes = dict(zip(whatsup.REFERENCES, (18, 18, 22), strict=True))  # 306 + 306 + 462
    items = tuple(
        whatsup.Item(Path(), f"n{i}", preposition, reference)
        for reference, n in sizes.items()
        for i in range(n)
        for preposition in ("left_of", "right_of")
    )
    assert whatsup.count_difference(whatsup.WhatsUp("A", items)) == ""


def test_b5_pairs_draw_a_reference_each_and_probes_all_of_them(three: Path) -> None:
    settings = pooled(three)
    config = whatsup_pooled.Config(data=three, pairs=20)
    for setting in settings.values():
        setting.is_right = lambda questions: [True] * len(questions)
    pairs = whatsup_pooled.drawn_pairs(settings, swap_pair, 3, config)
    assert set(pairs) == {"left", "right"} and {len(found) for found in pairs.values()} == {20}
    for found in pairs.values():
        assert {pair.clean.reference for pair in found} == set(whatsup.REFERENCES)
        assert all(pair.clean.reference == pair.counterfactual.reference for pair in found)
        tables = [p for p in found if p.clean.reference == "table"]
        assert all("brown" not in p.clean.entities for p in tables)  # not photographed there
    drawn = whatsup_probe.drawn_tuples(settings, 40, 42)
    assert len(set(drawn)) == 40 and {q.reference for q in drawn} == set(whatsup.REFERENCES)
    assert drawn != whatsup_probe.drawn_tuples(settings, 40, 43)
    assert len(whatsup_probe.drawn_tuples(settings, 120, 42)) == 80


def test_b5_pairs_of_the_same_two_pictures_are_one_observation() -> None:
    names = ("mug", "table", "plate")
    one, same, other = (
        whatsup_pooled._pictures(swap_pair(direction, tuple_))
        for direction, tuple_ in (
            ("left", names),
            ("right", names),
            ("left", ("mug", "chair", "plate")),
        )
    )
    assert one == same != other
    settings = {"table": Setting(planted("object"), stimulus_set("squares"), 8)}
    drawn = {d: [swap_pair(d, names), swap_pair(d, names[::-1])] for d in ("left", "right")}
    scores = np.random.default_rng(0).random((2, 1, 2, 1))

    def scored(*_: Any) -> dict[str, xr.DataArray]:
        return {
            d: xr.DataArray(
                scores,
                dims=("pair", "kind", "slot", "quantity"),
                coords={
                    "pair": [whatsup_pooled._pictures(pair) for pair in own],
                    "kind": ["strip"],
                    "slot": [0, 1],
                    "quantity": ["swapped"],
                },
            )
            for d, own in drawn.items()
        }

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whatsup_pooled, "_scores", scored)
        config = whatsup_pooled.Config(pairs=2)
        rows, _ = whatsup_pooled._sweeps(settings, lambda: drawn, None, (), None, config, "p")
    assert {row["n"] for row in rows} == {1}  # four pairs, two pictures


@pytest.mark.filterwarnings("ignore:Pairing")  # strips as published put objects a column off
@pytest.mark.filterwarnings("ignore:.*do not have the same shape")
def test_b5_one_accuracy_one_probe_and_swaps_over_all_references(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Setting, "answers", lambda _, asked: [q.target * (q.direction == "left") for q in asked]
    )
    monkeypatch.setattr(
        whatsup_pooled,
        "right_on_both",
        lambda make, is_right: lambda d, drawn: [True] * len(drawn),
    )
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    config = whatsup_pooled.Config(data=three, pairs=3, tuples=16)
    with pytest.warns(HookedVLMWarning, match="the paper has 1074"):
        result = EXPERIMENTS["whatsup-pooled"].run(model, config, lambda *_: None)
    table = result.table
    accuracy = table[table["quantity"] == "accuracy"].set_index(["reference", "direction"])
    share, n = accuracy["value"].to_dict(), accuracy["n"].to_dict()
    assert (share["all", "all"], n["all", "all"]) == (0.5, 160)
    assert (share["table", "left"], n["table", "left"]) == (1.0, 20)
    probes = table[table["part"] == "probes"]
    assert set(probes["n"]) == {4} and len(probes) == 4
    swaps = table[(table["part"] == "strip-swap") & (table["direction"] == "all")]
    assert set(swaps["kind"]) == {"strip", "object", "background"} and set(swaps["n"]) == {6}
    assert "Accuracy 0.50" in result.verdict and "(160 questions)" in result.verdict
    assert "the paper has 1074" in result.notes[0]
