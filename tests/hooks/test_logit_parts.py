"""Direct logit attribution, by parts, heads and neurons, against formulas written out."""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.checks.attribution import check_attribution
from hooked_vlm.errors import (
    DataError,
    HookedVLMWarning,
    UnknownHookError,
    UnsupportedModelError,
)
from hooked_vlm.hooks.linear_norm import LinearNorm
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")

TOKENS, OTHERS = torch.tensor([3, 8]), torch.tensor([5, 7])


@cache
def ran(family: str) -> tuple[Any, Tensor, Any]:
    model = tiny(family)
    logits, cached = model.run_with_cache(make_inputs(family, 2))
    return model, logits.detach(), cached


def lm_of(model: Any) -> Any:
    return model.hf_model.get_submodule(model.anatomy.lm.path)


def gain_of(norm: Any, family: str) -> Tensor:
    return (1 + norm.weight if family == "gemma-3" else norm.weight).detach()


def rms(x: Tensor) -> Tensor:
    return (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pos", [None, -1, slice(3, 6)])
def test_attributions_are_the_formula_and_sum_to_the_logits(family: str, pos: Any) -> None:
    model, logits, cached = ran(family)
    parts, labels = cached.decompose_resid(pos_slice=pos, return_labels=True)
    attrs = cached.logit_attrs(parts, TOKENS, OTHERS, pos_slice=pos)
    # By hand: gain and scale of the final norm, then the unembedding.
    at = (slice(None), slice(None) if pos is None else pos)
    final = cached["resid_post", -1][at]
    gain, u = gain_of(lm_of(model).norm, family), model.W_U.detach()
    directions = (u[:, TOKENS] - u[:, OTHERS]).T
    directions = directions if pos == -1 else directions[:, None]
    plain = (parts * gain / rms(final) * directions).sum(-1)
    torch.testing.assert_close(attrs, plain, atol=1e-5, rtol=1e-4)
    wanted = torch.stack([logits[b][..., TOKENS[b]] - logits[b][..., OTHERS[b]] for b in (0, 1)])
    torch.testing.assert_close(attrs.sum(0), wanted[at], atol=1e-5, rtol=1e-4)
    assert labels == ["embed", *(f"{i}_{x}_out" for i in range(3) for x in ("attn", "mlp"))]
    lens = cached.logit_lens(pos)
    streams = cached.accumulated_resid(pos_slice=pos)
    ids = torch.zeros(lens.shape[1:-1], dtype=torch.long)
    torch.testing.assert_close(
        cached.logit_attrs(streams[-1:], ids, pos_slice=pos)[0], lens[-1, ..., 0]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_go_through_the_output_map_and_the_norm_after_it(family: str) -> None:
    model, _, cached = ran(family)
    heads, labels = cached.stack_head_results(return_labels=True)
    assert labels == [f"L{i}H{h}" for i in range(3) for h in range(4)]
    for layer in range(3):
        block = lm_of(model).layers[layer]
        weight = block.self_attn.o_proj.weight.detach()
        z = cached["z", layer]
        raw = torch.einsum("bphd,ohd->hbpo", z, weight.unflatten(1, (4, -1)))
        if family == "gemma-3":  # a norm after attention, at the run's own scale
            norm = block.post_attention_layernorm
            raw = raw * gain_of(norm, family) / rms(raw.sum(0))
        torch.testing.assert_close(heads[4 * layer : 4 * layer + 4], raw, atol=1e-5, rtol=1e-4)
    every = cached.stack_head_results(2, incl_remainder=True, pos_slice=[0, -1])
    assert every.shape == (9, 2, 2, 48)
    torch.testing.assert_close(every.sum(0), cached["resid_pre", 2][:, [0, -1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_columns_of_the_output_map(family: str) -> None:
    model, _, cached = ran(family)
    found, labels = cached.stack_neuron_results(
        pos_slice=-1, neuron_slice=[1, -1], return_labels=True, layer=1
    )
    assert labels == ["L0N1", "L0N95"]
    block, post = lm_of(model).layers[0], cached["post", 0]
    weight = block.mlp.down_proj.weight.detach()
    raw = post[:, -1, [1, 95], None] * weight.T[[1, 95]]
    if family == "gemma-3":
        norm = block.post_feedforward_layernorm
        raw = raw * gain_of(norm, family) / rms(post @ weight.T)[:, -1:]
    torch.testing.assert_close(found, raw.transpose(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_follows_the_same_norms(family: str) -> None:
    """A norm after attention must not be taken for rounding."""
    wide = ran(family)[-1]
    model = HookedVLM(build(family)).to(torch.bfloat16)
    logits, cached = model.run_with_cache(make_inputs(family, 2))
    for kind in ("decompose_resid", "stack_head_results"):
        exact, found = (getattr(c, kind)(pos_slice=-1) for c in (wide, cached))
        size = float(exact.abs().max())
        assert float((found - exact).abs().max()) <= 0.05 * size, kind
    heads: Any = cached.stack_head_results(incl_remainder=True, pos_slice=-1)
    assert heads.dtype == torch.float32
    attrs = cached.logit_attrs(heads, TOKENS, pos_slice=-1).sum(0)
    wanted = torch.stack([logits[b, -1, TOKENS[b]] for b in (0, 1)]).float()
    assert float((attrs - wanted).detach().abs().max()) <= 0.03 * float(logits.detach().abs().max())


def test_a_stack_is_normed_before_a_block() -> None:
    cached = ran("gemma-3")[-1]
    streams, labels = cached.accumulated_resid(2, incl_mid=True, apply_ln=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre"]
    torch.testing.assert_close(streams[-1], cached["normalized", 2, "ln1"], atol=1e-5, rtol=1e-4)
    mid = cached.apply_ln_to_stack(cached["resid_mid", 1][None], 1, mlp_input=True)[0]
    torch.testing.assert_close(mid, cached["normalized", 1, "ln2"], atol=1e-5, rtol=1e-4)
    parts = cached.decompose_resid(2, mode="mlp", apply_ln=True, pos_slice=0)
    assert parts.shape == (3, 2, 48)
    with_labels = cached.decompose_resid(2, mode="attn", incl_embeds=False, return_labels=True)
    assert with_labels[1] == ["0_attn_out", "1_attn_out"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_vl",
        "mllama",
        "gemma4",
        "granite4_vision",
        "cohere2_vision",
        "llava",
        "blip-2",
        "inkling_mm_model",  # a convolution over tokens ends attention, where others have a norm
    ],
)
def test_the_law_holds_with_deepstack_caps_factors_and_biases(model_type: str) -> None:
    model = suite.build(model_type)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    found = check_attribution(model, inputs)
    assert found.verdict == "yes", found.note


def test_the_law_finds_a_lost_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LinearNorm.through
    monkeypatch.setattr(LinearNorm, "through", lambda self, *args: own(self, *args) / self.gain)
    assert check_attribution(tiny("gemma-3"), make_inputs("gemma-3")).verdict == "no"


def test_logits_that_are_capped_are_said_to_be() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = suite.build("muse_glimmer")
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
        logits, cached = model.run_with_cache(inputs, "*hook_*[edts]")
        assert not torch.allclose(logits, cached["hook_logits"])
        stack: Any = cached.decompose_resid(pos_slice=-1)
    for _ in range(2):  # each time, also when the cap is known
        with pytest.warns(HookedVLMWarning, match="caps its logits"):
            attrs = cached.logit_attrs(stack, 3, pos_slice=-1).sum(0)
    torch.testing.assert_close(attrs, cached["hook_logits"][:, -1, 3], atol=1e-5, rtol=1e-4)


def test_a_cap_is_not_taken_for_rounding_in_half_precision() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = suite.build("muse_glimmer").to(torch.bfloat16)
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
        inputs = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs.items()}
        head: Any = model.hf_model.get_submodule(model.anatomy.unembed)
        raw = model.run_with_cache(inputs, "*hook_logits")[1]["hook_logits"]
        head.weight.mul_(100 / raw.abs().max())
        logits, cached = model.run_with_cache(inputs, "*hook_*[edts]")
        raw = cached["hook_logits"][:, -1]
        assert float(logits.abs().max()) < 20.5
        stack: Any = cached.decompose_resid(pos_slice=-1)
    with pytest.warns(HookedVLMWarning, match="caps its logits"):
        attrs = cached.logit_attrs(stack, int(raw.abs().argmax()), pos_slice=-1).sum(0)
    assert float((attrs - raw.flatten()[raw.abs().argmax()]).abs()) <= 0.03 * 100


def test_a_norm_with_bias_is_measured() -> None:
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    found = LinearNorm.measured(norm, 16, torch.device("cpu"))
    assert found is not None
    assert found.centred
    torch.testing.assert_close(found.gain.float(), norm.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias.float(), norm.bias.detach())
    parts = torch.randn(3, 5, 16)
    y = norm(parts.sum(0)).detach()
    through = found.through(parts, found.scale(parts.sum(0), y)).sum(0) + found.bias
    torch.testing.assert_close(through.float(), y)
    for other in (torch.nn.Identity(), torch.nn.Linear(16, 16), torch.nn.Tanh()):
        with torch.no_grad():
            assert LinearNorm.measured(other, 16, torch.device("cpu")) is None


def test_what_does_not_fit_is_refused() -> None:
    model, _, cached = ran("llava")
    parts = cached.decompose_resid(pos_slice=-1)
    for wrong, said in (
        (lambda: cached.logit_attrs(parts, 3), "pos_slice=None"),
        (lambda: cached.logit_attrs(parts, 300, pos_slice=-1), "0 to 299"),
        (lambda: cached.logit_attrs(parts, torch.ones(3).long(), pos_slice=-1), r"shape \(3,\)"),
        (lambda: cached.decompose_resid(0, incl_embeds=False), "leaves no part"),
        (lambda: cached.stack_head_results(0), "No block below 0"),
        (lambda: cached.stack_neuron_results(neuron_slice=96), "neurons 0 to 95"),
        (lambda: cached.stack_head_results(pos_slice=99), "pos_slice=99"),
        (lambda: cached.accumulated_resid(tower="vision_encoder", apply_ln=True), "apply_ln"),
    ):
        with pytest.raises(DataError, match=said):
            wrong()
    for layer in (4, -2):
        with pytest.raises(UnknownHookError, match="expected 0 to 3"):
            cached.accumulated_resid(layer)
    edit = [("blocks.1.hook_attn_out", lambda x, hook: x + 1)]
    _, edited = model.run_with_cache(make_inputs("llava", 2), fwd_hooks=edit)
    with pytest.raises(DataError, match=r"blocks\.1\.hook_attn_out do not sum"):
        edited.stack_head_results()
    edit = [("ln_final.hook_normalized", lambda x, hook: x + 1)]
    _, edited = model.run_with_cache(make_inputs("llava", 2), fwd_hooks=edit)
    with pytest.raises(DataError, match="a hook wrote there"):
        edited.logit_attrs(edited.decompose_resid(), 3)


@pytest.mark.parametrize("model_type", ["granite4_vision", "gemma4"])
def test_heads_are_what_is_added_whatever_else_is_cached(model_type: str) -> None:
    """Factors of parts, and of the whole stream in later blocks, are in heads and neurons."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = suite.build(model_type)
        for block in model.anatomy.lm.blocks:
            layer: Any = model.hf_model.get_submodule(block.path)
            if hasattr(layer, "layer_scalar"):
                layer.layer_scalar.fill_(0.5)
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
        names = ["blocks.*resid*", "blocks.*_out", "blocks.*.hook_z", "blocks.*.hook_post"]
        cached = model.run_with_cache(inputs, names)[1]
        parts: Any
        pieces: Any
        parts, labels = cached.decompose_resid(return_labels=True)
        for kind in ("attn", "mlp"):
            stack = cached.stack_head_results if kind == "attn" else cached.stack_neuron_results
            pieces, found = stack(return_labels=True)
            letter = "H" if kind == "attn" else "N"
            for block in range(model.cfg.n_layers):
                own = [i for i, x in enumerate(found) if str(x).startswith(f"L{block}{letter}")]
                added = parts[list(labels).index(f"{block}_{kind}_out")]
                torch.testing.assert_close(pieces[own].sum(0), added, atol=1e-5, rtol=1e-3)
        few = model.run_with_cache(inputs, ["*hook_z", "blocks.*.hook_attn_out"])[1]
        with pytest.raises(UnknownHookError, match="holds no resid_pre, resid_post of block 0"):
            few.stack_head_results()
        some = model.run_with_cache(inputs, ["*hook_z", "blocks.*.hook_attn_out", "*resid*"])[1]
        with pytest.raises(UnknownHookError, match=r"holds no .*mlp_out"):
            some.stack_head_results()


def test_weights_and_hooks_after_the_stream_are_noticed() -> None:
    model: Any = HookedVLM(build("llava"))
    inputs = make_inputs("llava", 2)
    with torch.no_grad():
        doubled = [("hook_logits", lambda x, hook: 2 * x)]
        logits, cached = model.run_with_cache(inputs, fwd_hooks=doubled)
        with pytest.warns(HookedVLMWarning, match="off the run's logits"):
            cached.logit_lens(-1)
        stack = cached.decompose_resid(pos_slice=-1)
        attrs = cached.logit_attrs(stack, TOKENS, pos_slice=-1).sum(0)
        torch.testing.assert_close(attrs[1], logits[1, -1, TOKENS[1]], atol=1e-5, rtol=1e-4)
        one = cached.select([1])
        again = one.logit_attrs(one.decompose_resid(pos_slice=-1), int(TOKENS[1]), pos_slice=-1)
        torch.testing.assert_close(again.sum(0)[0], attrs[1])
        noise = torch.randn(logits.shape[-1])
        edit = [("hook_logits", lambda x, hook: x + noise)]
        _, edited = model.run_with_cache(inputs, fwd_hooks=edit)
        with pytest.raises(UnsupportedModelError, match="times a number"):
            edited.logit_attrs(stack, 3, pos_slice=-1)
        head = model.hf_model.get_submodule(model.anatomy.unembed)
        model.hf_model.set_submodule(model.anatomy.unembed, torch.nn.Linear(48, 300, bias=False))
        with pytest.raises(DataError, match="weights were changed after"):
            cached.logit_lens()
        model.hf_model.set_submodule(model.anatomy.unembed, head)
        head.weight.mul_(2)
        for read in (
            cached.logit_lens,
            lambda: cached.logit_attrs(stack, 3, pos_slice=-1),
            cached.stack_head_results,
        ):
            with pytest.raises(DataError, match="weights were changed after"):
                read()


def test_what_changes_which_logits_there_are_is_not_in_the_lens() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    with torch.no_grad():
        whole = model.run_with_cache(inputs, "blocks.*resid*")[1].logit_lens()
        labels = {**inputs, "logits_to_keep": 1}
        cached = model.run_with_cache(labels, "blocks.*resid*")[1]
        torch.testing.assert_close(cached.logit_lens(), whole)
        torch.testing.assert_close(cached.logit_lens([0, -1]), whole[:, :, [0, -1]])


def test_several_streams_are_refused() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = suite.build("gemma3n")
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
        cached = model.run_with_cache(inputs)[1]
        streams: Any = cached.accumulated_resid()
        with pytest.raises((DataError, UnsupportedModelError)):
            cached.logit_attrs(streams, 3)
