"""Loading by folder and by shipped name; what cannot be loaded, and why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.errors import UnsupportedModelError
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
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
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
def test_a_near_miss_of_a_shipped_name():
    name = available()[0]
    with pytest.raises(UnsupportedModelError, match=f"Did you mean '{name}'"):
        HookedVLM.from_pretrained(name + "s", local_files_only=True)


def test_inputs_made_elsewhere_run_on_a_loaded_model(tmp_path):
    save(HookedVLM(tiny("gemma-3").hf_model, prepared("gemma-3").processor), tmp_path)
    loaded = HookedVLM.from_pretrained(str(tmp_path))
    inputs = make_inputs("gemma-3")
    torch.testing.assert_close(loaded(inputs), tiny("gemma-3")(inputs))
