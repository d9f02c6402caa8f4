"""The benchmarks run, on models too small to time: nothing here asserts on a time."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_vlm.model import HookedVLM


@pytest.fixture(scope="module")
def wrapper() -> Any:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("wrapper")
    finally:
        sys.path.remove(folder)
        for name in ("wrapper", "built"):
            sys.modules.pop(name, None)


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
