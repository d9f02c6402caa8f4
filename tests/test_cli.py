"""What the command line says, leaves behind and refuses, with made-up experiments."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from helpers import synthetic_results as synthetic
from hooked_vlm import cli
from hooked_vlm.errors import (
    CannotRunError,
    DataError,
    HookedVLMWarning,
    UnsupportedModelError,
)
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.registry import Experiment, Step
from hooked_vlm.experiments.result import Result
from hooked_vlm.report import children
from hooked_vlm.report import job as runner
from hooked_vlm.report.cards import card_of
from hooked_vlm.report.devices import device_of
from hooked_vlm.report.planned import RunPlan
from hooked_vlm.report.progress import REPORTED, Listener, Reporter, bars_on, told


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts two quick experiments and a model loader in place; returns what was called."""
    called: list[str] = []

    def experiment(made: Result) -> Experiment:
        def run(model: object, config: Config, on_progress: OnProgress) -> Result:
            called.append(f"{made.name} with {config.pairs} pairs")
            on_progress(config.pairs, config.pairs)
            return made

        return Experiment(
            id=made.id,
            name=made.name,
            title=made.title,
            section=made.section,
            claim=made.claim,
            run=run,
            config=Config,
        )

    class Loader:
        @staticmethod
        def from_pretrained(name: str, **_: object) -> types.SimpleNamespace:
            called.append(f"load {name}")
            if name == "missing":
                raise UnsupportedModelError("Could not load 'missing'. Did you mean 'tiny-one'?")
            torch.manual_seed(len(name))
            return types.SimpleNamespace(
                hf_model=nn.Linear(2, 2),
                sites={},
                eager=contextlib.nullcontext,
                describe=lambda: f"{name}: sites",
            )

    made = [experiment(synthetic.e1()), experiment(synthetic.e4())]
    monkeypatch.setattr(registry, "EXPERIMENTS", {one.name: one for one in made})
    monkeypatch.setattr(registry, "SUITES", {"dual-mechanisms": ("behaviour", "strip-swap")})
    for module in ("page", "index", "compare"):  # slow, and tested there
        monkeypatch.setattr(f"hooked_vlm.report.{module}.drawings", lambda _: [])
    monkeypatch.setattr(runner, "HookedVLM", Loader)
    monkeypatch.setattr("hooked_vlm.model.vlm.HookedVLM", Loader)
    monkeypatch.setattr("hooked_vlm.zoo.available", lambda: ["tiny-two", "tiny-one"])
    monkeypatch.setattr("hooked_vlm.zoo.summary", lambda name: f"about {name}")
    return called


def hooked_vlm(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


RUN = ("run", "dual-mechanisms", "--model", "tiny-one", "--out")


def test_run_writes_a_report(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path / "out"), "--pairs", "7", "--seed", "3") == 0
    assert calls == ["load tiny-one", "behaviour with 7 pairs", "strip-swap with 7 pairs"]
    said = capsys.readouterr()
    assert said.out == f"report: {tmp_path / 'out' / 'report.html'}\n"
    assert "tiny-one 2/2 E4 strip-swap" in said.err
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["config"] == {
        "pairs": 7,
        "seed": 3,
        "batch_size": 16,
        "setting": None,
        "cutouts": None,
        "backgrounds": None,
        "data": None,
        "other_words": False,
        "leave_out_long_answers": False,
        "device": device_of("auto"),
        "dtype": "auto",
    }
    assert record["reused"] == []
    assert set(record["seconds"]) == {"behaviour on squares", "strip-swap on squares"}
    assert set(pd.read_csv(tmp_path / "out" / "numbers.csv")["experiment"]) == {"E1", "E4"}


def test_run_again_reuses_what_matches(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hooked_vlm(monkeypatch, *RUN, str(tmp_path))
    calls.clear()
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 0
    assert calls == ["load tiny-one"]
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["reused"] == ["behaviour on squares", "strip-swap on squares"]

    for words in (("--pairs", "5"), ("--fresh",), ("--model", "tiny-two-other-weights")):
        calls.clear()
        hooked_vlm(monkeypatch, *RUN, str(tmp_path), *words)
        assert len(calls) == 3, words


def test_plan_prints_a_prediction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(suite: str, model: str, **how: object) -> str:
        return f"{suite} on {model}: {how['workers']} x {how['card']}, {how['options']}"

    monkeypatch.setattr("hooked_vlm.report.planned.plan_run", planned)
    words = ("--model", "m", "--workers", "8", "--card", "L4", "--set", "items=2")
    cli.app(["plan", "reproduce", *words], standalone_mode=False)
    assert capsys.readouterr().out == "reproduce on m: 8 x L4, {'items': '2'}\n"


def test_one_experiment_by_name(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hooked_vlm(monkeypatch, "run", "strip-swap", "--model", "tiny-one", "--out", str(tmp_path))
    assert calls == ["load tiny-one", "strip-swap with 50 pairs"]


def test_interrupt_keeps_what_is_finished_and_says_how_to_go_on(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = registry.EXPERIMENTS["strip-swap"]

    def interrupted(*_: object) -> Result:
        raise KeyboardInterrupt

    cut = dataclasses.replace(whole, run=interrupted)
    monkeypatch.setitem(registry.EXPERIMENTS, "strip-swap", cut)
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 130
    said = capsys.readouterr().err
    assert "interrupted after 1 of 2" in said
    assert "Run the same command again" in said
    assert not (tmp_path / "report.html").exists()

    monkeypatch.setitem(registry.EXPERIMENTS, "strip-swap", whole)
    calls.clear()
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 0
    assert calls == ["load tiny-one", "strip-swap with 50 pairs"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "dual-mechanism", "--model", "m"), "Did you mean 'dual-mechanisms'?"),
        (("run", "behavior", "--model", "m"), "Did you mean 'behaviour'?"),
        (("run", "behaviour", "--model", "m", "--dtype", "bfloat"), "Did you mean 'bfloat16'"),
        (("run", "behaviour", "--model", "m", "--device", "gpu"), "There is no device 'gpu'"),
        (("run", "behaviour", "--model", "m", "--device", "cuda:99"), "CUDA devices"),
        (
            ("run", "behaviour", "--model", "m", "--pairs", "0"),
            "--pairs must be a whole number from 2",
        ),
    ],
)
def test_a_mistake_is_one_line_and_found_before_any_work(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    says: str,
) -> None:
    assert hooked_vlm(monkeypatch, *words, "--out", str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("hooked-vlm: ")
    assert said.count("\n") == 1
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_found_before_any_work(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    for command in (RUN, ("demo", "--out")):
        assert hooked_vlm(monkeypatch, *command, str(tmp_path / "file" / "out")) == 2
        assert "Cannot write to the output folder" in capsys.readouterr().err
    assert calls == []


def test_missing_model(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("run", "behaviour", "--model", "missing", "--out", str(tmp_path))
    assert hooked_vlm(monkeypatch, *words) == 2
    assert capsys.readouterr().err.endswith("Did you mean 'tiny-one'?\n")
    assert calls == ["load missing"]


def test_an_experiment_that_fails_is_not_a_mistake_of_the_users(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> Result:
        raise ZeroDivisionError

    cut = dataclasses.replace(registry.EXPERIMENTS["strip-swap"], run=broken)
    monkeypatch.setitem(registry.EXPERIMENTS, "strip-swap", cut)
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *RUN, str(tmp_path)])
    with pytest.raises(ZeroDivisionError):  # its traceback is wanted
        cli.main()
    assert (tmp_path / "results" / "behaviour-squares" / "result.json").exists()


def test_demo_runs_every_shipped_model(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("demo", "--out", str(tmp_path), "--pairs", "4", "--jobs", "1")
    assert hooked_vlm(monkeypatch, *words) == 0
    assert [call for call in calls if call.startswith("load")] == ["load tiny-two", "load tiny-one"]
    assert capsys.readouterr().out == f"report: {tmp_path / 'index.html'}\n"
    assert "about tiny-one" in (tmp_path / "tiny-one" / "report.html").read_text()
    assert "about tiny-two" in (tmp_path / "tiny-two" / "report.html").read_text()
    index = (tmp_path / "index.html").read_text()
    assert index.index("about tiny-two") < index.index("about tiny-one")


def test_a_process_of_its_own_is_told_the_whole_job(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = runner.Job(
        "dual-mechanisms",
        "tiny-two",
        tmp_path / "some where",
        config=Config(pairs=3, seed=2, cutouts=tmp_path, other_words=True),
        setting="shapes",
        options={"alphas": "0,1", "items": "4"},
        device="cpu",
        dtype="float32",
        fresh=True,
    )
    ran: list[runner.Job] = []

    def note(job: runner.Job) -> types.SimpleNamespace:
        ran.append(job)
        return types.SimpleNamespace(page="")

    monkeypatch.setattr(cli.running, "_run", note)
    assert hooked_vlm(monkeypatch, *children.words_of(job)) == 0
    assert ran == [job]


def test_a_finished_run_is_read_back_and_another_one_refused(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hooked_vlm(monkeypatch, *RUN, str(tmp_path))
    job = runner.Job("dual-mechanisms", "tiny-one", tmp_path)
    assert [result.key for result in runner.read(job).results] == [
        "behaviour-squares",
        "strip-swap-squares",
    ]
    with pytest.raises(DataError, match="another run"):
        runner.read(dataclasses.replace(job, config=Config(pairs=3)))
    with pytest.raises(DataError, match="no finished run"):
        runner.read(dataclasses.replace(job, out=tmp_path / "elsewhere"))


def test_reproduce_needs_no_model(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(registry.SUITES, "reproduce", ("behaviour:shapes", "behaviour:objects"))
    words = ("reproduce", "--out", str(tmp_path), "--jobs", "1")
    assert hooked_vlm(monkeypatch, *words) == 0
    assert calls.count("behaviour with 50 pairs") == 4
    assert set(pd.read_csv(tmp_path / "tiny-two" / "numbers.csv")["setting"]) == {
        "shapes",
        "objects",
    }
    record = json.loads((tmp_path / "tiny-two" / "provenance.json").read_text())
    assert record["config"]["dtype"] == "float32"  # b7: the paper's, whatever the checkpoint's is
    page = (tmp_path / "index.html").read_text()
    assert 'id="E1-shapes"' in page and 'id="E1-objects"' in page


def test_sites_and_list(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hooked_vlm(monkeypatch, "sites", "tiny-one") == 0
    assert capsys.readouterr().out == "tiny-one: sites\n"
    assert hooked_vlm(monkeypatch, "list") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("dual-mechanisms", "strip-swap", "E4", "tiny-two"))


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import hooked_vlm.cli; "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"importing the command line imports {done.stderr}"


def test_log_lines_carry_an_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    listener = Listener(Console(stderr=True, force_terminal=False), "m")
    experiment = Experiment(
        id="E4",
        name="swap",
        title="",
        section="",
        claim="",
        run=lambda *_: synthetic.e1(),
        config=Config,
    )
    listener.begin(Step(experiment, "shapes"), 1, 4)
    for second in range(0, 31, 5):
        now[0] = 100.0 + second  # it drew pairs for 100 seconds, then counted
        listener.step(second, 60)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "m 1/4 E4 swap on shapes",
        "m 1/4 E4 swap on shapes: 25% after 15 s, 45 s left",
        "m 1/4 E4 swap on shapes: 50% after 30 s, 30 s left",
    ]


def test_one_experiment_that_cannot_be_run_does_not_stop_the_others(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> Result:
        calls.append("refused")
        raise CannotRunError("There is no pair.")

    cut = dataclasses.replace(registry.EXPERIMENTS["behaviour"], run=refuse)
    monkeypatch.setitem(registry.EXPERIMENTS, "behaviour", cut)
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Could not be run on this model. There is no pair." in page
    assert set(pd.read_csv(tmp_path / "numbers.csv")["experiment"]) == {"E4"}
    calls.clear()
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 0
    assert calls == ["load tiny-one"]

    alone = ("run", "behaviour", "--model", "tiny-one", "--out", str(tmp_path))
    assert hooked_vlm(monkeypatch, *alone, "--fresh") == 2


def test_g2_another_file_of_the_model_or_another_picture_is_computed_anew(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, grounds = tmp_path / "model", tmp_path / "grounds"
    for folder in (model, grounds):
        folder.mkdir()
    (model / "config.json").write_text('{"scale": 1}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    Image.new("RGB", (8, 8), "red").save(grounds / "a.png")
    words = ["run", "strip-swap", "--model", str(model), "--out", str(tmp_path / "out")]
    words += ["--setting", "squares-photos", "--backgrounds", str(grounds)]

    def computed() -> bool:
        calls.clear()
        assert hooked_vlm(monkeypatch, *words) == 0
        return "strip-swap with 50 pairs" in calls

    assert computed() and not computed()
    (model / "config.json").write_text('{"scale": 4}')
    assert computed() and not computed()
    (model / "chat_template.jinja").write_text("{{ messages }} ")
    assert computed() and not computed()
    Image.new("RGB", (8, 8), "blue").save(grounds / "a.png")
    assert computed() and not computed()
    (model / "README.md").write_text("a note")
    assert not computed()
    monkeypatch.setattr("hooked_vlm.report.basis.version_of", lambda _: "99")
    assert computed()
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert set(record["model_files"]) == {"config.json", "chat_template.jinja"}


def test_g3_a_fault_of_the_data_is_never_stored_as_a_result(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> Result:
        raise DataError("'a.png' cannot be read as a picture.")

    whole = registry.EXPERIMENTS["strip-swap"]
    cut = dataclasses.replace(whole, run=broken)
    monkeypatch.setitem(registry.EXPERIMENTS, "strip-swap", cut)
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 2
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["behaviour-squares"]
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setitem(registry.EXPERIMENTS, "strip-swap", whole)
    calls.clear()
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 0
    assert calls == ["load tiny-one", "strip-swap with 50 pairs"]


@pytest.mark.filterwarnings("always::hooked_vlm.errors.HookedVLMWarning")
def test_g4_a_damaged_result_is_computed_again_and_that_is_said(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hooked_vlm(monkeypatch, *RUN, str(tmp_path))
    numbers = (tmp_path / "numbers.csv").read_text()
    table = tmp_path / "results" / "strip-swap-squares" / "table.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:60]))
    with pytest.raises(DataError, match="missing"), pytest.warns(HookedVLMWarning):
        runner.read(runner.Job("dual-mechanisms", "tiny-one", tmp_path))
    calls.clear()
    capsys.readouterr()
    assert hooked_vlm(monkeypatch, *RUN, str(tmp_path)) == 0
    assert calls == ["load tiny-one", "strip-swap with 50 pairs"]
    said = capsys.readouterr().err
    assert "warning: The result in" in said and "table.csv differs from its checksum" in said
    assert "It is computed again." in said
    assert (tmp_path / "numbers.csv").read_text() == numbers


def test_i3_a_damaged_record_is_an_error_of_ours(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hooked_vlm(monkeypatch, *RUN, str(tmp_path))
    for text in ("{}", "[", "null", "[" * 100_000):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(DataError, match="not the record of a run"):
            runner.read(runner.Job("dual-mechanisms", "tiny-one", tmp_path))


def test_g1_the_record_has_the_setting_that_was_run(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("run", "strip-swap", "--model", "tiny-one", "--out", str(tmp_path))
    assert hooked_vlm(monkeypatch, *words, "--setting", "shapes") == 0
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["config"]["setting"] == "shapes"
    assert set(pd.read_csv(tmp_path / "numbers.csv")["setting"]) == {"shapes"}


def test_version_and_short_help_answer_without_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hooked_vlm(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("hooked-vlm 0.")
    assert hooked_vlm(monkeypatch, "-h") == 0
    assert "--install-completion" in capsys.readouterr().out
    assert hooked_vlm(monkeypatch, "run", "-h") == 0
    assert "--dry-run" in capsys.readouterr().out


def test_a_second_run_adds_to_the_folder_and_report_writes_the_same_page_again(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ran(experiment: str, model: str = "tiny-one") -> str:
        words = ("run", experiment, "--model", model, "--out", str(tmp_path))
        assert hooked_vlm(monkeypatch, *words) == 0
        return (tmp_path / "report.html").read_text()

    ran("strip-swap")
    before = json.loads((tmp_path / "results" / "strip-swap-squares" / "result.json").read_text())
    page = ran("behaviour")
    assert set(pd.read_csv(tmp_path / "numbers.csv")["experiment"]) == {"E1", "E4"}
    assert page.index('id="E1-squares"') < page.index('id="E4-squares"')
    record = json.loads((tmp_path / "provenance.json").read_text())
    is_later = record["started"] != before["made"]["started"]
    assert page.count("Computed by an earlier run") == is_later
    calls.clear()
    assert hooked_vlm(monkeypatch, "report", str(tmp_path)) == 0
    assert (tmp_path / "report.html").read_text() == page
    assert calls == []
    page = ran("behaviour", "tiny-other")
    assert "strip-swap-squares (of tiny-one, float32)" in page
    assert set(pd.read_csv(tmp_path / "numbers.csv")["experiment"]) == {"E1"}
    capsys.readouterr()
    assert hooked_vlm(monkeypatch, "report", str(tmp_path / "results")) == 2
    assert "There is no finished run in" in capsys.readouterr().err


def test_report_of_several_models_keeps_the_title_of_their_index(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hooked_vlm(monkeypatch, "demo", "--out", str(tmp_path), "--jobs", "1") == 0
    page = (tmp_path / "index.html").read_text()
    (tmp_path / "tiny-one" / "report.html").unlink()
    assert hooked_vlm(monkeypatch, "report", str(tmp_path)) == 0
    assert (tmp_path / "index.html").read_text() == page
    assert (tmp_path / "tiny-one" / "report.html").exists()


def test_compare_sets_two_runs_side_by_side(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [str(tmp_path / name) for name in ("one", "two")]
    hooked_vlm(monkeypatch, *RUN, runs[0])
    words = ("run", "behaviour", "--model", "tiny-one", "--pairs", "7", "--out", runs[1])
    hooked_vlm(monkeypatch, *words)
    capsys.readouterr()
    out = tmp_path / "both"
    assert hooked_vlm(monkeypatch, "compare", *runs, "--out", str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    n = len(synthetic.e1().table)
    assert said["compared"] == n == len(pd.read_csv(out / "compared.csv"))
    assert (said["intervals apart"], said["in one"]) == (0, ["strip-swap-squares"])
    page = (out / "compare.html").read_text()
    assert page.count("Not run.") == 2 and "<td>50</td><td>7</td>" in page
    assert hooked_vlm(monkeypatch, "compare", str(tmp_path), runs[0]) == 2
    assert "has runs of 2 models" in capsys.readouterr().err


def test_the_config_beside_a_result_runs_it_again(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hooked_vlm(monkeypatch, *RUN, str(tmp_path / "one"), "--pairs", "7", "--seed", "3")
    file = tmp_path / "one" / "results" / "strip-swap-squares" / "config.json"
    key = json.loads(file.with_name("result.json").read_text())["key"]
    calls.clear()
    capsys.readouterr()
    words = ("run", "--config", str(file), "--json", "--out")
    assert hooked_vlm(monkeypatch, *words, str(tmp_path / "two")) == 0
    assert calls == ["load tiny-one", "strip-swap with 7 pairs"]
    (result,) = json.loads(capsys.readouterr().out)["results"]
    about = json.loads((Path(result["folder"]) / "result.json").read_text())
    assert (about["key"], result["id"], result["reused"]) == (key, "E4", False)
    hooked_vlm(monkeypatch, *words, str(tmp_path / "three"), "--pairs", "9")
    assert calls[-1] == "strip-swap with 9 pairs"
    hooked_vlm(monkeypatch, *words, str(tmp_path / "four"), "--limit", "4")
    assert calls[-1] == "strip-swap with 4 pairs"


def test_dry_run_checks_and_plans_and_makes_nothing(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict] = []

    def planned(suite: str, model: str, **how: Any) -> RunPlan:
        asked.append(how)
        known = {"workers": 1, "utilisation": 0.3, "weights": 4, "steps": ()}
        card = card_of(how["card"])
        return RunPlan(model=model, suite=suite, card=card, dtype=how["dtype"], **known)

    monkeypatch.setattr("hooked_vlm.report.planned.plan_run", planned)
    found = "", types.SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr("hooked_vlm.report.planned._configuration", lambda _: found)
    words = ("run", "behaviour", "--model", "tiny-one", "--limit", "4", "--dry-run")
    assert hooked_vlm(monkeypatch, *words, "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "behaviour on tiny-one in bfloat16" in said and "fits into H200" in said
    assert said.endswith("The arguments are correct. Nothing was run.\n")
    assert (asked[0]["dtype"], asked[0]["limit"], calls) == ("bfloat16", 4, [])
    assert not (tmp_path / "out").exists()
    assert hooked_vlm(monkeypatch, *words, "--out", str(tmp_path), "--device", "gpu") == 2


def test_a_process_reports_and_another_one_shows(capsys: pytest.CaptureFixture[str]) -> None:
    made = registry.EXPERIMENTS["strip-swap"]
    step = Step(made, "shapes")
    with Reporter(Console(stderr=True), "m") as reporter:
        reporter.begin(step, 1, 2)
        reporter.step(1, 4)
        reporter.end(2.0, False)
    lines = [*capsys.readouterr().err.splitlines(), "", "warning: something"]
    assert [REPORTED in line for line in lines if line] == [True, True, True, True, False]
    for terminal in (False, True):
        console = Console(stderr=True, force_terminal=terminal, width=100, file=io.StringIO())
        shown = Listener(console, "m", bars_on(console))
        with shown, Listener(console, "other", shown._bars):
            for line in lines:
                told(shown, line, console)
            assert shown.finished == 1
            names = [task.description for task in shown._bars.tasks]
            assert names == ["m 1/2 E4 strip-swap on shapes", "other: starting"]
        said = capsys.readouterr().err + console.file.getvalue()  # type: ignore[attr-defined]
        assert said.count("E4 strip-swap on shapes: 2.0 s") == 1
        assert "warning: something" in said


def test_options_and_list_as_text_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for experiment in registry.EXPERIMENTS.values():
        assert hooked_vlm(monkeypatch, "options", experiment.id) == 0
        said = capsys.readouterr().out
        own = set(vars(experiment.config())) - set(vars(Config()))
        assert all(f"--set {name}=" in said for name in own)
    assert hooked_vlm(monkeypatch, "options", "Q6", "--json") == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["options"]}
    assert found["cut"]["values"] == "one of: objects, all" and found["items"]["default"] == 60
    assert hooked_vlm(monkeypatch, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["id"] for one in listed["experiments"]} >= {"E1", "Q8"}
