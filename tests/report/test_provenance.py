"""The record of a run: same weights, same hash; everything in it survives JSON."""

import json
import re
import subprocess
import time
from importlib import metadata

import pytest
import torch
from torch import nn

from helpers import synthetic_results as synthetic
from hooked_vlm.report import provenance
from hooked_vlm.report.provenance import Provenance, Stopwatch, describe_run, parameter_hash


def small_model(seed: int = 0, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.LayerNorm(4))


def test_same_weights_same_hash() -> None:
    first, second = small_model(), small_model(seed=1)
    assert parameter_hash(first) == parameter_hash(first)
    assert parameter_hash(first) != parameter_hash(second)
    second.load_state_dict(first.state_dict())
    assert parameter_hash(first) == parameter_hash(second)


def test_one_bit_of_one_weight_changes_the_hash() -> None:
    model = small_model()
    before = parameter_hash(model)
    with torch.no_grad():
        model[0].weight.view(torch.int32)[1, 2] ^= 1  # type: ignore[union-attr]
    assert parameter_hash(model) != before


def test_hash_sees_dtype_shape_and_name() -> None:
    zeros = {
        "float": nn.ParameterDict({"a": torch.zeros(4)}),
        "half": nn.ParameterDict({"a": torch.zeros(8, dtype=torch.bfloat16)}),
        "shape": nn.ParameterDict({"a": torch.zeros(2, 2)}),
        "name": nn.ParameterDict({"b": torch.zeros(4)}),
    }
    assert len({parameter_hash(model) for model in zeros.values()}) == len(zeros)


def test_hash_does_not_depend_on_the_order_of_construction() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert parameter_hash(nn.ParameterDict({"a": one, "b": two})) == parameter_hash(
        nn.ParameterDict({"b": two, "a": one})
    )


def test_hash_counts_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    alone = nn.Sequential(model[0])
    assert parameter_hash(model) == parameter_hash(alone)


def test_hash_of_scalar_and_offloaded_parameters() -> None:
    model = nn.ParameterDict({"scale": torch.tensor(2.0)})
    before = parameter_hash(model)
    assert parameter_hash(model.to("meta")) != before


def test_record_survives_json() -> None:
    config = {"pairs": 5, "dtype": "float32"}
    with Stopwatch() as watch:
        time.sleep(0.02)
    made = describe_run(
        small_model(), "tiny", watch, model_sha256="abc", experiment="e", config=config, seed=3
    )
    assert Provenance.from_json(made.to_json()) == made
    assert made.seed == 3
    assert made.n_parameters == 3 * 4 + 4 + 8
    assert made.packages["torch"] == metadata.version("torch")
    assert made.dtype == "float32"
    assert made.device == "cpu"
    assert made.wall_seconds >= 0.02
    assert made.peak_memory_mib > 10
    assert made.model_sha256 == "abc"
    assert json.loads(made.to_json())["config"] == {"pairs": 5, "dtype": "float32"}


def test_stopwatch_stops_when_the_block_raises() -> None:
    watch = Stopwatch()
    with pytest.raises(RuntimeError, match="stop"), watch:
        time.sleep(0.01)
        raise RuntimeError("stop")
    assert watch.seconds >= 0.01


def test_source_commit_is_a_commit_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = provenance.source_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)

    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert provenance.source_commit() is None


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ("tiny-qwen2-vl", "tiny-qwen2-vl"),
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
        ("/home/somebody/models/mine", "mine"),
        ("./mine", "mine"),
    ],
)
def test_a_page_calls_a_folder_by_its_last_part(given: str, title: str) -> None:
    assert synthetic.provenance(given).title == title
