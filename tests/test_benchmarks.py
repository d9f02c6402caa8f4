"""The benchmarks run, on models too small to time: nothing here asserts on a time."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_vlm.model import HookedVLM


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
        output, found = wrapper._by_torch_hooks(model, names, lambda: model.hf_model(**inputs))
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
    return importlib.import_module("benchmarks.throughput")


def test_every_tool_gives_the_same_answers(throughput, capsys, monkeypatch, tmp_path):
    file = tmp_path / "found.json"
    monkeypatch.setattr(
        "sys.argv",
        ["throughput", "--sizes", "2x64", "--repeats", "1", "--batch", "2", "--json", str(file)],
    )
    throughput.main()
    found = json.loads(file.read_text())
    assert set(found["ratios"]) == {"hook-loop", "restart"}
    for name, by_task in found["ratios"].items():
        assert set(by_task) == set(throughput.TASKS), name
        assert all(ratio > 0 for ratio in by_task.values())
    assert all(row["difference"] < 2e-6 for row in found["rows"])
    how = {row["task"]: row["how"] for row in found["rows"] if row["rival"] == "hook-loop"}
    assert how["final_token"].startswith("growing: 1 passes of 8 rows, from positions 183")
    assert how["vision"].startswith("restart (no growing batch: ")
    assert "| strip | hook-loop | 3 |" in capsys.readouterr().out
    assert found["machine"]["torch"] == torch.__version__


def test_cells_do_something(throughput):
    """A write that changes nothing would be equal for everyone, and fast."""
    model = HookedVLM(throughput.built.build("qwen2-vl", (2, 2), width=64))
    for task in throughput.tasks_for(model, throughput.TASKS, 2):
        found = throughput.Ours(model).run(task)
        apart = (found - found.mean(0)).abs().amax(dim=(1, 2))
        assert (apart > 0).all(), task.name


# Kernels


@pytest.fixture(scope="module")
def kernels() -> Any:
    return importlib.import_module("benchmarks.kernels")


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
    page = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text()
    assert kernels.roofline.table() in page
