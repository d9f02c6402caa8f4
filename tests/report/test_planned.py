"""Predictions before a run: against torch's own counts on a small model, and for a large config."""

import json
import shutil
from dataclasses import replace

import pytest

from benchmarks.planned import counted
from hooked_vlm import HookedVLM, zoo
from hooked_vlm.errors import DataError, UnsupportedModelError
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.options import Config
from hooked_vlm.report.cards import card_of, cards
from hooked_vlm.report.planned import RunPlan, plan_run


@pytest.mark.slow
def test_a_prediction_is_what_torch_counts() -> None:
    config = Config(pairs=2)
    plan = plan_run("final-token", "tiny-qwen2-vl", config=config)
    model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    counted(model, "final-token", config, {})  # controls run once for a model
    found = counted(model, "final-token", config, {})
    assert plan.operations == pytest.approx(found, rel=0.2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a configuration of the sizes of Qwen2-VL-7B, and a processor; no weights."""
    folder = tmp_path_factory.mktemp("large")
    source = zoo.folder("tiny-qwen2-vl")
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    config["text_config"] |= text
    rope = config["text_config"].get("rope_parameters") or config["text_config"]["rope_scaling"]
    rope["mrope_section"] = [16, 24, 24]
    config["text_config"].pop("head_dim", None)
    config["text_config"].pop("layer_types", None)
    config["vision_config"] |= {"depth": 32, "embed_dim": 1280, "hidden_size": 3584}
    config["vision_config"]["num_heads"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_large_model_is_planned_from_its_configuration(large: str) -> None:
    plan = plan_run("strip-swap", large, workers=8, dtype="bfloat16")
    (step,) = plan.steps
    assert step.parts == 14 and step.name == "strip-swap on squares"
    assert 13e9 < plan.weights < 16e9 and 1e9 < step.peak < 20e9
    assert 1e15 < step.operations < 1e17
    said = str(plan)
    for part in ("predicted", "fits into H200", "8 workers", "30% of 989 TFLOP/s", "nvidia.com"):
        assert part in said
    small = replace(plan, card=card_of("l4"), utilisation=0.6)
    assert small.hours == pytest.approx(plan.hours * 989 / 121 / 2)
    assert "fits into L4" in str(small)
    assert "DOES NOT FIT into L4" in str(replace(small, weights=2 * plan.weights))


@pytest.mark.slow
def test_every_experiment_of_a_reproduction_is_counted() -> None:
    plan = plan_run("reproduce", "tiny-gemma-3", config=Config(pairs=4, batch_size=4))
    assert [step.name for step in plan.steps] == [s.name for s in registry.steps("reproduce")]
    assert all(step.operations > 0 and step.parts for step in plan.steps) and not plan.unknown
    parts = sum(step.parts for step in plan.steps)
    assert f"reproduce on tiny-gemma-3 in float32: {parts} parts" in str(plan)


def test_an_experiment_of_unknown_work_is_named() -> None:
    plan = RunPlan("m", "mine", cards()["L4"], 1, "float32", 0.3, 10**9, (), ("mine on squares",))
    assert "not counted: mine on squares" in str(plan)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"card": "H20"}, DataError, "no card 'H20'.* Did you mean .*'H200'"),
        ({"dtype": "auto"}, DataError, "dtype='auto'.*bfloat16"),
        ({"workers": 0}, DataError, "workers=0"),
        ({"options": {"itmes": "5"}}, DataError, "no option 'itmes'"),
        ({"utilisation": 30.0}, DataError, "utilisation=30"),
        ({"suite": "repoduce"}, DataError, "Did you mean 'reproduce'"),
        ({"model": "/no/such/folder"}, UnsupportedModelError, "configuration and its processor"),
    ],
)
def test_a_wrong_argument_is_refused(how: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        plan_run(**{"suite": "behaviour", "model": "tiny-qwen2-vl", **how})


def test_cards_name_their_sources() -> None:
    assert all(card.source.startswith("https://") for card in cards().values())
    assert cards()["H200"].rate("bfloat16") > cards()["H200"].rate("float32") > 1e12
