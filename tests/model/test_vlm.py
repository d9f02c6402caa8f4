"""Running: filters, stopping early, inputs of every kind, and what the wrapper says of itself."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import HookError, UnknownHookError, UnsupportedModelError
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_returns_the_residual_in_front_of_the_layer(family, attn):
    model, inputs = tiny(family, attn), make_inputs(family, 2)
    names = ["blocks.*.hook_resid_pre", "ln_final.hook_in"]
    logits, whole = model.run_with_cache(inputs, names)
    ran = []
    handles = [
        model.hf_model.get_submodule(block.path).register_forward_hook(
            lambda *_, layer=layer: ran.append(layer)
        )
        for layer, block in enumerate(model.anatomy.lm.blocks)
    ]
    try:
        for layer in (0, 1, 3, -1, -3):
            ran.clear()
            stop = layer if layer >= 0 else 3 + layer
            expected = whole["ln_final.hook_in"] if stop == 3 else whole["resid_pre", stop]
            residual, cache = model.run_with_cache(inputs, names, stop_at_layer=layer)
            assert torch.equal(residual, expected)
            assert ran == list(range(stop))
            # The residual before the layer is the last thing that is read.
            assert [n for n in cache if "blocks" in n][
                -1
            ] == f"blocks.{min(stop, 2)}.hook_resid_pre"
            assert len(cache) == stop + 1
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(model(inputs), logits)
    assert not any(m._forward_pre_hooks for m in model.hf_model.modules())


def test_stopping_out_of_range_is_an_error_before_anything_runs():
    model, inputs = tiny("llava"), make_inputs("llava")
    for layer in (4, -4):
        with pytest.raises(UnknownHookError, match=rf"stop_at_layer={layer} .* layers 0 to 2"):
            model.run_with_cache(inputs, stop_at_layer=layer)
    assert model(inputs).shape == (1, 45, 300)


def test_edits_come_before_the_stop():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")
    edits = [("blocks.1.hook_resid_pre", lambda x, hook: x * 0), ("hook_logits", lambda x, hook: x)]
    residual, cache = model.run_with_cache(
        inputs, "blocks.*.hook_resid_pre", stop_at_layer=1, fwd_hooks=edits
    )
    assert not residual.any()
    assert not cache["resid_pre", 1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_filters(family):
    model, inputs = tiny(family), make_inputs(family)
    every = model.hook_names
    for names_filter, expected in (
        ("hook_embed", ["hook_embed"]),
        ("blocks.-1.hook_resid_post", ["blocks.2.hook_resid_post"]),
        (["hook_logits", "hook_embed"], ["hook_embed", "hook_logits"]),
        ("vision_projector.*", ["vision_projector.hook_in", "vision_projector.hook_out"]),
        (lambda name: name.endswith("resid_mid"), [n for n in every if n.endswith("resid_mid")]),
        (None, every),
    ):
        _, cache = model.run_with_cache(inputs, names_filter)
        assert list(cache) == expected
    assert every == list(model.hook_dict) == list(model.sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_mapping_of_the_forwards_tensors_will_do(family):
    model, tensors = HookedVLM(tiny(family).hf_model), make_inputs(family, 2, images=2)
    logits = model(tensors)
    assert torch.equal(model(Inputs(tensors, [])), logits)
    grids = model.grids(tensors)
    assert [len(row) for row in grids] == [2, 2]
    for row, prompt in enumerate(grids):
        for grid in prompt:
            assert (tensors["input_ids"][row][grid.positions] == 299).all()
            assert grid.shape == ((6, 6) if family == "llava" else (3, 3))
            assert (grid.image_size, grid.patch_rows, grid.prompt) == ((48, 48), 6, row)
    assert grids[0][1].positions.min() > grids[0][0].positions.max()
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert model.grids(text) == ((),)
    assert model(text).shape == (1, 3, 300)


def test_forward_arguments_are_passed_on():
    model, inputs = tiny("llava"), make_inputs("llava")
    assert model(inputs, logits_to_keep=1).shape == (1, 1, 300)
    assert model.run_with_hooks(inputs, logits_to_keep=2).shape == (1, 2, 300)
    logits, cache = model.run_with_cache(inputs, "hook_logits", logits_to_keep=1)
    assert torch.equal(cache["hook_logits"], logits)


def test_interventions_need_their_inputs():
    model, inputs = tiny("llava"), make_inputs("llava")
    ablation = Ablate(1, at=LastToken())
    with pytest.raises(HookError, match=r"needs the inputs it acts on"), model.hooks([ablation]):
        pass
    with model.hooks([ablation], inputs=inputs):
        logits = model(inputs)
    assert torch.equal(logits, model.run_with_hooks(inputs, [ablation]))
    assert not torch.equal(logits, model(inputs))


def test_sizes_have_transformer_lens_names():
    cfg = tiny("qwen2-vl").cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == (3, 48, 4, 12, 96)
    assert (cfg.n_key_value_heads, cfg.d_vocab, cfg.image_token_id) == (2, 300, 299)
    assert cfg.vision is not None
    assert (cfg.vision.n_layers, cfg.vision.d_model, cfg.vision.d_mlp) == (3, 32, 64)
    assert (cfg.vision.merge, cfg.vision.last_read, cfg.vision.image_size) == (2, 2, None)
    assert (cfg.attn_implementation, cfg.dtype) == ("sdpa", torch.float32)


def test_repr_and_names():
    model = tiny("gemma-3")
    assert repr(model) == (
        f"HookedVLM('tiny gemma-3', 3 layers, vision 3 layers, {len(model.sites)} sites)"
    )
    assert HookedVLM(model.hf_model).cfg.model_name == "Gemma3ForConditionalGeneration"


def test_what_needs_a_processor_says_so():
    model = HookedVLM(build("llava"))
    with pytest.raises(UnsupportedModelError, match=r"without a processor.*HookedVLM\(hf_model, p"):
        model.prepare("picture", "Hello")
    with pytest.raises(UnsupportedModelError, match="without a processor"):
        _ = model.tokenizer


def test_run_with_cache_of_an_open_block_sees_its_edits():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")
    name = "blocks.0.hook_mlp_out"
    with model.hooks([(name, lambda x, hook: x * 0)]) as same:
        assert same is model
        _, cache = model.run_with_cache(inputs, name)
    assert not cache[name].any()
    _, cache = model.run_with_cache(inputs, name)
    assert cache[name].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_touches_no_weight_and_computes_nothing(family):
    hf_model = build(family)
    tensors = [*hf_model.named_parameters(), *hf_model.named_buffers()]
    before = [(name, id(t), t.data_ptr(), t._version) for name, t in tensors]
    ran = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func)
            return func(*args, **(kwargs or {}))

    with Notes():
        model = HookedVLM(hf_model)
    assert ran == []  # a copy would be an operation
    assert model.hf_model is hf_model
    model.run_with_cache(make_inputs(family), "blocks.*.hook_resid_post")
    tensors = [*hf_model.named_parameters(), *hf_model.named_buffers()]
    assert [(name, id(t), t.data_ptr(), t._version) for name, t in tensors] == before


def test_a_module_that_is_replaced_after_wrapping_is_the_one_that_is_hooked():
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    block: Any = model.hf_model.get_submodule("model.language_model.layers.1")
    names = ["blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.*.hook_resid_post"]
    _, old = model.run_with_cache(inputs, names)

    class Doubled(type(block.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    new: Any = Doubled(block.mlp.config)
    new.load_state_dict(block.mlp.state_dict())
    removed, block.mlp = block.mlp, new
    logits, cache = model.run_with_cache(inputs, names)
    assert torch.equal(cache["mlp_out", 1], 2 * old["mlp_out", 1])
    assert torch.equal(logits, model(inputs))
    again, same = HookedVLM(model.hf_model).run_with_cache(inputs, names)
    assert torch.equal(again, logits)
    assert all(torch.equal(same[name], cache[name]) for name in cache)
    zero = [("blocks.1.hook_mlp_out", lambda x, hook: x * 0)]
    _, without = model.run_with_cache(inputs, names, fwd_hooks=zero)
    assert not without["mlp_out", 1].any()
    assert not any(m._forward_hooks for m in (new, removed))


def test_an_intervention_of_ones_own_may_name_sites_by_pattern():
    class Doubling:
        def hooks_for(self, _model, _inputs):
            return [("blocks.*.hook_mlp_out", lambda x, hook: x * 2)]

    model, inputs = tiny("llava"), make_inputs("llava")
    plain = [("blocks.*.hook_mlp_out", lambda x, hook: x * 2)]
    expected = model.run_with_hooks(inputs, plain)
    assert torch.equal(model.run_with_hooks(inputs, [Doubling()]), expected)
    with model.hooks([Doubling()], inputs):
        assert torch.equal(model(inputs), expected)
