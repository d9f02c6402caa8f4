"""The attention function: eager's arithmetic, masks in every form, taps, and what they change."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from helpers.tiny_models import FAMILIES, IMAGE, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMWarning, HookError, UnsupportedModelError
from hooked_vlm.hooks import attention
from hooked_vlm.hooks.attention import NAME, PACKED_NAME, additive_mask, attend, pattern, scores
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
PATTERN, SCORES = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Causal(nn.Module):
    is_causal = True


QUERY = torch.zeros(2, 4, 5, 8)


def allowed(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask == 0


def test_both_names_are_registered_for_attention_and_for_masks():
    # With attention alone, transformers hands over no mask and the model is not causal.
    for name in (NAME, PACKED_NAME):
        assert name in AttentionInterface()
        assert name in AttentionMaskInterface()


def test_causal_attention_without_a_mask_is_refused():
    with pytest.raises(HookError, match="got no mask from the 'unheard_of' implementation"):
        additive_mask(Causal(), QUERY, QUERY, None, "unheard_of")
    with pytest.raises(HookError, match="got no mask"):
        additive_mask(Causal(), QUERY, QUERY, None, "eager")


def test_a_missing_mask_means_causal_where_the_implementation_says_so():
    for base in ("sdpa", "flash_attention_2"):
        found = allowed(additive_mask(Causal(), QUERY, QUERY, None, base))
        assert torch.equal(found[0, 0], torch.ones(5, 5).tril().bool())
    # Keys from a cache stand before the queries.
    found = allowed(additive_mask(Causal(), QUERY[:, :, :2], QUERY, None, "sdpa"))
    assert torch.equal(found[0, 0], torch.ones(2, 5).tril(3).bool())


def test_no_mask_is_needed_without_causality_or_with_one_query():
    assert additive_mask(nn.Module(), QUERY, QUERY, None, "sdpa") is None
    assert additive_mask(Causal(), QUERY, QUERY, None, "sdpa", is_causal=False) is None
    assert additive_mask(Causal(), QUERY[:, :, :1], QUERY, None, "unheard_of") is None


def test_masks_of_every_form_become_additive():
    boolean = torch.rand(2, 1, 5, 5) > 0.5
    found = additive_mask(Causal(), QUERY, QUERY, boolean, "sdpa")
    assert torch.equal(allowed(found), boolean)
    assert found is not None
    assert found.min() == torch.finfo(torch.float32).min
    assert additive_mask(Causal(), QUERY, QUERY, found, "eager") is found
    rows = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    flat = allowed(additive_mask(Causal(), QUERY, QUERY, rows, "flash_attention_2"))
    assert torch.equal(flat, torch.ones(5, 5).tril().bool() & rows[:, None, None].bool())
    window = additive_mask(Causal(), QUERY, QUERY, None, "flash_attention_2", sliding_window=2)
    assert allowed(window).sum() == 5 + 4
    with pytest.raises(HookError, match="cannot be read from a BlockMask"):
        additive_mask(Causal(), QUERY, QUERY, type("BlockMask", (), {})(), "flex_attention")


def test_arithmetic_is_that_of_sdpa():
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    weights = pattern(scores(query, key, None), query.dtype)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(attend(weights, value), expected.transpose(1, 2))
    capped = scores(query * 100, key, None, softcap=3.0)
    assert capped.abs().max() <= 3.0


def test_j2_soft_capping_bounds_large_scores_and_leaves_small_ones():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    plain = scores(query, key, None)
    capped = scores(query, key, None, softcap=3.0)
    torch.testing.assert_close(torch.atanh(capped / 3) * 3, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores(query, key, None, softcap=1e4), plain, rtol=1e-3, atol=1e-3)


def test_j2_a_sink_takes_part_of_the_attention_and_gives_nothing():
    weights, sinks = torch.randn(2, 4, 5, 7), torch.randn(1, 4, 1, 1).expand(2, 4, 5, 1)
    found = pattern(weights, weights.dtype, sinks)
    # Softmax written out: the sink stands in the denominator alone.
    expected = weights.exp() / (weights.exp().sum(-1, keepdim=True) + sinks.exp())
    torch.testing.assert_close(found, expected)
    # A sink beyond all scores takes everything, and one below them nothing.
    assert pattern(weights, weights.dtype, sinks + 100).max() < 1e-6
    torch.testing.assert_close(
        pattern(weights, weights.dtype, sinks - 100), pattern(weights, weights.dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_j2_the_softmax_is_computed_in_float32_as_eager_attention_does(dtype, with_sinks):
    weights = (3 * torch.randn(2, 4, 5, 7)).to(dtype)
    sinks = torch.randn(2, 4, 5, 1).to(dtype) if with_sinks else None
    whole = weights if sinks is None else torch.cat([weights, sinks], dim=-1)
    expected = whole.float().softmax(-1)[..., :7].to(dtype)
    found = pattern(weights, dtype, sinks)
    assert found.dtype == dtype and torch.equal(found, expected)


def capped_with_sinks(module, query, key, value, mask, scaling=None, **options):
    """Attention with both, written out by head and query: what a model's own file may do."""
    cap, sinks, out = options["softcap"], options["sinks"], torch.zeros_like(query.transpose(1, 2))
    for b, h, i in itertools.product(*map(range, query.shape[:3])):
        keys, values = key[b, h // 2], value[b, h // 2]
        raw = cap * torch.tanh(keys @ query[b, h, i] * scaling / cap)
        parts = raw.masked_fill(torch.arange(len(keys)) > i, -torch.inf).exp()
        out[b, i, h] = parts @ values / (parts.sum() + sinks[b, h, i].exp())
    return out, None


def test_j2_scores_and_patterns_with_soft_capping_and_sinks_are_the_models_own(monkeypatch):
    monkeypatch.setattr(attention, "_base_function", lambda *_: capped_with_sinks)
    monkeypatch.setattr(attention, "_VERIFIED", set())
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    options = {"scaling": 0.9, "softcap": 2.0, "sinks": torch.randn(2, 4, 5, 1)}
    mask = additive_mask(Causal(), query, key, None, "sdpa")
    seen: dict[str, Tensor] = {}
    edits: Any = {
        name: lambda x, name=name: seen.setdefault(name, x) for name in ("attn_scores", "pattern")
    }
    module: Any = Causal()
    module.config = type("Config", (), {"_attn_implementation": "eager"})()
    module.config = attention.tapped_config(module, edits, packed=False)
    found, weights = attention.hooked_attention(module, query, key, value, mask, **options)
    expected, _ = capped_with_sinks(module, query, key, value, mask, **options)
    torch.testing.assert_close(found, expected)
    assert weights is not None and torch.equal(seen["pattern"], weights)
    assert (weights.sum(-1) < 1).all()
    below = seen["attn_scores"].tril()
    assert below.abs().max() <= 2.0


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_j2_our_arithmetic_is_compared_by_the_size_of_the_values(size, monkeypatch):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    value = size * torch.randn(2, 2, 5, 8)
    options: Any = {"scaling": 0.9, "softcap": 2.0, "sinks": torch.randn(2, 4, 5, 1)}
    mask = additive_mask(Causal(), query, key, None, "sdpa")
    module: Any = Causal()
    module.config = type("Config", (), {"_attn_implementation": "eager"})()
    module.config = attention.tapped_config(module, {"pattern": lambda x: x}, packed=False)
    for factor, refused in ((1.0, False), (1.01, True), (0.99, True)):

        def own(*args, factor=factor, **options):
            out, weights = capped_with_sinks(*args, **options)
            return factor * out, weights

        monkeypatch.setattr(attention, "_base_function", lambda *_, own=own: own)
        monkeypatch.setattr(attention, "_VERIFIED", set())
        if refused:
            with pytest.raises(
                UnsupportedModelError, match=r"differs from eager attention by 0\.0"
            ):
                attention.hooked_attention(module, query, key, value, mask, **options)
        else:
            attention.hooked_attention(module, query, key, value, mask, **options)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_causal_but_for_gemmas_image(family, attn):
    model, inputs = tiny(family, attn), make_inputs(family, batch=2)
    _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_pattern")
    n = inputs["input_ids"].shape[1]
    future = torch.ones(n, n).triu(1).bool()
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    block = torch.zeros(n, n, dtype=torch.bool)
    block[image[0] : image[-1] + 1, image[0] : image[-1] + 1] = True
    for layer in range(model.cfg.n_layers):
        weights = cache["pattern", layer]
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, model.cfg.n_heads, n))
        if family != "gemma-3":
            assert (weights[..., future] == 0).all()
            assert (weights[..., ~future] > 0).all()
            continue
        assert (weights[..., future & ~block] == 0).all()
        assert (weights[..., future & block] > 0).all()


def test_gemmas_sliding_window_shows_in_the_pattern():
    model, inputs = tiny("gemma-3"), make_inputs("gemma-3", text=12)
    _, cache = model.run_with_cache(inputs, "blocks.*.attn.hook_pattern")
    assert (cache["pattern", 0][0, :, -1, :-10] == 0).all()
    assert (cache["pattern", 1][0, :, -1] > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_image_columns_and_renormalising_is_masking_their_scores(family):
    model, inputs = tiny(family, "eager"), make_inputs(family)
    image = inputs["input_ids"][0] == IMAGE
    after = int(image.nonzero().max()) + 1  # queries after the image see text too

    def cut(weights, hook):
        weights[:, :, after:, image] = 0
        return weights / weights.sum(-1, keepdim=True)

    def mask(weights, hook):
        weights[:, :, after:, image] = -torch.inf

    base = model(inputs)
    one = model.run_with_hooks(inputs, [(PATTERN, cut)])
    two = model.run_with_hooks(inputs, [(SCORES, mask)])
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert (one - base).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_queries_and_keys_are_edited_alike_by_eager_and_sdpa(family):
    inputs = make_inputs(family, batch=2)
    towers = ["", "vision_encoder."] if family == "qwen2-vl" else [""]
    for tower in towers:
        for part in ("rot_q", "rot_k"):
            name = f"{tower}blocks.1.attn.hook_{part}"
            edit = [(name, lambda x, hook: x * 1.5 + 0.1)]
            found = [tiny(family, a).run_with_hooks(inputs, edit) for a in ("eager", "sdpa")]
            torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
            assert (found[1] - tiny(family)(inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_head_axes_under_grouped_queries(family):
    model, inputs = tiny(family, "eager"), make_inputs(family)
    names = ["blocks.0.attn.hook_*", "vision_encoder.blocks.0.attn.hook_*"]
    _, cache = model.run_with_cache(inputs, names)
    n, cfg = inputs["input_ids"].shape[1], model.cfg
    for part, heads in (("q", 4), ("rot_q", 4), ("z", 4), ("k", 2), ("rot_k", 2), ("v", 2)):
        assert cache[part, 0].shape == (1, n, heads, cfg.d_head), part
    assert cache["pattern", 0].shape == (1, 4, n, n)
    assert cfg.vision is not None
    patches = 36 + cfg.vision.n_prefix
    for part in "qkvz":
        assert cache[part, 0, "vision_encoder"].shape == (1, patches, 4, cfg.vision.d_head)
    assert cache["pattern", 0, "vision_encoder"].shape == (1, 4, patches, patches)


def test_a_pattern_costs_eager_attention_in_its_layer_only(monkeypatch):
    model, inputs = HookedVLM(build("qwen2-vl")), make_inputs("qwen2-vl")
    base = model(inputs)
    with warnings.catch_warnings():  # the first of a kind is verified by one more call
        warnings.simplefilter("ignore")
        HookedVLM(build("qwen2-vl")).run_with_cache(inputs, PATTERN)
    fused = []
    real = nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        fused.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    model(inputs)
    everywhere = len(fused)
    assert everywhere == 6
    with pytest.warns(HookedVLMWarning, match="in 1 layer. Eager attention .* in place of sdpa"):
        logits = model.run_with_hooks(inputs, [(PATTERN, lambda x, hook: None)])
    assert len(fused) == everywhere + everywhere - 1
    torch.testing.assert_close(logits, base, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run_with_cache(inputs, SCORES)  # said once


def test_an_eager_model_is_told_nothing_even_in_nested_blocks():
    model, inputs = tiny("gemma-3", "eager"), make_inputs("gemma-3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.hooks([(PATTERN, lambda x, hook: None)]):
            model.run_with_hooks(inputs, [(PATTERN, lambda x, hook: x.flip(1))])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_attention_that_came_to_compute_something_else_is_refused(
    family, implementation, monkeypatch
):
    """An argument that scales the scores, under a name that nobody knows yet."""
    model = HookedVLM(build(family, implementation))
    block = model.anatomy.lm.blocks[1]
    assert block.attn is not None
    core: Any = model.hf_model.get_submodule(block.attn.path)
    own = attention._base_function(implementation, core)

    def sharper(module, query, key, value, mask, **options):
        return own(module, query * 1.1, key, value, mask, **options)

    hook = (PATTERN, lambda x, hook: None)
    inputs = make_inputs(family, 2)
    monkeypatch.setattr(attention, "_VERIFIED", set())
    model.run_with_hooks(inputs, [hook])
    assert attention._VERIFIED
    model.run_with_hooks(inputs, [hook])  # not compared again
    monkeypatch.setattr(attention, "_VERIFIED", set())
    monkeypatch.setattr(attention, "_base_function", lambda base, module: sharper)
    with pytest.raises(UnsupportedModelError, match="sites do not reproduce"):
        model.run_with_hooks(inputs, [hook])
    assert not model.is_hooked


@pytest.mark.parametrize("optional", [False, True])
def test_packed_attention_without_image_bounds_is_refused_where_it_must_have_them(optional):
    """A release that names the bounds anew; RADIO's attention is given none for one image."""

    class Bounded(nn.Module):
        is_causal = False

        def forward(self, hidden_states, cu_seqlens):
            raise NotImplementedError

    class Optional(Bounded):
        def forward(self, hidden_states, cu_seqlens=None):
            raise NotImplementedError

    module: Any = Optional() if optional else Bounded()
    module.config = type("Config", (), {"_attn_implementation": "sdpa"})()
    module.config = attention.tapped_config(module, {"v": lambda x: x * 2}, packed=True)
    one = torch.randn(1, 2, 4, 8)
    if optional:
        found, _ = attention.hooked_attention(module, one, one, one, None)
        expected = nn.functional.scaled_dot_product_attention(one, one, 2 * one)
        torch.testing.assert_close(found, expected.transpose(1, 2))
    else:
        with pytest.raises(HookError, match="gave no image boundaries"):
            attention.hooked_attention(module, one, one, one, None)


def test_j2_a_dtype_without_a_bound_of_its_own_is_compared_too(monkeypatch):
    monkeypatch.setattr(attention, "BOUNDS", {})
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module: Any = Causal()
    module.config = type("Config", (), {"_attn_implementation": "eager"})()
    module.config = attention.tapped_config(module, {"pattern": lambda x: x}, packed=False)
    mask = additive_mask(Causal(), query, key, None, "sdpa")
    options: Any = {"scaling": 0.9, "softcap": 2.0, "sinks": torch.randn(2, 4, 5, 1)}

    def larger(*args, **options):
        out, weights = capped_with_sinks(*args, **options)
        return 1.1 * out, weights

    monkeypatch.setattr(attention, "_base_function", lambda *_: larger)
    monkeypatch.setattr(attention, "_VERIFIED", set())
    with pytest.raises(UnsupportedModelError, match=r"differs from eager attention by 0\.09"):
        attention.hooked_attention(module, query, key, value, mask, **options)
