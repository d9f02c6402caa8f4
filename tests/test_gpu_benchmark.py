"""`benchmarks.gpu` on small shapes without a GPU, and what it does with parts that go wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


ROOT = Path(__file__).parent.parent
parent = importlib.import_module("benchmarks.gpu.parent")
parts = importlib.import_module("benchmarks.gpu.parts")
rates = importlib.import_module("benchmarks.gpu.rates")
given = importlib.import_module("benchmarks.gpu.given")


@pytest.fixture(autouse=True)
def parts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")


def benchmark(out: Path, *kinds: str, limit: float = 60, minutes: float = 10) -> Any:
    made = [
        parts.Part(kind, limit, f"helpers.gpu_parts:{kind}", correctness=kind in "works wrong")
        for kind in kinds
    ]
    counting = parts.Part("predictions", 60, "helpers.gpu_parts:counts")
    return parent.Benchmark(out, parent.Settings("cpu", False), made, minutes, counting)


def results(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    return {part["name"]: part for part in found["parts"]}


# The parent


def test_a_part_that_hangs_is_ended_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(parent, "GRACE", 0.5)
    made = benchmark(tmp_path, "hangs", "works")
    made.parts[0] = parts.Part("hangs", 4, "helpers.gpu_parts:hangs")
    assert made.run([0, 1]) == 0
    found = results(tmp_path)
    assert found["hangs"]["status"] == "ended after its limit of 4 s"
    # What it had measured counts.
    assert [row["what"] for row in found["hangs"]["rows"]] == ["before it hung"]
    assert found["works"]["status"] == "done"


def test_predictions_are_written_before_the_first_part_begins(tmp_path):
    assert benchmark(tmp_path, "works").run([0]) == 0
    rows = {row["what"]: row for row in results(tmp_path)["works"]["rows"]}
    assert rows["predictions are there"]["value"] == "True"
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert predictions["predicted"] == {"speed": 2.0, "lost": 5.0}
    table = (tmp_path / "table.md").read_text()
    assert "| speed | 2 | 4 | 2.00 | at least 3 | met |" in table
    assert "| lost | 5 | | | | not measured |" in table


def test_no_part_runs_without_predictions(tmp_path):
    made = benchmark(tmp_path, "works")
    made.counting = parts.Part("predictions", 60, "helpers.gpu_parts:crashes")
    with pytest.raises(parent.CannotStart, match="the card is lost"):
        made.run([0])
    assert not (tmp_path / "calls").exists()


def test_resuming_leaves_finished_parts_alone(tmp_path):
    assert benchmark(tmp_path, "works", "crashes").run([0, 1]) == 0
    assert benchmark(tmp_path, "works", "works").run([0, 1], resume=True) == 0
    # The part that failed has run again, and the finished one has not.
    assert (tmp_path / "calls").read_text().count("called") == 2
    assert benchmark(tmp_path, "works").run([0]) == 0
    assert (tmp_path / "calls").read_text().count("called") == 3


def test_nothing_is_kept_that_was_measured_before_its_predictions(tmp_path):
    benchmark(tmp_path, "works").run([0])
    (tmp_path / "predictions.json").unlink()
    benchmark(tmp_path, "works").run([0], resume=True)
    assert (tmp_path / "calls").read_text().count("called") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_for_a_gpu_says_that_there_is_none(tmp_path):
    made = benchmark(tmp_path, "works")
    made.settings = parent.Settings("cuda", False)
    assert made.run([0]) == 1
    assert "torch finds no CUDA device here" in results(tmp_path)["works"]["status"]


def test_results_of_other_settings_are_not_resumed(tmp_path):
    benchmark(tmp_path, "works").run([0])
    other = benchmark(tmp_path, "works")
    other.settings = parent.Settings("cpu", True)
    with pytest.raises(parent.CannotStart, match="Give another folder"):
        other.run([0], resume=True)


def test_a_wrong_answer_gives_exit_code_1_and_the_rest_goes_on(tmp_path):
    assert benchmark(tmp_path, "wrong", "works").run([0, 1]) == 1
    assert results(tmp_path)["works"]["status"] == "done"
    assert "| product |  | 5 |  |  | WRONG |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("correctness, code", [(True, 1), (False, 0)])
def test_a_correctness_part_that_fails_shows_nothing(tmp_path, correctness, code):
    made = benchmark(tmp_path, "crashes")
    made.parts[0] = parts.Part("crashes", 60, "helpers.gpu_parts:crashes", correctness)
    assert made.run([0]) == code
    assert "RuntimeError: the card is lost" in results(tmp_path)["crashes"]["status"]


def test_a_part_that_no_longer_fits_is_skipped_and_that_is_said(tmp_path):
    assert benchmark(tmp_path, "works", limit=90, minutes=1).run([0]) == 0
    status = results(tmp_path)["works"]["status"]
    assert status.startswith("skipped: its limit is 90 s and ")
    assert status in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "calls").exists()


def test_the_parent_imports_nothing_that_could_touch_a_card():
    code = "import benchmarks.gpu.__main__, sys; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert said.stdout == b"False\n"


def test_parts_are_chosen_by_number_and_name(capsys):
    assert parts.chosen("") == list(range(10))
    assert parts.chosen("sweeps correct, 0") == [0, 3]
    command = importlib.import_module("benchmarks.gpu.__main__")
    for wanted in (["--parts", "speed"], ["--parts", "10"], ["--device", "cpu"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(wanted)
        assert stopped.value.code == 2
    assert "there is no part 'speed'; there are 0 machine" in capsys.readouterr().err


# Predictions


def test_predictions_follow_from_counted_work():
    machine = rates.Rates(flop=100, bytes=10, launch=1, wait=2)
    work = {"flop": 500.0, "bytes": 10.0, "operations": 2, "waits": 3}
    slow = {"flop": 0.0, "operations": 24, "waits": 0}
    counted = [
        {"what": "ours", "work": work},
        {"what": "loop", "work": slow},
        {"what": "loop ÷ ours", "ratio": ["loop", "ours"]},
        {"what": "busy", "busy": "ours"},
        {"what": "copy", "rate": "bytes"},
    ]
    # 5 s of products and 1 s of copies on the device, and three waits of 2 s.
    expected = {"ours": 12.0, "loop": 24.0, "loop ÷ ours": 2.0, "busy": 0.5, "copy": 10}
    assert rates.predicted(counted, machine) == expected
    # Weights are read while products compute.
    assert rates.Work(500.0, weights=40.0).seconds(machine) == 5
    assert rates.Work(500.0, weights=70.0).seconds(machine) == 7


def test_part_0_replaces_the_assumed_rates():
    found = rates.measured([{"what": "copy, B/s", "value": 7.0}, {"what": "torch", "value": "2"}])
    assert found == rates.Rates(bytes=7.0)


def test_operations_grow_with_the_depth_as_they_do_when_counted():
    counted = importlib.import_module("benchmarks.gpu.counted")
    # A pass for each slot and the source: seven a block, and eleven a block of the encoder.
    counts = {(n, v): ((n + 2) * (7 * n + 11 * v), n) for n, v in counted.DEPTHS}
    found = counted.at_depth(counts, (28, 32))
    assert found == pytest.approx((30 * (7 * 28 + 11 * 32), 28), rel=1e-9)


def test_waits_and_bytes_are_counted_by_line():
    dispatched = importlib.import_module("benchmarks.gpu.dispatched")
    x = torch.ones(10)
    with dispatched.Dispatched() as found:
        y = x + 1  # reads 40 bytes and writes 40
        y[:5].view(5, 1)
        bool(y[0] > 1)
    assert found.operations == 3 and found.waits == found.own == 1
    assert found.bytes >= 80
    (line,) = found.lines
    assert line.startswith("tests/test_gpu_benchmark.py:")


# The parts themselves, on small shapes


@pytest.mark.parametrize("number", [0, 1, 2, 6, 7, 8, 9])
def test_a_part_runs_on_small_shapes(tmp_path, number):
    part = parts.PARTS[number]
    module, name = part.function.split(":")
    settings = given.Given(tmp_path / "part.json", "cpu", tiny=True, limit=600)
    getattr(importlib.import_module(module), name)(settings)
    rows = {row["what"]: row for row in settings.rows}
    assert len(rows) == len(settings.rows) > 5  # no two rows have one name
    assert all(row.get("correct", True) for row in settings.rows)
    apart = [row for what, row in rows.items() if "apart from" in what and "most" in row]
    assert all(row["value"] <= row["most"] for row in apart)
    assert bool(apart) == (number in (6, 7))
    assert json.loads((tmp_path / "part.json").read_text())["rows"] == settings.rows


@pytest.mark.parametrize("number", [0, 6])
def test_what_only_a_gpu_has_is_noted_as_the_driver_says_it(tmp_path, monkeypatch, number):
    """The answers are invented; that the rows are there, and where, is what is tested."""
    monkeypatch.setattr(given.Given, "on_gpu", property(lambda self: True))
    card = SimpleNamespace(total_memory=80, major=9, minor=0)
    answers: dict[str, Any] = {"mem_get_info": (70, 80), "get_device_properties": card}
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        answers[name] = 30
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = None
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    module, name = parts.PARTS[number].function.split(":")
    settings = given.Given(tmp_path / "part.json", "cpu", tiny=True, limit=600)
    getattr(importlib.import_module(module), name)(settings)
    rows = {row["what"]: row for row in settings.rows}
    if number == 0:
        assert rows["compute capability"]["value"] == "9.0"
        assert rows["free memory, bytes"]["value"] == 70
    else:
        assert rows["Gemma-3-4b strip, 2 pairs: engine"]["correct"]
        assert rows["Gemma-3-4b strip, 2 pairs: careful, reserved bytes"]["value"] == 30


def test_two_questions_share_an_image_and_are_named(tmp_path):
    speed = importlib.import_module("benchmarks.gpu.sweep_speed")
    settings = given.Given(tmp_path / "part.json", "cpu", tiny=True, limit=600, questions=2)
    speed.gemma(settings)
    rows = {row["what"]: row for row in settings.rows}
    what = "Gemma-3-4b strip, 2 pairs × 2 questions"
    assert "4 prompts in 2 rows" in rows[f"{what}: engine"]["value"]
    assert all(row["value"] <= row["most"] for row in settings.rows if "most" in row)


def test_the_kernels_check_notices_a_wrong_row(tmp_path, monkeypatch):
    correct = importlib.import_module("benchmarks.gpu.kernel_correct")
    whole = correct.patched_rows

    def off(*args: Any, **kwargs: Any) -> Any:
        rows = whole(*args, **kwargs)
        return rows if kwargs.get("by") else rows * 1.01

    monkeypatch.setattr(correct, "patched_rows", off)
    settings = given.Given(tmp_path / "part.json", "cpu", tiny=True)
    correct.run(settings)
    assert not any(row["correct"] for row in settings.rows if "error" in row["what"])


@pytest.mark.slow
def test_the_command_predicts_and_measures_two_parts(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out"]
    command += [str(tmp_path), "--parts", "machine,kernel correct"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    predictions = json.loads((tmp_path / "predictions.json").read_text())["predicted"]
    assert predictions["copy, B/s"] == 2.85e12
    assert predictions["Qwen2-VL-7B strip, 2 pairs: ours, s"] > 0
    assert "**1 kernel correct: done, " in said
    assert "| correct (20 cases; at most 1 is allowed) |" in said
    assert "| copy, B/s | 2.85e+12 → " in said


@pytest.mark.slow
def test_the_whole_command_on_small_shapes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["status"] for part in found] == ["done"] * len(parts.PARTS)
    predictions = json.loads((tmp_path / "predictions.json").read_text())["predicted"]
    measured = {row["what"] for part in found for row in part["rows"]}
    assert set(predictions) <= measured  # each prediction stands beside a measurement
