"""With no hook attached the wrapped model is transformers' own, bit for bit; hooked eager too."""

from typing import Any

import pytest
import torch

from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
SHAPES = [(1, 1), (2, 1), (2, 2)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_hooks_no_difference(family, attn):
    hf_model = build(family, attn)
    cases = [make_inputs(family, batch, images) for batch, images in SHAPES]
    before = [hf_model(**inputs).logits for inputs in cases]
    model = HookedVLM(hf_model)
    for inputs, logits in zip(cases, before, strict=True):
        assert torch.equal(model(inputs), logits)
        assert torch.equal(model.run_with_hooks(inputs), logits)
        # Two images in a prompt, two prompts in a batch: not one prompt repeated.
        assert len(inputs["input_ids"]) == 1 or not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_with_every_site_read_is_eager_bit_for_bit(family):
    model = tiny(family, "eager")
    for batch, images in SHAPES:
        inputs = make_inputs(family, batch, images)
        logits, cache = model.run_with_cache(inputs)
        assert torch.equal(logits, model.hf_model(**inputs).logits)
        assert torch.equal(cache["hook_logits"], logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_with_every_site_read_is_close_and_without_patterns_equal(family):
    model, inputs = tiny(family), make_inputs(family, 2)
    base = model.hf_model(**inputs).logits
    square = ("hook_pattern", "hook_attn_scores")
    logits, cache = model.run_with_cache(inputs, lambda name: not name.endswith(square))
    assert torch.equal(logits, base)
    assert any("hook_rot_q" in name for name in cache)
    torch.testing.assert_close(model.run_with_cache(inputs)[0], base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_those_transformers_returns(family):
    model, inputs = tiny(family, "eager"), make_inputs(family, 2)
    expected = model.hf_model(**inputs, output_attentions=True).attentions
    _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_pattern")
    for layer, weights in enumerate(expected):
        assert torch.equal(cache["pattern", layer], weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_slots_are_the_hidden_states_transformers_returns(family):
    model, inputs = tiny(family), make_inputs(family, 2)
    expected = model.hf_model(**inputs, output_hidden_states=True).hidden_states
    _, cache = model.run_with_cache(inputs, ["blocks.*.hook_resid_*", "ln_final.hook_normalized"])
    found = [cache["resid_pre", i] for i in range(3)] + [cache["ln_final.hook_normalized"]]
    assert len(expected) == len(found)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projector_gives_what_get_image_features_gives(family):
    model, inputs = tiny(family), make_inputs(family, 2)
    images = {n: inputs[n] for n in ("pixel_values", "image_grid_thw") if n in inputs}
    hf_model: Any = model.hf_model
    expected = hf_model.get_image_features(**images).pooler_output
    _, cache = model.run_with_cache(inputs, "vision_projector.hook_out")
    found = cache["vision_projector.hook_out"]
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_wrapping_copies_and_renames_nothing():
    hf_model = build("llava")
    before = {name: tensor.data_ptr() for name, tensor in hf_model.state_dict().items()}
    modules = [type(module) for module in hf_model.modules()]
    model = HookedVLM(hf_model)
    model.run_with_cache(make_inputs("llava"))
    assert {n: t.data_ptr() for n, t in model.hf_model.state_dict().items()} == before
    assert [type(module) for module in hf_model.modules()] == modules


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_bfloat16(family):
    model = HookedVLM(build(family, dtype=torch.bfloat16))
    inputs = make_inputs(family)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    base = model(inputs)
    assert base.dtype == torch.bfloat16
    logits, cache = model.run_with_cache(inputs, lambda name: "hook_rot" not in name)
    assert logits.dtype == torch.bfloat16
    assert {tensor.dtype for value in cache.values() for tensor in value} == {torch.bfloat16}
    for name in ("*blocks.1.hook_resid_mid", "*blocks.1.attn.hook_q", "blocks.*.mlp.hook_post"):
        written = model.run_with_hooks(inputs, [(name, lambda x, hook: x.clone())])
        assert torch.equal(written, base)


def test_gradients_flow_through_hooks():
    with torch.enable_grad():
        model, inputs = HookedVLM(build("gemma-3")), make_inputs("gemma-3")
        added = torch.zeros(48, requires_grad=True)
        names = ["vision_projector.hook_out", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
        for name in names:
            logits = model.run_with_hooks(inputs, [(name, lambda x, hook: x + added)])
            (gradient,) = torch.autograd.grad(logits[0, -1, 7], added)
            assert gradient.abs().max() > 0
