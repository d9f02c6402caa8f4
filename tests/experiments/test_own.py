"""Experiments on a user's own data: made-up pictures, a shipped model, known answers."""

from collections.abc import Iterator
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hooked_vlm.errors import CannotRunError, DataError, DataProblemsError
from hooked_vlm.experiments.dual_mechanisms import strip_swap
from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.own import probed
from hooked_vlm.experiments.own.probed import labelled
from hooked_vlm.experiments.own.setting import ANYWHERE, AS_MANY, OTHERS, OwnSetting
from hooked_vlm.experiments.registry import EXPERIMENTS, steps
from hooked_vlm.experiments.result import Result
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.own import OwnData


BOXES = {"left": (16, 80, 48, 112), "middle": (80, 80, 112, 112), "right": (144, 80, 176, 112)}
RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
GREEN = (0, 255, 0)


def drawn(left: str, right: str) -> Image.Image:
    picture = Image.new("RGB", (192, 192), "white")
    for box, color in zip(BOXES.values(), (RGB[left], GREEN, RGB[right]), strict=True):
        ImageDraw.Draw(picture).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=color)
    return picture


def rows(n: int = 12, **more: Any) -> Iterator[dict[str, Any]]:
    for left, right in list(permutations(RGB, 2))[:n]:
        yield {
            "id": f"{left}-{right}",
            "image": drawn(left, right),
            "question": "The color of the square to the left of the green square is ",
            "answer": left,
            "counterfactual": drawn(right, left),
            "counterfactual_answer": right,
            "boxes": BOXES,
            **more,
        }


@cache
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-qwen2-vl")


@cache
def run(name: str, n: int = 12, **options: Any) -> Result:
    experiment = EXPERIMENTS[name]
    assert experiment.run_on is not None
    config = experiment.config(setting="own", **options)
    return experiment.run_on(model(), OwnData.read(list(rows(n))), config)


def value(result: Result, **wanted: Any) -> float:
    table = result.table
    for column, one in {"direction": "all", **wanted}.items():
        table = table[table[column] == one]
    (found,) = table["value"]
    return found


def test_e1_counts_pictures() -> None:
    result = run("behaviour")
    assert result.setting == "own"
    assert value(result, quantity="accuracy") == 1
    assert result.verdict == "Accuracy 1.00 [0.76, 1.00] (12 pictures)."


def test_e2_keeps_the_clean_answer_and_then_transfers_the_other() -> None:
    result = run("final-token", 2)
    assert value(result, slot=0, quantity="clean") > 0.9
    last = model().cfg.n_layers
    assert value(result, slot=last, quantity="swapped") > 0.9
    assert set(result.table["quantity"]) >= {"swapped", "clean", "swapped over clean"}


def test_e4_is_the_patch_that_it_says_it_is() -> None:
    result = run("strip-swap", 2)
    data = OwnData.read(list(rows(2)))
    setting = OwnSetting(model(), data)
    items = list(data.items)
    inputs, source = setting.inputs(items), setting.inputs([i.on_counterfactual() for i in items])
    regions = setting.regions(items, setting.grids(inputs), seed=0)
    for kind in (ANYWHERE, OTHERS, "box left"):
        patched = model().run_with_hooks(inputs, [Patch(1, at=regions[kind], source=source)])
        answers = [[str(item.counterfactual_answer)] for item in items]
        by_hand = setting.probabilities(patched[:, -1].detach(), answers)
        assert value(result, kind=kind, slot=1, quantity="swapped") == pytest.approx(
            float(by_hand.mean()), abs=1e-4
        )
    # All of the picture is in the boxes: exchanging them exchanges the picture.
    assert value(result, kind=ANYWHERE, slot=0, quantity="swapped") > 0.9
    assert value(result, kind=OTHERS, slot=0, quantity="clean") > 0.9
    assert result.cases is not None
    early = result.cases.table.set_index("case")[[ANYWHERE, OTHERS]].mean()
    for kind in (ANYWHERE, OTHERS):
        want = value(result, kind=kind, quantity=strip_swap.EARLY, direction="all")
        assert early[kind] == pytest.approx(want, abs=1e-6)
    assert set(result.cases.table["case"]) <= {item.name for item in items}
    assert set(result.images) == {"boxes", *result.cases.failing["case"]}


def test_regions_of_pictures_of_two_sizes() -> None:
    small = Image.new("RGB", (96, 64), "white")
    other = Image.new("RGB", (96, 64), "black")
    row = {**next(rows(1)), "id": "small", "image": small, "counterfactual": other}
    one, two = [*rows(1)], [{**row, "boxes": {**BOXES, **dict.fromkeys(BOXES, (0, 0, 16, 64))}}]
    data = OwnData.read([*one, *two])
    setting = OwnSetting(model(), data)
    inputs = setting.inputs(data.items)
    found = setting.regions(data.items, setting.grids(inputs), seed=0)
    for grid, boxes, others, as_many in zip(
        setting.grids(inputs), found[ANYWHERE], found[OTHERS], found[AS_MANY], strict=True
    ):
        assert boxes.isdisjoint(others)
        assert len(boxes) + len(others) == len(grid)
        assert as_many <= others
        assert len(as_many) == len(boxes)
    assert [len(own) for own in found[ANYWHERE]] == [12, 4]
    # Each prompt is patched at its own cells, as it is alone.
    source = setting.inputs([item.on_counterfactual() for item in data.items])
    both = model().run_with_hooks(inputs, [Patch(1, at=found[ANYWHERE], source=source)])
    alone = model().run_with_hooks(
        setting.inputs(data.items[:1]),
        [
            Patch(
                1, at=found[ANYWHERE][0], source=setting.inputs([data.items[0].on_counterfactual()])
            )
        ],
    )
    torch.testing.assert_close(both[:1, -1], alone[:, -1], atol=1e-3, rtol=1e-3)


def test_boxes_over_more_than_half_of_a_picture_leave_too_little_to_compare() -> None:
    data = OwnData.read(list(rows(2, boxes={"all": (0, 0, 192, 192)})))
    with pytest.raises(CannotRunError, match="cover 144 of its picture's 144 cells"):
        EXPERIMENTS["box-ablation"].run_on(  # pyright: ignore[reportOptionalCall]
            model(), data, EXPERIMENTS["box-ablation"].config()
        )


def test_boxes_of_all_pictures_are_checked_before_the_first_is_run() -> None:
    one, two = rows(2)
    told: list[Any] = []
    data = OwnData.read([one, {**two, "boxes": {"all": (0, 0, 192, 192)}}])
    for name in ("box-ablation", "strip-swap"):
        experiment = EXPERIMENTS[name]
        with pytest.raises(CannotRunError, match="cover 144 of its picture's 144 cells"):
            experiment.run_on(  # pyright: ignore[reportOptionalCall]
                model(), data, experiment.config(batch_size=1), lambda *done: told.append(done)
            )
    assert not told


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("ordering-probes", {"label": "x"}, "all rows have one label: x"),
        ("amplification", {"boxes": {"left": BOXES["left"]}}, "all boxes have one name: left"),
        ("amplification", {"split": "test"}, "has 0 pictures of train and 12 of test"),
    ],
)
def test_labels_are_checked_without_a_model(name: str, change: dict, said: str) -> None:
    experiment = EXPERIMENTS[name]
    with pytest.raises(CannotRunError, match=said):
        experiment.run_on(  # pyright: ignore[reportOptionalCall]
            None, OwnData.read(list(rows(**change))), experiment.config()
        )


def test_d1_finds_that_the_answer_needs_the_boxes() -> None:
    result = run("box-ablation", 2)
    assert value(result, quantity="accuracy") == 1
    assert value(result, kind="none", slot=2, quantity="answer") > 0.9
    assert value(result, kind=ANYWHERE, slot=0, quantity="fall") > 0.5
    assert abs(value(result, kind=AS_MANY, slot=0, quantity="fall")) < 0.1


def test_e3_reads_the_place_of_a_box_from_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probed, "SEEDS", 1)
    monkeypatch.setattr(probed, "SHUFFLES", 3)
    result = run("ordering-probes")
    by: dict[str, Any] = {row["quantity"]: row for _, row in result.table.iterrows()}
    assert by["converged"]["value"] == 1
    assert by["shuffled"]["value"] < 0.6
    assert by["accuracy, claim"]["n"] == 3
    assert "labels: left, middle, right" in result.verdict


def test_labels_of_pictures_and_their_parts() -> None:
    each = [
        {**row, "label": row["answer"] == "red", "split": "test" if i % 3 == 0 else "train"}
        for i, row in enumerate(rows())
    ]
    found = labelled(OwnSetting(model(), OwnData.read(each)), 0, 0.25, silent)
    assert found.names == ("False", "True")
    assert found.test.tolist() == [0, 3, 6, 9]
    shuffled = found.shuffle(found.examples, seed=1)
    assert not np.array_equal(shuffled.y, found.examples.y)
    for part in (found.train, found.test):
        own = [examples.of_images(part).y.tolist() for examples in (shuffled, found.examples)]
        assert sorted(own[0]) == sorted(own[1])


def test_a_column_of_some_rows_alone_is_no_label_and_no_split() -> None:
    each = [{**row, "label": row["answer"], "split": "train"} for row in rows()]
    setting = OwnSetting(model(), OwnData.read([{**each[0], "split": ""}, *each[1:]]))
    with pytest.raises(CannotRunError, match="split is empty for 1 of 12 pictures"):
        labelled(setting, 0, 0.25, silent)
    data = OwnData.read([{**each[0], "label": ""}, *each[1:]])
    experiment = EXPERIMENTS["ordering-probes"]
    with pytest.raises(CannotRunError, match="needs `label` in every row; 1 of 12 rows has none"):
        experiment.run_on(None, data, experiment.config())  # pyright: ignore


def test_two_questions_about_a_picture_are_one_observation() -> None:
    each = list(rows(2))
    again = {**each[0], "id": "again", "question": "Left of the green square is the color "}
    result = EXPERIMENTS["behaviour"].run_on(  # pyright: ignore[reportOptionalCall]
        model(), OwnData.read([*each, again]), EXPERIMENTS["behaviour"].config()
    )
    assert set(result.table["n"]) == {2}
    assert result.cases is not None
    last = result.cases.table["case"].iloc[-1]
    assert last == "again: Left of the green square is the color "
    assert set(result.cases.failing["case"]) <= set(result.images)


NEEDS = {
    "strip-swap": (
        {"counterfactual": 7, "counterfactual_answer": 7},
        "E4 needs `counterfactual` in every row; 7 of 12 rows have none, and "
        "`counterfactual_answer` in every row; 7 of 12 rows have none. Complete the table",
    ),
    "final-token": (
        {"counterfactual_answer": 1},
        "E2 needs `counterfactual_answer` in every row; 1 of 12 rows has none",
    ),
    "box-ablation": ({"boxes": 12}, "D1 needs `boxes` in every row; 12 of 12 rows have none"),
    "ordering-probes": (
        {"boxes": 12},
        "E3 needs `label` or `boxes` in every row; 12 of 12 rows have none",
    ),
    "ordering-ablation": ({}, "E5 needs single-object pictures"),
    "swap-under-ablation": ({}, "E6 needs single-object pictures"),
    "photographs": ({}, "E9 needs pictures that it draws itself"),
    "coco-spatial": ({}, "R1 needs the list of a published data set"),
}


@pytest.mark.parametrize(("name", "given"), NEEDS.items(), ids=NEEDS)
def test_what_is_missing_is_said_in_one_line(name: str, given: tuple) -> None:
    without, said = given
    each = [
        {column: v for column, v in row.items() if i >= without.get(column, 0)}
        for i, row in enumerate(rows())
    ]
    experiment = EXPERIMENTS[name]
    with pytest.raises(CannotRunError) as e:
        experiment.run_on(None, OwnData.read(each), experiment.config())  # pyright: ignore
    assert str(e.value).startswith(said)
    assert "\n" not in str(e.value)
    if not without:
        with pytest.raises(CannotRunError, match="needs"):
            steps(name, "own")


def test_answers_of_several_tokens_are_listed_or_left_out() -> None:
    each = list(rows(4))
    each[1]["answer"] = "anticlockwise"
    data = OwnData.read(each)
    with pytest.raises(DataProblemsError, match="1 of 4 items have an answer") as e:
        OwnSetting(model(), data)
    assert e.value.problems == ("row 1: id 'red-black': 'anticlockwise'",)
    kept = OwnSetting(model(), data, leave_out=True)
    assert [item.id for item in kept.data.items] == ["red-blue", "red-gray", "blue-red"]
    assert "1 item with answers of several tokens (red-black)" in kept.notes[1]


def test_one_answer_has_one_spelling() -> None:
    each = list(rows(2))
    each[1]["answer"] = "Red"
    assert {item.answer for item in OwnSetting(model(), OwnData.read(each)).data.items} == {"red"}


def test_a_model_that_answers_nothing_right() -> None:
    each = [{**row, "answer": "apple"} for row in rows(3)]
    with pytest.raises(CannotRunError, match="answer two of 3 rows correctly"):
        EXPERIMENTS["final-token"].run_on(  # pyright: ignore[reportOptionalCall]
            model(), OwnData.read(each), EXPERIMENTS["final-token"].config()
        )


def test_built_in_data_have_no_boxes() -> None:
    with pytest.raises(DataError, match="box-ablation runs on your own data"):
        EXPERIMENTS["box-ablation"].run_on(  # pyright: ignore[reportOptionalCall]
            model(),
            list(rows(1)),
            EXPERIMENTS["box-ablation"].config(),
        )


@pytest.mark.slow
def test_e7_amplifies_a_probes_directions() -> None:
    result = run("amplification", alphas=(0.0, 4.0), controls=2)
    assert value(result, kind="released", alpha=0.0, quantity="accuracy") == 1
    assert result.config["items"] == 6
