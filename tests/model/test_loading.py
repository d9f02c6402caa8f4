"""Loading by folder and by shipped name; what cannot be loaded, and why."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import zoo
from hooked_vlm.errors import (
    HookedVLMError,
    HookedVLMWarning,
    MissingWeightsError,
    NoGridError,
    UnsupportedModelError,
)
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.model.loading import load_pretrained
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.zoo import available


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def save(model: HookedVLM, folder: Path) -> None:
    hf_model: Any = model.hf_model
    hf_model.save_pretrained(folder)
    model.processor.save_pretrained(folder)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothere"), "./nothere", "models/ours/nothere"):
        with pytest.raises(UnsupportedModelError, match=r"There is no folder .*nothere"):
            HookedVLM.from_pretrained(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModelError, match="Could not load"):
        HookedVLM.from_pretrained(str(tmp_path / "empty"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back_as_it_was(family, tmp_path):
    model = prepared(family)
    save(model, tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    loaded = HookedVLM.from_pretrained(str(tmp_path), device="cpu", attn_implementation="eager")
    assert type(loaded.hf_model) is type(model.hf_model)
    assert loaded.cfg.attn_implementation == "eager"
    assert loaded.cfg.model_name == str(tmp_path)
    assert not loaded.hf_model.training
    assert list(loaded.hook_dict) == list(model.hook_dict)
    image = torch.rand(3, 64, 64)
    inputs, expected = (m.prepare(image, "left or right") for m in (loaded, model))
    assert inputs.texts == expected.texts
    # Where torchvision is installed, what is loaded scales pixels in another order.
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])
    torch.testing.assert_close(loaded(inputs), model(expected), atol=1e-5, rtol=1e-5)


def test_the_dtype_asked_for(tmp_path):
    model = prepared("qwen2-vl")
    save(model, tmp_path)
    half, _ = load_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert load_pretrained(str(tmp_path))[0].dtype == torch.float32


def test_only_safetensors_are_loaded(tmp_path):
    model: Any = tiny("llava").hf_model
    model.config.save_pretrained(tmp_path)
    prepared("llava").processor.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"transformers reports: .*safetensors"):
        HookedVLM.from_pretrained(str(tmp_path))


def test_what_is_nowhere():
    name = "no-such-folder/no-such-model"
    with pytest.raises(UnsupportedModelError, match=f"Could not load '{name}': it is none of"):
        HookedVLM.from_pretrained(name, local_files_only=True)


def test_a_language_model_is_no_vlm(tmp_path):
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 50,
    }
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"Could not load .*LlamaConfig"):
        HookedVLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", available())
def test_shipped_models_load_by_name(name):
    model = HookedVLM.from_pretrained(name)
    assert model.cfg.model_name == name
    assert model.cfg.dtype == torch.float32
    assert (model.cfg.vision is not None) and model.processor is not None
    assert not model.hf_model.training
    with pytest.raises(UnsupportedModelError, match="not device_map"):
        HookedVLM.from_pretrained(name, device_map="auto")


@pytest.mark.skipif(not available(), reason="no model ships with this checkout")
def test_a_near_miss_of_a_shipped_name(monkeypatch):
    """Without an owner before a slash, the hub is not asked: offline it is asked for long."""
    name, asked = available()[0], []
    with pytest.raises(UnsupportedModelError, match=f"Did you mean '{name}'"):
        HookedVLM.from_pretrained(f"owner/{name}", local_files_only=True)

    def from_pretrained(name: str, **_: Any) -> None:
        asked.append(name)
        raise OSError("the hub was asked")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(UnsupportedModelError, match=f"Did you mean '{name}'"):
        HookedVLM.from_pretrained(name + "s")
    assert not asked
    with pytest.raises(UnsupportedModelError, match="the hub was asked"):
        HookedVLM.from_pretrained("gpt2")
    assert asked == ["gpt2"]


def test_inputs_made_elsewhere_run_on_a_loaded_model(tmp_path):
    save(HookedVLM(tiny("gemma-3").hf_model, prepared("gemma-3").processor), tmp_path)
    loaded = HookedVLM.from_pretrained(str(tmp_path))
    inputs = make_inputs("gemma-3")
    torch.testing.assert_close(loaded(inputs), tiny("gemma-3")(inputs))


def changed_checkpoint(folder: Path, change: Any) -> str:
    """Returns a copy of a shipped model with other weights in its file."""
    shutil.copytree(zoo.folder("tiny-gemma-3"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def without(part: str) -> Any:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (without("layers.0.self_attn.q_proj"), "layers.0.self_attn.q_proj.weight"),
        (without("vision_tower"), "vision_tower"),
        (without("multi_modal_projector"), "multi_modal_projector"),
        (lambda weights: {f"renamed.{name}": w for name, w in weights.items()}, "embed_tokens"),
    ],
    ids=["one weight", "encoder", "projector", "all renamed"],
)
def test_g5_missing_weights_are_an_error_unless_allowed(tmp_path: Path, change: Any, names: str):
    name = changed_checkpoint(tmp_path / "model", change)
    with pytest.raises(MissingWeightsError, match=f"missing in the checkpoint.*{names}") as caught:
        HookedVLM.from_pretrained(name)
    assert "allow_missing_weights=True" in str(caught.value)
    assert len(str(caught.value)) <= 400
    with pytest.warns(HookedVLMWarning, match="random numbers"):
        HookedVLM.from_pretrained(name, allow_missing_weights=True)


def test_g5_more_weights_than_the_model_has_are_no_error(tmp_path: Path):
    name = changed_checkpoint(tmp_path / "model", lambda w: {**w, "extra": torch.zeros(2)})
    HookedVLM.from_pretrained(name)


def with_config(folder: Path, part: str, **values: Any) -> str:
    """Returns a copy of a shipped model with other values in a part of its config.json."""
    shutil.copytree(zoo.folder("tiny-gemma-3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "values", [{"hidden_size": -1}, {"hidden_size": "a"}, {"num_hidden_layers": 0}], ids=str
)
def test_i3_a_config_that_transformers_refuses(tmp_path: Path, values: dict[str, Any]):
    with pytest.raises(UnsupportedModelError, match="Could not load") as caught:
        HookedVLM.from_pretrained(with_config(tmp_path / "model", "text_config", **values))
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("values", [{"image_token_index": 500}, {"mm_tokens_per_image": 4}])
def test_i3_a_config_of_another_processor_gives_no_grid(tmp_path: Path, values: dict[str, Any]):
    model = HookedVLM.from_pretrained(with_config(tmp_path / "model", "", **values))
    says = "refuses what its processor made"
    with pytest.warns(HookedVLMWarning, match=says) as caught:
        inputs = model.prepare(Image.new("RGB", (192, 192)), "red")
    assert len(str(caught[0].message)) <= 400
    with pytest.raises(NoGridError, match=says):
        inputs.grid  # noqa: B018


def vit(folder: Path, without: str) -> str:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if without not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("part", ["embeddings.cls_token", "layer.1.", "layernorm.weight"])
def test_g5_an_encoder_without_some_of_its_weights_is_an_error(tmp_path: Path, part: str):
    with pytest.raises(MissingWeightsError, match="missing in the checkpoint"):
        HookedVisionEncoder.from_pretrained(vit(tmp_path, without=part))


def test_g5_an_encoder_without_its_pooler_is_a_warning(tmp_path: Path):
    name = vit(tmp_path, without="pooler")
    with pytest.warns(HookedVLMWarning, match="pooler.*"):
        HookedVisionEncoder.from_pretrained(name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x05"),
        ("config.json", b"{"),
        ("config.json", b"null"),
        ("config.json", b"\xff\xfe"),
        ("tokenizer.json", b"{}"),
        ("processor_config.json", b"[]"),
        ("chat_template.jinja", b"{% if %}"),
    ],
)
def test_i3_a_damaged_file_of_a_model_is_an_error_of_ours(
    tmp_path: Path, file: str, content: bytes
):
    folder = tmp_path / "model"
    shutil.copytree(zoo.folder("tiny-gemma-3"), folder)
    (folder / file).write_bytes(content)
    with pytest.raises(HookedVLMError) as caught:
        model = HookedVLM.from_pretrained(str(folder))
        model.prepare(torch.rand(3, 48, 48), "x")  # a template is read when it is used
    assert len(str(caught.value)) <= 400
