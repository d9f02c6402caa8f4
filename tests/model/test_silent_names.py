"""Names of TransformerLens and torch on a model: they work, or say what to use in their place."""

import copy
import pickle  # noqa: TID251 - of our own object
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm import HookedVisionEncoder, HookedVLM, get_act_name
from hooked_vlm.errors import (
    DataError,
    HookedVLMError,
    HookError,
    UnknownNameError,
    UnsupportedModelError,
)
from hooked_vlm.hooks.hook_point import ByName
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.model.instead import INSTEAD


def inputs_of(model: HookedVLM) -> Inputs:
    return model.prepare(Image.new("RGB", (64, 64)), "red")


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_f_a_name_of_transformer_lens_says_what_to_use(name: str) -> None:
    model = tiny("llava")
    if hasattr(type(model), name):  # works here; the entry is for `HookedVisionEncoder`
        return
    assert not hasattr(model, name)
    with pytest.raises(AttributeError) as caught:
        getattr(model, name)
    assert isinstance(caught.value, HookedVLMError)
    assert INSTEAD[name] in str(caught.value) and len(str(caught.value)) <= 400


def test_f_other_names_point_to_the_wrapped_model_or_to_the_nearest_name() -> None:
    model = tiny("llava")
    with pytest.raises(UnknownNameError, match=r"use model\.hf_model\.get_output_embeddings"):
        getattr(model, "get_output_embeddings")  # noqa: B009
    with pytest.raises(UnknownNameError, match="Did you mean 'run_with_cache'"):
        getattr(model, "run_with_cahce")  # noqa: B009
    assert getattr(model, "nothing_of_the_kind", 3) == 3


def test_f_a_model_can_still_be_copied_and_pickled() -> None:
    model = HookedVLM(build("llava"))
    assert copy.copy(model).hook_dict is model.hook_dict
    again = pickle.loads(pickle.dumps(model.hook_dict))
    assert isinstance(again, ByName) and list(again) == list(model.hook_dict)


@pytest.mark.parametrize("family", FAMILIES)
def test_f_the_matrices_of_the_vocabulary(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, "ln_final.hook_normalized")
    assert model.W_U.shape == (model.cfg.d_model, model.cfg.d_vocab)
    assert model.W_E.shape == (model.cfg.d_vocab, model.cfg.d_model)
    torch.testing.assert_close(cache["ln_final.hook_normalized"] @ model.W_U, logits)
    assert model.W_U.data_ptr() == model.hf_model.get_submodule("lm_head").weight.data_ptr()  # type: ignore[union-attr]
    with pytest.raises(AttributeError):
        HookedVisionEncoder(model.hf_model).W_U  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_f_eval_and_train_act_on_the_wrapped_model() -> None:
    model = HookedVLM(build("llava"))
    assert model.train() is model and model.hf_model.training
    assert model.eval() is model and not model.hf_model.training
    assert model.train(False) is model and not model.hf_model.training


def test_f_to_moves_the_wrapped_model_and_what_is_known_of_it() -> None:
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    expected = HookedVLM(build("llava").double())
    inputs["pixel_values"] = inputs["pixel_values"].double()
    assert model.to(torch.float64) is model
    assert model.cfg == expected.cfg and model.cfg.dtype == torch.float64
    assert torch.equal(model(inputs), expected(inputs))
    assert model.to("meta", dtype=torch.float32).device.type == "meta"
    encoder = HookedVisionEncoder(build("llava")).to(dtype=torch.float64)
    assert encoder.dtype == torch.float64
    for wrong in (("gpu",), (), (torch.int64,)):
        with pytest.raises(HookError, match="to was given"):
            model.to(*wrong)


@pytest.mark.parametrize("method", ["__call__", "forward", "run_with_hooks", "generate"])
def test_f_inputs_are_one_mapping(method: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with pytest.raises(HookError, match=r"model\(inputs\), not model\(\*\*inputs\)") as caught:
        getattr(model, method)(**inputs)
    assert len(str(caught.value)) <= 400


def test_f_inputs_are_attributes_and_move_to_a_device_and_a_dtype() -> None:
    model = prepared("llava")
    inputs = inputs_of(model)
    assert inputs.input_ids is inputs["input_ids"]
    assert not hasattr(inputs, "pixels") and inputs.get("pixels") is None
    with pytest.raises(AttributeError, match="Did you mean 'input_ids'"):
        inputs.input_id  # noqa: B018
    with pytest.raises(KeyError, match="Did you mean 'pixel_values'"):
        inputs["pixel_value"]
    with pytest.raises(UnknownNameError, match=r"Give it \{\*\*inputs, 'input_ids': …\}"):
        inputs.input_ids = torch.zeros(1, 2)
    for moved in (
        inputs.to("cpu", torch.bfloat16),
        inputs.to(torch.bfloat16),
        inputs.to(device="cpu", dtype=torch.bfloat16),
    ):
        assert moved.pixel_values.dtype == torch.bfloat16
        assert moved.input_ids.dtype == torch.int64
        assert moved.grid is inputs.grid and moved.texts == inputs.texts
    assert inputs.to("meta").input_ids.device.type == "meta"
    assert copy.deepcopy(inputs).grid.shape == inputs.grid.shape
    with pytest.raises(DataError, match="to was given 'gpu'"):
        inputs.to("gpu")


def test_f_names_of_hooks_as_transformer_lens_has_them() -> None:
    assert get_act_name("result", 2) == "blocks.2.attn.hook_result"
    assert get_act_name("mid", 2) == "blocks.2.mlp.hook_mid"


def test_f_hook_dict_takes_the_spellings_that_hooks_take() -> None:
    points = tiny("llava").hook_dict
    assert points["blocks.0.hook_in"] is points["blocks.0.hook_resid_pre"]
    assert points["blocks.-1.hook_resid_post"] is points["blocks.2.hook_resid_post"]
    with pytest.raises(KeyError, match=r"Did you mean 'blocks\.0\.hook_resid_pre'"):
        points["blocks.0.hook_resid_per"]
    assert points.get("blocks.0.hook_resid_per") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_f_a_run_from_after_the_last_layer_is_the_logit_lens(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    n = model.cfg.n_layers
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, "blocks.*.hook_resid_*")
        last = model.run_from_layer(inputs, cache["resid_post", n - 1], n)
        early = model.run_from_layer(inputs, cache["resid_post", 0], layer=n)
        stopped = model.run_with_cache(inputs, "hook_embed", stop_at_layer=n)[0]
    torch.testing.assert_close(last, logits)
    assert torch.equal(model.run_from_layer(inputs, stopped, n), last)
    # By hand: the final norm and the head on the stream after block 0.
    norm = model.hf_model.get_submodule(str(model.anatomy.lm.final_norm))
    with torch.no_grad():
        expected = norm(cache["resid_post", 0]) @ model.W_U
    torch.testing.assert_close(early, expected)


def test_f_packed_weights_are_no_matrix() -> None:
    model = HookedVLM(build("llava"))
    head: Any = model.hf_model.get_submodule(model.anatomy.unembed)
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="may be quantised"):
        model.W_U  # noqa: B018


def test_f_sites_take_the_spellings_that_hooks_take() -> None:
    model = tiny("llava")
    assert model.sites["blocks.0.hook_in"] is model.sites["blocks.0.hook_resid_pre"]
    for found in (model.sites, model.hook_dict):
        with pytest.raises(UnknownNameError, match="Did you mean 'hook_embed'") as caught:
            found["hook_embde"]
        assert isinstance(caught.value, KeyError) and "hook_embde" not in found
        assert found.get("hook_embde") is None
