"""The anatomy is read from the module tree: three layouts, a stranger, and what is not a VLM."""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn
from transformers import LlamaModel

from helpers.strange_models import (
    Pre,
    Sandwich,
    Stranger,
    llama,
    stranger_inputs,
)
from helpers.tiny_models import FAMILIES, build, tiny
from hooked_vlm.anatomy.model import read_anatomy
from hooked_vlm.anatomy.parts import Projection
from hooked_vlm.errors import UnknownHookError, UnsupportedModelError
from hooked_vlm.model.vlm import HookedVLM


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def paths_in(value) -> list[str]:
    """Every module path that an anatomy names."""
    if is_dataclass(value):
        names = [f.name for f in fields(value) if f.name != "layout"]
        return [path for name in names for path in paths_in(getattr(value, name))]
    if isinstance(value, tuple):
        return [path for item in value for path in paths_in(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_leads_to_a_module(family):
    model = tiny(family)
    found = paths_in(model.anatomy)
    assert len(found) > 50
    for path in found:
        model.hf_model.get_submodule(path)


def test_qwen2_vl():
    anatomy = tiny("qwen2-vl").anatomy
    lm, vision = anatomy.lm.blocks[1], anatomy.vision
    assert vision is not None
    assert anatomy.lm.path == "model.language_model"
    assert (vision.path, anatomy.projector) == ("model.visual", "model.visual.merger")
    assert (vision.merge, vision.n_prefix, vision.patch_size) == (2, 0, 8)
    assert (vision.image_size, vision.read_layers, vision.pos_embed) == (None, None, None)
    assert (vision.d_model, anatomy.lm.d_model, anatomy.image_token_id) == (32, 48, 299)
    assert vision.packed
    attn = vision.blocks[0].attn
    assert attn is not None
    assert attn.packed
    assert attn.k == Projection("model.visual.blocks.0.attn.qkv", "3hd", 1)
    assert lm.attn is not None
    assert (lm.attn.n_heads, lm.attn.n_key_value_heads, lm.attn.d_head) == (4, 2, 12)
    assert lm.ln2 == "model.language_model.layers.1.post_attention_layernorm"
    assert lm.attn_out == "model.language_model.layers.1.self_attn"
    assert lm.mlp is not None
    assert lm.mlp.pre.path.endswith("gate_proj")
    assert lm.mlp.linear is not None
    assert lm.mlp.linear.path.endswith("up_proj")


def test_gemma_3():
    anatomy = tiny("gemma-3").anatomy
    lm, vision = anatomy.lm.blocks[1], anatomy.vision
    assert vision is not None
    # The norm of Qwen2-VL's name stands on the other side of the residual addition.
    assert lm.attn_out == "model.language_model.layers.1.post_attention_layernorm"
    assert lm.ln2 == "model.language_model.layers.1.pre_feedforward_layernorm"
    assert lm.mlp_out == "model.language_model.layers.1.post_feedforward_layernorm"
    assert anatomy.projector == "model.multi_modal_projector"
    assert (vision.image_size, vision.n_prefix, vision.merge) == (48, 0, 1)
    attn = vision.attention
    assert attn is not None
    assert attn.q is not None
    assert not attn.rotary
    assert lm.attn is not None
    assert lm.attn.d_head == 16


@pytest.mark.parametrize(("layer", "slots", "last"), [(-2, (2,), 1), (-1, (3,), 2), (1, (1,), 0)])
def test_llava(layer, slots, last):
    with torch.device("meta"):
        anatomy = read_anatomy(build("llava", vision_feature_layer=layer))
    vision = anatomy.vision
    assert vision is not None
    assert (vision.n_prefix, vision.read_layers, vision.last_read) == (1, slots, last)
    assert str(vision.pos_embed).endswith("position_embedding")
    assert anatomy.projector == "model.multi_modal_projector"
    with torch.device("meta"):
        listed = read_anatomy(build("llava", vision_feature_layer=[0, -2])).vision
    assert listed is not None
    assert (listed.read_layers, listed.last_read) == ((0, 2), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_device_gives_the_same_anatomy(family):
    with torch.device("meta"):
        anatomy = read_anatomy(build(family))
    assert anatomy == tiny(family).anatomy


@pytest.mark.parametrize("block", [Pre, Sandwich])
def test_a_model_of_ones_own_is_read_and_hooked(block):
    hf_model = Stranger(block)
    model, inputs = HookedVLM(hf_model), stranger_inputs()
    anatomy = model.anatomy
    sandwich = block is Sandwich
    lm = anatomy.lm.blocks[2]
    assert (anatomy.lm.path, anatomy.embed, anatomy.unembed) == ("mouth", "mouth.words", "speak")
    assert anatomy.vision is not None
    assert (anatomy.vision.path, anatomy.projector) == ("eyes", "bridge")
    assert lm.attn is not None
    assert lm.ln1 == "mouth.steps.2.first_norm"
    assert lm.attn.q == Projection("mouth.steps.2.mixing_attention.wq")
    assert lm.attn.out == "mouth.steps.2.mixing_attention.wo"
    assert lm.ln2 == f"mouth.steps.2.{'third' if sandwich else 'second'}_norm"
    assert lm.attn_out == f"mouth.steps.2.{'second_norm' if sandwich else 'mixing_attention'}"
    assert lm.mlp_out == f"mouth.steps.2.{'fourth_norm' if sandwich else 'ffn'}"
    assert lm.mlp is not None
    assert lm.mlp.pre == Projection("mouth.steps.2.ffn.grow")
    assert lm.mlp.down == "mouth.steps.2.ffn.shrink"
    assert (model.cfg.d_model, model.cfg.vision.d_model) == (16, 24)  # type: ignore[union-attr]
    assert not any("pattern" in name for name in model.hook_dict)  # it computes attention itself

    base, (logits, cache) = hf_model(**inputs).logits, model.run_with_cache(inputs)
    assert torch.equal(logits, base)
    assert set(cache) == set(model.hook_dict)
    for tower, n_layers in ((None, 3), ("vision_encoder", 2)):
        for i in range(n_layers):
            pre, mid, post = (cache[f"resid_{place}", i, tower] for place in ("pre", "mid", "post"))
            assert torch.equal(pre + cache["attn_out", i, tower], mid)
            assert torch.equal(mid + cache["mlp_out", i, tower], post)
    for name in model.hook_dict:
        changed = model.run_with_hooks(inputs, [(name, lambda x, hook: x.flip(-1) * 1.5 + 0.3)])
        assert (changed - base).abs().max() > 0, name
    assert [grid.shape for (grid,) in model.grids(inputs)] == [(2, 2), (2, 2)]
    residual, _ = model.run_with_cache(inputs, stop_at_layer=1)
    assert torch.equal(residual, cache["resid_pre", 1])


@pytest.mark.filterwarnings("ignore:Attention scores or patterns")
def test_a_language_model_alone():
    model, inputs = HookedVLM(llama(), processor=print), {"input_ids": torch.tensor([[3, 4, 5]])}
    assert model.anatomy.vision is None
    assert model.cfg.vision is None
    logits, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(logits, model.hf_model(**inputs).logits)
    assert set(cache) == set(model.hook_dict)
    assert "l = 0..1" in model.describe()
    assert model.grids(inputs) == ((),)
    for name in ("vision_encoder.blocks.0.hook_resid_pre", "vision_projector.hook_out"):
        with pytest.raises(UnknownHookError, match="no vision encoder"):
            model.run_with_hooks(inputs, [(name, lambda x, hook: None)])
    for call in (model.require_vision, lambda: model.prepare("picture.png", "Hello")):
        with pytest.raises(UnsupportedModelError, match="has no vision encoder, so it takes no im"):
            call()


def test_models_without_the_parts_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"get_output_embeddings\(\) returned nothing"):
        HookedVLM(LlamaModel(llama().config))
    with pytest.raises(UnsupportedModelError, match=r"get_input_embeddings\(\) returned nothing"):
        HookedVLM(nn.Linear(2, 2))

    class Hollow(Stranger):
        def get_decoder(self) -> nn.Module:
            return self.speak

    with pytest.raises(UnsupportedModelError, match="Linear has no list of blocks with attention"):
        HookedVLM(Hollow())

    blind = Stranger()
    blind.eyes.cutter = nn.Linear(1, 1)  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="Tower has no map that cuts"):
        HookedVLM(blind)


@pytest.mark.parametrize("method", ["get_decoder", "get_input_embeddings", "get_output_embeddings"])
def test_a_question_that_transformers_no_longer_answers_is_an_error(method, monkeypatch):
    model = tiny("llava").hf_model
    owner = next(kind for kind in type(model).__mro__ if method in vars(kind))
    monkeypatch.delattr(owner, method)
    if hasattr(model, method):  # a base class answers as well
        pytest.skip(f"{method} is defined twice")
    with pytest.raises(UnsupportedModelError, match=rf"has no {method}\(\)"):
        read_anatomy(model)
