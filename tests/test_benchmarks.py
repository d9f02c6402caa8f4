"""The benchmarks run, on models too small to time: nothing here asserts on a time."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_vlm.model.vlm import HookedVLM


@pytest.fixture(scope="module")
def wrapper() -> Any:
    yield importlib.import_module("benchmarks.wrapper")


@pytest.mark.parametrize("family", ["qwen2-vl", "gemma-3"])
def test_every_way_runs_and_takes_what_it_says(wrapper, family, capsys):
    model = HookedVLM(wrapper.build(family, (2, 2)), name=family)
    table = wrapper.time_passes(model, batch=1, repeats=1)
    assert table.count("\n|") > 12
    assert "batch 1 x 160 tokens" in table
    assert "skipped" in capsys.readouterr().out or "TransformerLens" in table
    inputs = wrapper.inputs_for(model, 1)
    names = [name for name in model.hook_names if name.startswith("blocks.") and "resid" in name]
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names)
        output, found = wrapper.by_torch_hooks(model, names, lambda: model.hf_model(**inputs))
    assert torch.equal(output.logits, logits)
    assert all(torch.equal(found[name], cache[name]) for name in names)
    assert getattr(model.hf_model.config, "_attn_implementation") == "sdpa"  # noqa: B009
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())


def test_every_pass_stands_beside_a_plain_one(wrapper):
    ran = []
    timed = {"plain": lambda: ran.append("plain"), "way": lambda: ran.append("way")}
    found = wrapper.pairs(timed, repeats=2)
    assert found["way"].shape == (2, 2, 2)
    assert ran.count("way") == 3
    assert all("plain" in ran[max(i - 1, 0) : i + 2] for i, r in enumerate(ran) if r == "way")


def test_published_sizes_are_built_without_weights(wrapper):
    model = HookedVLM(wrapper.on_meta("LLaVA-1.5-7B"))
    assert model.cfg.n_layers == 32
    assert all(p.is_meta for p in model.hf_model.parameters())


# Throughput


@pytest.fixture(scope="module")
def throughput() -> Any:
    return importlib.import_module("benchmarks.throughput.__main__")


@pytest.fixture(scope="module")
def timed() -> Any:
    return importlib.import_module("benchmarks.throughput.timed")


@pytest.mark.slow
def test_every_tool_gives_the_same_answers(throughput, capsys, monkeypatch, tmp_path):
    file = tmp_path / "found.json"
    wanted = ["--sizes", "2x64", "--repeats", "1", "--batch", "1", "--json", str(file)]
    rivals = ["--rivals", "hook-loop,usual-loop,restart", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr("sys.argv", ["throughput", *wanted, *rivals])
    throughput.main()
    found = json.loads(file.read_text())
    assert set(found["ratios"]) == {"hook-loop", "usual-loop", "restart"}
    for name, by_task in found["ratios"].items():
        assert set(by_task) == set(throughput.TASKS), name
        assert all(ratio > 0 for ratio in by_task.values())
    assert all(row["difference"] < 2e-6 for row in found["rows"])
    how = {row["task"]: row["how"] for row in found["rows"] if row["rival"] == "hook-loop"}
    assert how["final_token"].startswith("growing: 1 pass of 3 rows, from positions 183")
    assert how["vision"].startswith("growing: ")
    for row in found["rows"]:
        assert row["operations_per_s"] > 0 and row["product_per_s"] > 0, row
        assert 1 <= row["executed_over_floor"] < 1.2, row
        assert row["loop_over_floor"] > 0.9, row
        assert {"ours_peak", "ours_one_by_one_peak", "rival_peak"} <= set(row)
        assert (row["alone"] is None) == (row["task"] == "vision")
    printed = capsys.readouterr().out
    assert "| strip | hook-loop | 3 |" in printed and "of the product's; executed over" in printed
    assert found["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
def test_the_shipped_models_are_timed_too(throughput, timed, name):
    found = timed.Timed.of(name, "llava")
    loop, ours = throughput.HookLoop(found.model.hf_model), throughput.Ours(found.model)
    for task in found.tasks(throughput.TASKS, 2):
        with torch.no_grad():
            mine, theirs = ours.run(task), loop.run(task)
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max(), task.name
        assert not torch.equal(mine[0], mine[-1]), task.name


def test_peaks_are_of_what_a_run_holds():
    peak = importlib.import_module("benchmarks.throughput.peak")
    found = peak.peak_bytes(lambda: torch.ones(40, 2**20))
    if found is None:
        pytest.skip("nobody keeps count of memory here")
    assert 150e6 < found < 400e6
    assert peak.peak_bytes(lambda: torch.ones(1)) < 50e6


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "gemma-3", "llava"])
def test_the_hook_loop_agrees_on_every_family_and_cells_do_something(throughput, timed, family):
    """A write that changes nothing would be equal for everyone, and fast."""
    made = throughput.built.build(family, (2, 3 if family == "llava" else 2), width=64, side=24)
    model = HookedVLM(made, name=family)
    loop, plain = throughput.HookLoop(made), throughput.Ours(model, "plain")
    names = throughput.TASKS if family == "llava" else ("object", "vision")
    for task in timed.tasks_for(model, names, 1, family):
        with torch.no_grad():
            found, expected = loop.run(task), plain.run(task)
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max(), task.name
        assert ((found - found.mean(0)).abs().amax(dim=(1, 2)) > 1e-5).all(), task.name
    assert not any(m._forward_pre_hooks for m in made.modules())


def test_what_a_tool_cannot_do_or_gets_wrong_is_in_the_table(throughput, capsys, monkeypatch):
    class Wrong(throughput.HookLoop):
        def run(self, task: Any) -> Any:
            if task.name == "vision":
                raise throughput.Cannot("no such hooks")
            return 2 * super().run(task)

    monkeypatch.setattr(throughput, "HookLoop", Wrong)
    wanted = ["--sizes", "2x64", "--repeats", "1", "--batch", "1", "--rivals", "hook-loop"]
    monkeypatch.setattr("sys.argv", ["throughput", *wanted, "--tasks", "object,vision"])
    throughput.main()
    printed = capsys.readouterr().out
    assert " WRONG |" in printed
    assert "cannot: no such hooks" in printed


@pytest.mark.parametrize("name", ["transformer-lens", "nnsight", "pyvene"])
def test_a_missing_rival_is_named_with_the_command_that_installs_it(throughput, name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["throughput", "--rivals", f"hook-loop,{name}"])
    with pytest.raises(SystemExit) as stopped:
        throughput.main()
    assert f"needs the package {name!r}" in str(stopped.value)
    assert "python -m benchmarks.throughput.environment --at .venv-rivals" in str(stopped.value)


def test_an_unknown_rival_is_no_rival(throughput, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["throughput", "--rivals", "hook-lop"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert (
        "there are hook-loop, usual-loop, restart, plain, transformer-lens"
        in capsys.readouterr().err
    )


def test_the_rivals_environment_has_one_version_of_each(throughput):
    environment = importlib.import_module("benchmarks.throughput.environment")
    lines = (environment.ROOT / environment.REQUIREMENTS).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {rival.distribution for rival in throughput.rivals.RIVALS.values()} < set(pinned)
    constraints = (environment.ROOT / "constraints.txt").read_text().splitlines()
    for name in ("torch", "transformers"):
        assert f"{name}=={pinned[name]}" in constraints


@pytest.mark.parametrize("questions", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_battery_has_the_same_answers_whoever_runs_it(monkeypatch, capsys, tmp_path, questions):
    battery = importlib.import_module("benchmarks.throughput.battery")
    file = tmp_path / "battery.json"
    wanted = ["--size", "2x64", "--pairs", "2", "--batch", "1", "--repeats", "1"]
    wanted += ["--questions", str(questions)]
    monkeypatch.setattr("sys.argv", ["battery", *wanted, "--json", str(file)])
    battery.main()
    found = json.loads(file.read_text())
    # Two batches of one pair: five sweeps over three slots, and sixteen strengths.
    assert found["patches"] == 2 * (5 * 3 + 16) * questions
    assert all(row["bound"] > 1 for row in found["rivals"].values())
    assert set(found["rivals"]) == {"hook-loop", "usual-loop"}
    assert all(row["difference"] < 2e-6 for row in found["rivals"].values())
    assert "| usual-loop |" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["qwen2-vl", "gemma-3", "llava"])
def test_two_questions_share_an_image_for_everyone(throughput, timed, family, monkeypatch):
    made = throughput.built.build(family, (2, 2), width=64, vocab=32000, side=24)
    model = HookedVLM(made, name=family)
    (task,) = timed.tasks_for(model, ("strip",), 2, family, questions=2)
    ids = task.clean["input_ids"]
    end = timed.FIRST + timed.SIDE**2
    assert ids.shape[0] == 4
    assert torch.equal(ids[:2, :end], ids[2:, :end]) and not torch.equal(ids[:2], ids[2:])
    encoded, owner = [], type(made.model)
    encode = owner.get_image_features

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(owner, "get_image_features", counting)
    ours = throughput.Ours(model)
    with torch.no_grad():
        careful = throughput.HookLoop(made).run(task)
        assert len(encoded) == 2  # the clean images, and the sources
        found, usual = ours.run(task), throughput.UsualLoop(made).run(task)
    assert "4 prompts in 2 rows" in ours.note
    for other in (found, usual):
        assert (other - careful).abs().max() < 2e-6 * careful.abs().max()


@pytest.mark.slow
def test_how_cost_grows_is_timed_and_drawn(monkeypatch, capsys, tmp_path):
    growth = importlib.import_module("benchmarks.throughput.growth")
    steps = {"slots": (1, 3), "tokens": (6, 8), "pairs": (1, 2)}
    monkeypatch.setattr(growth, "GROWN", steps)
    files = ["--plot", str(tmp_path / "g.png"), "--json", str(tmp_path / "g.json")]
    wanted = ["--size", "2x64", "--repeats", "1", "--questions", "2"]
    monkeypatch.setattr("sys.argv", ["growth", *wanted, *files])
    made, prompts = growth.task_of, []

    def noting(*sizes: Any) -> Any:
        model, task = made(*sizes)
        prompts.append(len(task.clean["input_ids"]))
        assert task.questions == 2
        return model, task

    monkeypatch.setattr(growth, "task_of", noting)
    growth.main()
    assert prompts[-2:] == [2, 4]  # of one pair, and of two
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [row["at"] for row in rows["tokens"]] == [36 + 40, 64 + 40]
    assert [row["cells"] for row in rows["slots"]] == [1, 3]
    assert all(row["difference"] < 2e-6 for each in rows.values() for row in each)
    assert (tmp_path / "g.png").stat().st_size > 10_000
    assert growth.slope([{"at": x, "s": 3.0 * x**2} for x in (1, 2, 5)], "s") == pytest.approx(2)


# Estimates


@pytest.mark.slow
def test_estimates_stand_beside_exact_sweeps(capsys, monkeypatch, tmp_path):
    estimates = importlib.import_module("benchmarks.attribution")
    file, plot = tmp_path / "found.json", tmp_path / "effects.png"
    options = ["--model", "tiny-qwen2-vl", "--sweeps", "final token", "--fractions", "0.01,1"]
    options += ["--pairs", "2", "--json", str(file), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", ["attribution", *options])
    estimates.main()
    found = json.loads(file.read_text())
    rows = [r for r in found["agreement"] if r["quantity"] == "pearson" and r["slot"] > 1]
    small = [r for r in rows if "0.01 of the edit" in r["sweep"] and r["metric"] == "log odds"]
    assert small and all(r["value"] > 0.98 for r in small)
    assert {r["line"] for r in found["effects"]} == {"exact", "estimate"}
    assert "| tiny-qwen2-vl | final token | probability |" in capsys.readouterr().out
    assert all((tmp_path / f"effects-{m}.png").exists() for m in ("log-odds", "probability"))


# Kernels


@pytest.fixture(scope="module")
def kernels() -> Any:
    return importlib.import_module("benchmarks.kernels.__main__")


def test_every_way_makes_the_same_rows(kernels, capsys, monkeypatch, tmp_path):
    few = (kernels.Shape("few", 2, 40, 24, 8),)
    monkeypatch.setattr(kernels, "SHAPES", {"cpu": few, "cuda": few})
    file = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["kernels", "--quick", "--repeats", "1", "--json", str(file)])
    kernels.main()
    found = json.loads(file.read_text())
    assert {row["work"] for row in found["rows"]} == set(kernels.WORK)
    for row in found["rows"]:
        assert set(row["gb_per_s"]) == {"copy", "ours", "index_put", "where"}
        assert all(off <= 2e-2 for off in row["off"].values())
        assert row["of_copy"]["copy"] == 1
    assert "| few: 8 × 40 × 24 |" in capsys.readouterr().out


def test_cells_of_kernels_do_something(kernels):
    """Rows that are all clean would be equal for everyone, and fast."""
    plain = kernels.make(kernels.Shape("few", 2, 40, 24, 8), {}, torch.float32, "cpu")
    clean = plain["clean"][plain["clean_row"]]
    for work, options in kernels.WORK.items():
        made = kernels.make(kernels.Shape("few", 2, 40, 24, 8), options, torch.float32, "cpu")
        changed = (kernels.ours(made) != clean).any(dim=-1)
        assert 0.2 < changed.float().mean() < 0.9, work


def test_predictions_stand_in_the_documentation(kernels):
    page = (Path(__file__).parent.parent / "docs" / "measured" / "kernels.md").read_text()
    assert kernels.roofline.table() in page


def test_images_are_counted(capsys, monkeypatch, tmp_path):
    found = importlib.import_module("benchmarks.encodings")
    monkeypatch.setattr(found, "EXPERIMENTS", ("strip-swap",))
    file = tmp_path / "found.json"
    wanted = ["--model", "tiny-qwen2-vl", "--pairs", "2", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["encodings", *wanted])
    found.main()
    row = json.loads(file.read_text())["strip-swap"]
    # One more is distinct: the first run measures the model's grid on a picture of its own.
    assert row["alone"] > row["shared"] >= row["distinct"] - 1 > 0
    assert f"| strip-swap | {row['alone']} |" in capsys.readouterr().out
