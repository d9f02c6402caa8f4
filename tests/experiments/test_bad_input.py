"""Bad input to experiments: the report says so in its place, and the rest stands.

| what is bad | where it is tested |
|---|---|
| one picture, whose tokens and logits are NaN | `PICTURES`: every experiment but E2, E4 and E6 |
| scores of one intervention that are NaN | `test_a_nan_in_one_cell_…`: E2, E4, E5, Q5 and Q6 |
| one kept pair in a direction | `test_one_kept_pair_…`: E2, E4, Q5 and R3 |
| no pair at all beside numbers that need none | `test_one_kept_pair_of_photographs`: R3 |
| a control that fails its own check | test_absolute_or_relative (Q7), test_verdicts (E3, Q6) |

E2, E4, E6 and Q5 ask about pairs that the model answers: a picture that is NaN is in no pair.  E6
draws and scores pairs as E4 does, and E9 and Q4 run E3 and E4.  R3 draws its own.  The others draw
no pairs, so none is short of one.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.planted_models import planted
from hooked_vlm.experiments import batches, setting
from hooked_vlm.experiments.dual_mechanisms import ordering_ablation
from hooked_vlm.experiments.further import (
    coco_amplification,
    encoder_depth,
    redundancy,
    whatsup_pooled,
)
from hooked_vlm.experiments.registry import select
from hooked_vlm.experiments.result import Result
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report.figures.real_pictures import DRAW


def run(name: str, **options: Any) -> Result:
    found = select(name)
    options = options or {"pairs": 3, "batch_size": 3}
    return found.run(planted("background"), found.config(**options), lambda *_: None)


PREPARE = HookedVLM.prepare


class OnePictureIsNaN:
    """`prepare` of a model, for which the pixels of one picture are NaN wherever it is shown.

    It is the picture after the first `skip` ones that are prepared, without the blank ones with
    which an experiment asks for the grid.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, skip: int) -> None:
        self.usual, self.skip = PREPARE, skip
        self.seen: list[bytes] = []
        this = self
        monkeypatch.setattr(
            HookedVLM, "prepare", lambda model, *given, **more: this.prepare(model, *given, **more)
        )

    def prepare(self, model: HookedVLM, images: Any = None, texts: Any = "", **more: Any) -> Any:
        inputs = self.usual(model, images, texts, **more)
        pixels = inputs["pixel_values"]
        pictures = images if isinstance(images, list) else []
        for i, picture in enumerate(pictures):
            content = np.asarray(picture).tobytes()
            if content not in self.seen:
                self.seen.append(content)
            if self.seen.index(content) == self.skip:
                if "image_grid_thw" in inputs:  # packed: the patches of all images in one row
                    ends = inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()
                    pixels[ends[i - 1] if i else 0 : ends[i]] = torch.nan
                else:
                    pixels[i] = torch.nan
        return inputs


TWO = {"images": 24, "batch_size": 24}
E7 = {"setting": "squares", "items": 3, "alphas": (0.0, 4.0), "controls": 2, "batch_size": 24}
Q1 = {"settings": ("squares", "shapes"), "items": 2, "alphas": (0.0, 4.0), "batch_size": 24}
Q7 = {"images": 20, "batch_size": 20}
Q8 = {"by": "none", "random_cuts": 1, **TWO}
ONE_QUESTION = "1 question with scores that are not numbers."
ONE_PICTURE = "1 picture with tokens that are not numbers."
PICTURES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "E1": ("E1", {"batch_size": 80}, 0, f"Left out, left: {ONE_QUESTION}"),
    "E3": ("E3", {"batch_size": 80}, 0, f"Left out, horizontal: {ONE_PICTURE}"),
    # After the pictures of both axes come those of a middle object alone: one for many layouts.
    "E3, control": ("E3", {"batch_size": 80}, 240, "Left out, horizontal, one object: 9 pictures"),
    # The mean image token, one of the replacements, is that of the batch: here of one direction.
    "E5": ("E5", {"items": 4, "batch_size": 24}, 6, "Left out, left: 4 questions"),
    "E7, probe": ("E7", E7, 0, f"Left out, squares, horizontal, of the probe: {ONE_PICTURE}"),
    "E7, question": ("E7", E7, 120, "Left out: 2 questions with scores"),
    "E8": ("E8", {"ks": (2,), **TWO}, 0, f"Left out, 2x2: {ONE_PICTURE}"),
    "E9": (
        "E9",
        {"setting": "squares", "pairs": 2, "batch_size": 80},
        0,
        f"On white: Left out, horizontal: {ONE_PICTURE}",
    ),
    "Q1": ("Q1", Q1, 0, f"Left out, squares, horizontal, of the probe: {ONE_PICTURE}"),
    "Q1, question": ("Q1", Q1, 240, "Left out, squares: 2 questions"),
    "Q4": (
        "Q4",
        {"pairs": 2, "batch_size": 80},
        0,
        f"whole: Left out, horizontal: {ONE_PICTURE}",
    ),
    "Q5": ("Q5", {"pairs": 2, **TWO}, 24, f"Left out, horizontal: {ONE_PICTURE}"),
    "Q6": ("Q6", {"items": 4, "batch_size": 24}, 0, f"Left out, left: {ONE_QUESTION}"),
    "Q7": ("Q7", Q7, 0, f"Left out, horizontal: {ONE_PICTURE}"),
    "Q7, edge": ("Q7", Q7, 40, f"Left out, horizontal, 0 tokens apart: {ONE_PICTURE}"),
    "Q8": (
        "Q8",
        {"by": "none", "random_cuts": 1, **TWO},
        2,
        f"Left out, horizontal: {ONE_PICTURE}",
    ),
}
"""Case: experiment, its options, how many pictures come before the bad one, and what is said."""
SLOW = ("E9", "Q4")  # they run E3 and E4, and say what these say


@pytest.mark.filterwarnings("ignore")  # of attention patterns, and of pairs that are too few
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in PICTURES]
)
def test_a_picture_of_which_nothing_is_a_number_is_left_out_alone(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options, skip, said = PICTURES[case]
    OnePictureIsNaN(monkeypatch, skip)
    result = run(name, **options)
    assert said in result.verdict
    assert result.verdict.count("Left out") < 4  # both directions of an axis at most, and twice
    check_numbers(result)


@pytest.mark.filterwarnings("ignore")  # that these are few composites, and strips put objects off
def test_a_photograph_of_which_nothing_is_a_number_is_left_out_alone(
    spatial: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    OnePictureIsNaN(monkeypatch, 0)
    found = select("R1")
    result = found.run(model, found.config(data=spatial), lambda *_: None)
    assert "Left out: 1 item with scores that are not numbers." in result.verdict
    assert result.table.set_index(["axis", "quantity"])["n"]["all", "accuracy"] == 1
    check_numbers(result)

    monkeypatch.setattr(
        whatsup_pooled,
        "right_on_both",
        lambda make, is_right: lambda d, drawn: [True] * len(drawn),
    )
    OnePictureIsNaN(monkeypatch, 0)
    found = select("R3")
    options: dict[str, Any] = {"pairs": 3, "tuples": 80}
    result = found.run(model, found.config(data=three, **options), lambda *_: None)
    assert f"Left out, chair, left: {ONE_QUESTION}" in result.verdict
    assert "Left out, probes: 3 pictures with tokens" in result.verdict  # alike, at 3 references
    check_numbers(result)


def test_a_photograph_that_is_left_out_of_amplification(
    boxed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = coco_amplification.observed
    monkeypatch.setattr(
        coco_amplification,
        "observed",
        lambda *given: [replace(told, right=True) for told in observed(*given)],
    )
    OnePictureIsNaN(monkeypatch, 0)
    found = select("R2")
    options: dict[str, Any] = {"style": "reference", "alphas": (0.0, 2.0), "controls": 2}
    config = found.config(data=boxed, **options)
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    result = found.run(model, config, lambda *_: None)
    assert "Left out: 1 item with scores that are not numbers." in result.verdict
    assert set(result.table[result.table["quantity"] == "net"]["n"]) == {10}
    check_numbers(result)


def check_numbers(result: Result) -> None:
    assert "nan" not in result.verdict
    assert np.isfinite(result.table[result.table["n"] > 0]["value"]).all()


@pytest.mark.filterwarnings("ignore:.*correctly")
@pytest.mark.parametrize("name", ["E2", "E4"])
def test_a_nan_in_one_cell_leaves_out_its_pair_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = batches.final_logits, []

    def broken(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        last = usual(logits).clone()
        if len(calls) == 1:
            last[0] = torch.nan
        return last

    whole = run(name)
    monkeypatch.setattr(batches, "final_logits", broken)
    result = run(name)
    assert "Left out, left: 1 pair with scores that are not numbers." in result.verdict
    assert "nan" not in result.verdict
    n = result.table[result.table["quantity"] == "clean"].groupby("direction")["n"].max()
    assert n["left"] == 2 and n["right"] == 3
    for direction in ("right", "above", "below"):
        assert result.arrays[f"pairs_{direction}"].equals(whole.arrays[f"pairs_{direction}"])


@pytest.mark.filterwarnings("ignore:Attention scores or patterns")
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (ordering_ablation, {"items": 6}),
        (redundancy, {"items": 6}),
        (encoder_depth, {"pairs": 3, "images": 24}),
    ],
    ids=["E5", "Q6", "Q5"],
)
def test_a_nan_in_one_cell_leaves_out_its_question_alone(
    module: Any, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = module.scored_numbers, []

    def broken(score: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        logits = logits.clone()
        if len(calls) == 1:
            logits[0] = torch.nan
        return usual(score, logits)

    monkeypatch.setattr(module, "scored_numbers", broken)
    config = module.Config(batch_size=24, **options)
    result = module.run(planted("background"), config, lambda *_: None)
    unit = "pair" if "pairs" in options else "question"
    assert f"Left out, left: 1 {unit} with scores that are not numbers." in result.verdict
    assert "nan" not in result.verdict
    quantity = "swapped" if "pairs" in options else "probability"
    rows = result.table[result.table["quantity"] == quantity].groupby("direction")["n"].max()
    assert rows["left"] == rows["right"] - 1


@pytest.mark.filterwarnings("ignore")  # that a direction has too few pairs
@pytest.mark.parametrize("name", ["E2", "E4", "Q5"])
def test_one_kept_pair_in_a_direction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = setting.sample_tuples

    def one_left(*args: Any, **options: Any) -> dict:
        found = usual(*args, **options)
        return {**found, "left": found["left"][:1]}

    monkeypatch.setattr(setting, "sample_tuples", one_left)
    result = run(name, **({"pairs": 3, **TWO} if name == "Q5" else {}))
    assert "left" not in set(result.table["direction"])
    assert "Not tested: left;" in result.verdict and "nan" not in result.verdict


@pytest.mark.filterwarnings("ignore")  # that these are few composites, and strips put objects off
@pytest.mark.parametrize(
    ("kept", "said", "parts"),
    [
        (
            {"left": 1, "right": 3},
            "Not tested, strip-swap: left; fewer than two pairs",
            {"behaviour", "probes", "final-token", "strip-swap"},
        ),
        (
            {"left": 1, "right": 0},
            "Not tested, strip-swap: In no direction does the model answer two pairs",
            {"behaviour", "probes"},
        ),
    ],
    ids=["one kept pair in a direction", "pairs that are missing everywhere"],
)
def test_one_kept_pair_of_photographs(
    kept: dict[str, int],
    said: str,
    parts: set[str],
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        whatsup_pooled,
        "right_on_both",
        lambda make, is_right: lambda d, drawn: [True] * len(drawn),
    )
    usual = whatsup_pooled.sample_draws
    monkeypatch.setattr(
        whatsup_pooled,
        "sample_draws",
        lambda *given, **more: {d: p[: kept[d]] for d, p in usual(*given, **more).items()},
    )
    found = select("R3")
    options: dict[str, Any] = {"pairs": 3, "tuples": 80}
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    result = found.run(model, found.config(data=three, **options), lambda *_: None)
    assert said in result.verdict and said.replace("strip-swap", "final-token") in result.verdict
    assert set(result.table["part"]) == parts
    check_numbers(result)
    drawn = {drawing.name for drawing in DRAW["R3"](result)}
    assert {"accuracy", "probes"} <= drawn
    assert ("swap-by-slot" in drawn) == ("strip-swap" in parts)


def test_rows_without_numbers_do_not_change_the_others() -> None:
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, float("-inf")]])
    found = batches.scored_numbers(lambda rows: rows.argmax(-1, keepdim=True).float(), logits)
    assert found[0] == 1 and found[1].isnan() and found[2] == 0
