"""Running from a layer on: the full run's logits bit for bit, and nothing left behind."""

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.checks.laws import YES, check_start_layer
from hooked_vlm.errors import HookedVLMWarning, HookError, UnknownHookError
from hooked_vlm.hooks.stand_ins import (
    layer_index,
    replaying,
    returns_tuples,
    run_until,
    skipping,
)
from hooked_vlm.model.vlm import HookedVLM


MODELS = (*FAMILIES, "qwen3_vl")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def setting(name: str) -> tuple[HookedVLM, Any]:
    """A model and inputs of two prompts, of unequal length where the model pads."""
    if name in FAMILIES:
        return tiny(name), make_inputs(name, batch=2, images=2)
    model = suite.build(name)  # Qwen3-VL: DeepStack adds to the residual between the first blocks
    images = [suite.picture(128, 64), suite.picture(128, 128, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, model.prepare(images, ["What is this?", "And?"])


def residual_at(model: HookedVLM, inputs: Any, layer: int) -> Tensor:
    return model.run_with_cache(inputs, "hook_embed", stop_at_layer=layer)[0]


@pytest.mark.parametrize("name", MODELS)
def test_from_every_layer_it_is_the_full_run(name: str) -> None:
    model, inputs = setting(name)
    base, n = model(inputs, use_cache=False), model.cfg.n_layers
    for layer in range(n):
        residual = residual_at(model, inputs, layer)
        for given in (layer, layer - n):
            assert torch.equal(model.run_from_layer(inputs, residual, given), base), given
    assert torch.equal(model(inputs, use_cache=False), base)


def test_deepstack_is_among_what_is_tested() -> None:
    model, inputs = setting("qwen3_vl")
    assert any(".deepstack." in site for site in model.sites)
    _, cache = model.run_with_cache(inputs, "blocks.*.hook_resid_*")
    added = cache["resid_pre", 1] - cache["resid_post", 0]
    assert added.abs().max() > 0  # nor could it be left out: it is in the residual of layer 1


@pytest.mark.parametrize("name", MODELS)
def test_another_residual_gives_what_patching_it_gives(name: str) -> None:
    model, inputs = setting(name)
    base = model(inputs, use_cache=False)
    for layer in range(model.cfg.n_layers):
        own = residual_at(model, inputs, layer)
        other = own + 0.3 * torch.randn_like(own)
        found = model.run_from_layer(inputs, other, layer)
        patch = [(f"blocks.{layer}.hook_resid_pre", lambda x, hook, new=other: new.clone())]
        assert torch.equal(found, model.run_with_hooks(inputs, patch, use_cache=False))
        assert not torch.equal(found, base)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_from_the_layer_on_act_as_in_the_full_run(name: str) -> None:
    model, inputs = setting(name)
    last = model.cfg.n_layers - 1
    edits = [
        (f"blocks.{last}.hook_attn_out", lambda x, hook: x * 0.5),
        (f"blocks.{last}.hook_resid_pre", lambda x, hook: x * 1.1),
        ("ln_final.hook_normalized", lambda x, hook: x + 0.1),
    ]
    found = model.run_from_layer(inputs, residual_at(model, inputs, last), last, edits)
    assert torch.equal(found, model.run_with_hooks(inputs, edits, use_cache=False))
    assert not torch.equal(found, model(inputs, use_cache=False))


SKIPPED = ("hook_resid_pre", "attn.hook_q", "hook_attn_out", "mlp.hook_post", "hook_resid_post")


@pytest.mark.parametrize("site", SKIPPED)
def test_hooks_in_skipped_layers_warn_that_they_never_ran(site: str) -> None:
    model, inputs = setting("qwen2-vl")
    ran = []
    hook = (f"blocks.0.{site}", lambda x, hook: ran.append(hook.name))
    residual = residual_at(model, inputs, 2)
    with pytest.warns(HookedVLMWarning, match="never ran, so nothing was read or written"):
        model.run_from_layer(inputs, residual, 2, [hook])
    assert not ran
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run_from_layer(inputs, residual_at(model, inputs, 0), 0, [hook])
    assert ran == [f"blocks.0.{site}"]


@pytest.mark.parametrize("site", ["hook_embed", "hook_merged_embed"])
def test_writes_to_embeddings_that_the_given_residual_replaces_warn(site: str) -> None:
    model, inputs = setting("qwen2-vl")
    residual, read = residual_at(model, inputs, 1), []
    base = model.run_from_layer(inputs, residual, 1)
    with pytest.warns(HookedVLMWarning, match=rf"{site} has no effect.*blocks\.1\.hook_resid_pre"):
        logits = model.run_from_layer(inputs, residual, 1, [(site, lambda x, hook: x * 2)])
    assert torch.equal(logits, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run_from_layer(inputs, residual, 1, [(site, lambda x, hook: read.append(x.shape))])
    assert len(read) == 1


@pytest.mark.parametrize("layer", [-4, 4, 7])
def test_layers_out_of_range_are_refused(layer: int) -> None:
    model, inputs = setting("llava")
    residual = residual_at(model, inputs, 0)
    with pytest.raises(UnknownHookError, match=rf"layer={layer} is out of range.* layers 0 to 2"):
        model.run_from_layer(inputs, residual, layer)


def test_a_residual_of_another_shape_is_refused() -> None:
    model, inputs = setting("llava")
    with pytest.raises(HookError, match="expected"):
        model.run_from_layer(inputs, residual_at(model, inputs, 1)[:, 1:], 1)


# --- what is left behind -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_restored_whatever_raises(family: str) -> None:
    model, inputs = setting(family)
    blocks = [model.hf_model.get_submodule(b.path) for b in model.anatomy.lm.blocks]
    base, residual = model(inputs), residual_at(model, inputs, 2)

    def fails(x: Tensor, hook: Any) -> None:
        raise RuntimeError("planted")

    for site in ("hook_embed", "blocks.2.hook_attn_out", "hook_logits"):
        with pytest.raises(RuntimeError, match="planted"):
            model.run_from_layer(inputs, residual, 2, [(site, fails)])
        assert not any("forward" in vars(block) for block in blocks)
        assert torch.equal(model(inputs), base)


class Double(nn.Module):
    """A block: twice its input, alone or at the head of a tuple."""

    def __init__(self, length: int = 0) -> None:
        super().__init__()
        self.length = length

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = hidden_states * 2
        return (out, *["more"] * (self.length - 1)) if self.length else out


def chain(blocks: Any, x: Tensor, by_name: bool) -> Any:
    for block in blocks:
        x = block(hidden_states=x, mask=1) if by_name else block(x, 1)
        x = x[0] if isinstance(x, tuple) else x
    return x


@pytest.mark.parametrize("by_name", [False, True])
def test_skipped_blocks_return_their_input_in_the_shape_they_use(by_name: bool) -> None:
    blocks, x = [Double(), Double(1), Double(3), Double()], torch.ones(2)
    lengths = returns_tuples(blocks, lambda: chain(blocks, x, by_name))
    assert lengths == [0, 1, 3, 0]
    with skipping(blocks[:3], lengths[:3]):
        assert torch.equal(chain(blocks, x, by_name), 2 * x)
        assert blocks[2](x) == (x, None, None)
    assert torch.equal(chain(blocks, x, by_name), 16 * x)
    assert not any(block._forward_hooks for block in blocks)


def test_a_forward_that_was_set_on_a_block_comes_back() -> None:
    """As accelerate sets it, for weights that are elsewhere."""
    block, x = Double(), torch.ones(2)

    def own(hidden_states: Tensor) -> Tensor:
        return hidden_states * 7

    block.forward = own  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), skipping([block], [0]):
        assert torch.equal(block(x), x)
        _ = 1 / 0
    assert vars(block)["forward"] is own


def test_tuples_are_counted_and_nothing_stays_when_it_raises() -> None:
    blocks = [Double(), Double(2)]

    def run() -> None:
        blocks[1](blocks[0](torch.ones(1)))
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        returns_tuples(blocks, run)
    assert not any(block._forward_hooks for block in blocks)


# --- running up to a layer -----------------------------------------------------------------


def test_indices_count_from_either_end() -> None:
    assert [layer_index(i, 3, "layer") for i in range(-3, 4)] == [0, 1, 2, 0, 1, 2, 3]
    for layer in (-4, 4):
        with pytest.raises(UnknownHookError, match=f"here={layer} is out of range"):
            layer_index(layer, 3, "here")


def test_a_pass_that_ends_early_says_so_and_leaves_no_hook() -> None:
    model = HookedVLM(build("llava"))
    inputs = make_inputs("llava")
    before = [len(m._forward_pre_hooks) for m in model.hf_model.modules()]
    with pytest.raises(HookError, match="ended before it reached LM layer 1"):
        run_until(model.hf_model, model.anatomy.lm, 1, lambda: None)
    residual = run_until(model.hf_model, model.anatomy.lm, 1, lambda: model(inputs))
    assert torch.equal(residual, residual_at(model, inputs, 1))
    assert [len(m._forward_pre_hooks) for m in model.hf_model.modules()] == before


def test_a_run_starts_from_several_residual_streams() -> None:
    model = suite.build("glm5_next")  # [batch pos stream d_model] between its blocks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = model.prepare([suite.picture(64, 64)], "What is this?")
    assert residual_at(model, inputs, 1).ndim == 4
    assert check_start_layer(model, inputs).verdict == YES


def test_j2_without_a_module_or_a_recording_nothing_is_replayed() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    with replaying(None, [x]), replaying(module, None):
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))
    with replaying(module, [x]):
        assert torch.equal(module(x), x)
