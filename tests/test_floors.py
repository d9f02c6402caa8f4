"""The table of floors: known counts, the planner's own, and what sharing an image saves."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.model.vlm import HookedVLM


@pytest.fixture(scope="module")
def floors() -> Any:
    return importlib.import_module("benchmarks.floors")


PAGE = Path(__file__).parent.parent / "docs" / "measured" / "throughput.md"
KNOWN = {
    # model, sweep: floor in TFLOP, careful and usual loop over it, and the careful loop over the
    # floor with two questions about each image, counted by another program
    ("Qwen2-VL-7B", "strip"): (35.6, 2.09, 2.88, 3.53),
    ("Qwen2-VL-7B", "object"): (24.8, 3.01, 4.15, 4.88),
    ("Qwen2-VL-7B", "final_token"): (6.6, 11.3, 15.6, 20.0),
    ("Qwen2-VL-7B", "alpha"): (34.4, 1.15, 1.59, 1.99),
    ("Gemma-3-4b", "strip"): (46.2, 1.76, 6.09, 2.94),
    ("Gemma-3-4b", "object"): (46.2, 1.76, 6.09, 2.94),
    ("Gemma-3-4b", "final_token"): (14.9, 5.43, 18.8, 9.75),
}


@pytest.mark.parametrize("model, sweep", KNOWN)
def test_counts_agree_with_those_of_another_program(floors, model, sweep):
    floor, careful, usual, two = KNOWN[model, sweep]
    arithmetic = floors.published(model)
    found = arithmetic.sweeps([[sweep]])
    assert found.floor / 1e12 == pytest.approx(floor, abs=0.05)
    assert found.over == (pytest.approx(careful, abs=0.006), pytest.approx(usual, abs=0.05))
    shared = arithmetic.sweeps([[sweep]], 2)
    # That program runs the last block on all positions where an image is shared, and leaves out
    # attention and the vocabulary there: up to 6 % more for sweeps that change many positions.
    assert two * 0.999 < shared.over[0] < 1.06 * two


def test_the_papers_battery_agrees_too(floors):
    for model, petaflop, careful, usual, two in (
        ("Qwen2-VL-7B", 12.1, 3.62, 5.03, 6.06),
        ("Gemma-3-4b", 18.5, 2.49, 9.04, 4.46),
    ):
        found, shared = (floors.published(model).sweeps(floors.PAPER, n) for n in (1, 2))
        assert 200 * found.floor / 1e15 == pytest.approx(petaflop, abs=0.05)
        assert found.over == (pytest.approx(careful, abs=0.006), pytest.approx(usual, abs=0.006))
        # There the loop of this line encodes every image once for each question.
        assert two * 0.999 < found.careful / shared.floor < 1.06 * two
        assert shared.careful < found.careful


@pytest.mark.parametrize("model", ["Qwen2-VL-7B", "Gemma-3-4b"])
def test_a_floor_is_the_planners_but_for_the_clean_runs_last_block(floors, model):
    throughput = importlib.import_module("benchmarks.throughput.timed")
    ours = importlib.import_module("benchmarks.throughput.ours")
    setting, arithmetic = floors.SETTINGS[model], floors.published(model)
    wrapped = setting.build("meta", floors.torch.bfloat16)
    clean, source = (setting.inputs(wrapped, 1, seed) for seed in (0, 1))
    costs = arithmetic.costs
    for name in ("strip", "object", "final_token", "alpha"):
        task = throughput.task_on(
            wrapped, setting.family, name, clean, source, setting.first_image, setting.side
        )
        planned = ours.Ours(wrapped).planned(task)
        expected = arithmetic.sweeps([[name]]).floor + (setting.length - 1) * costs.trimmed
        if name == "alpha":  # whether a strength is 0 is known when it runs
            expected += arithmetic.row(0, arithmetic.prompt.image)
        else:  # the planner does not ask for the source's logits
            expected -= costs.head
        assert planned.floor == pytest.approx(expected, rel=1e-12), name


def test_with_two_questions_the_planner_counts_common_rows_as_the_floor_does(floors):
    throughput = importlib.import_module("benchmarks.throughput.timed")
    ours = importlib.import_module("benchmarks.throughput.ours")
    setting, arithmetic = floors.SETTINGS["Qwen2-VL-7B"], floors.published("Qwen2-VL-7B")
    wrapped = setting.build("meta", floors.torch.bfloat16)
    clean, source = (setting.inputs(wrapped, 1, seed, questions=2) for seed in (0, 1))
    at = setting.first_image, setting.side, 2
    for name in ("strip", "object", "final_token"):
        task = throughput.task_on(wrapped, setting.family, name, clean, source, *at)
        planned = ours.Ours(wrapped).planned(task)
        # The planner counts each image once for each question.
        planned_floor = planned.floor - 2 * arithmetic.costs.vision
        found = 2 * arithmetic.sweeps([[name]], 2).floor
        assert planned_floor == pytest.approx(found, rel=0.03), name


def test_sharing_an_image_saves_and_never_more_than_half(floors):
    for model in floors.SETTINGS:
        arithmetic = floors.published(model)
        for names in (["strip"], ["object"], ["final_token"], ["alpha"], ["head"]):
            one, two = (arithmetic.sweeps([names], n) for n in (1, 2))
            assert one.floor / 2 <= two.floor < one.floor, (model, names)
            assert two.usual == one.usual  # it encodes the image for every cell anyway


def test_without_an_image_to_share_two_questions_are_two_prompts(floors):
    whole = floors.published("Qwen2-VL-7B")
    bare = replace(whole, prompt=replace(whole.prompt, image_end=0))
    assert bare.row(3, 0, questions=2) == pytest.approx(2 * bare.row(3, 0), rel=1e-12)


def test_random_models_are_counted_as_the_benchmark_counts_them(floors):
    """The ratios are those that `benchmarks.throughput` prints below each sweep."""
    throughput = importlib.import_module("benchmarks.throughput.timed")
    ours = importlib.import_module("benchmarks.throughput.ours")
    model = throughput.model_of("llava", "2x64")
    assert isinstance(model, HookedVLM)
    arithmetic = floors.timed("2x64")
    for task in throughput.tasks_for(model, ("strip", "object", "final_token"), 1, "llava"):
        tool = ours.Ours(model)
        printed = tool.loop_operations(task) / tool.planned(task).floor
        careful, _ = arithmetic.sweeps([[task.name]]).over
        assert careful == pytest.approx(printed, rel=0.1), task.name


def test_the_command_prints_every_model_and_writes_the_same(floors, capsys, monkeypatch, tmp_path):
    file = tmp_path / "floors.json"
    monkeypatch.setattr("sys.argv", ["floors", "--json", str(file)])
    floors.main()
    rows = json.loads(file.read_text())
    assert floors.table(rows) in PAGE.read_text()
    assert {row["model"] for row in rows} == {*floors.SETTINGS, "12x512", "24x1024"}
    assert floors.table(rows) in capsys.readouterr().out
    for row in rows:
        assert 0 < row["two"]["floor"] < row["one"]["floor"] < row["one"]["careful"], row


def test_the_page_has_measured_ratios_beside_the_bounds(floors):
    section = PAGE.read_text().split("## Goals and results")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]

    def bounds(size: str, sweep: str, questions: int = 1) -> tuple[float, float]:
        groups = floors.BENCHMARK if sweep == "battery" else [[sweep]]
        return floors.timed(size).sweeps(groups, questions).over

    rows = [line for line in lines if line and line[0] in ("12x512", "24x1024")]
    for size, sweep, measured, bound, share, _, other in rows:
        careful, usual = bounds(size, sweep)
        assert float(bound) == pytest.approx(careful, abs=0.006)
        assert float(share) == pytest.approx(float(measured) / careful, abs=0.006)
        assert not other or float(other) == pytest.approx(usual, abs=0.006)
    shared = [line for line in lines if line and line[0] in ("strip", "object", "battery")]
    for sweep, bound, goal, _ in shared:
        assert float(bound) == pytest.approx(bounds("12x512", sweep, 2)[0], abs=0.006)
        assert float(goal) < float(bound)
    assert len(rows) == 10 and len(shared) == 3
