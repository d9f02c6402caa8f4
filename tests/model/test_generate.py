"""Generation under hooks: transformers' own greedy output, cached or not, prefill or every step."""

import warnings
from typing import Any

import pytest
import torch

from helpers.tiny_models import END, FAMILIES, IMAGE, START, make_inputs, tiny
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [START, END, IMAGE],
}
NOISE = torch.randn(48, generator=torch.Generator().manual_seed(0))
EDITS = {
    "residual": ("blocks.1.hook_resid_post", lambda x, hook: x + NOISE),
    "residual, last position": ("blocks.1.hook_resid_mid", lambda x, hook: last(x, NOISE)),
    "vision": ("vision_encoder.blocks.0.hook_resid_post", lambda x, hook: x * 2 + 1),
    "projector": ("vision_projector.hook_out", lambda x, hook: x.flip(1)),
    "pattern": ("blocks.0.attn.hook_pattern", lambda x, hook: x.flip(-1) * x),
    "rot_k": ("blocks.1.attn.hook_rot_k", lambda x, hook: -x),
    "logits": ("hook_logits", lambda x, hook: x.flip(-1)),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def hf(model: HookedVLM) -> Any:
    return model.hf_model


def last(x: torch.Tensor, added: torch.Tensor) -> None:
    """Adds to the last position in place: with no cache that must stay the prompt's last."""
    x[:, -1] += 3 * added


@pytest.mark.parametrize("family", FAMILIES)
def test_without_hooks_it_is_transformers_own(family):
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    expected = hf(model).generate(**inputs, **GREEDY)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 5
    for cached in (True, False):
        assert torch.equal(model.generate(inputs, use_cache=cached, **GREEDY), expected)
    reading = [("*", lambda x, hook: None)] if family == "llava" else []
    assert torch.equal(model.generate(inputs, fwd_hooks=reading, **GREEDY), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_hooks_act_alike_with_and_without_the_cache(family):
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    plain, changed = model.generate(inputs, **GREEDY), 0
    for word, edit in EDITS.items():
        cached = model.generate(inputs, fwd_hooks=[edit], prefill_only=True, **GREEDY)
        if word == "logits":
            continue  # it is not part of what a cache keeps
        options = {**GREEDY, "use_cache": False}
        uncached = model.generate(inputs, fwd_hooks=[edit], prefill_only=True, **options)
        assert torch.equal(cached, uncached), word
        changed += not torch.equal(cached, plain)
    assert changed >= 3  # small edits may leave the greedy ids as they were


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_edit_is_the_edit_of_a_forward_pass(family):
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    for edit in EDITS.values():
        logits = model.run_with_hooks(inputs, [edit])[:, -1]
        logits[:, GREEDY["suppress_tokens"]] = -torch.inf
        generated = model.generate(inputs, fwd_hooks=[edit], **{**GREEDY, "max_new_tokens": 1})
        assert torch.equal(generated[:, -1], logits.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_is_seen_and_counted(family):
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    n = inputs["input_ids"].shape[1]
    for cached, lengths in ((True, [n, 1, 1, 1, 1]), (False, [n, n + 1, n + 2, n + 3, n + 4])):
        steps, seen = [], []

        def note(x, hook, steps=steps):
            steps.append((hook.step, x.shape[1]))

        hooks = [
            ("blocks.0.hook_resid_pre", note),
            ("vision_encoder.hook_patch_embed", lambda x, hook, seen=seen: seen.append(hook.step)),
        ]
        options = {**GREEDY, "use_cache": cached}
        model.generate(inputs, fwd_hooks=hooks, **options)
        assert steps == list(enumerate(lengths))
        # generate() encodes the images once, before all steps; up to transformers 5.17 it does so
        # again wherever there is no cache.
        assert seen == [0] or (not cached and seen == list(range(5)))
        steps.clear()
        model.generate(inputs, fwd_hooks=hooks, prefill_only=True, **options)
        assert steps == ([(0, n)] if cached else [(i, n) for i in range(5)])


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_at_every_step_are_hooks_without_a_cache_at_the_last(family):
    """What each new token adds is computed under the hook, so a cache makes no difference."""
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    for word in ("residual", "vision", "rot_k"):
        runs = [
            model.generate(inputs, fwd_hooks=[EDITS[word]], use_cache=cached, **GREEDY)
            for cached in (True, False)
        ]
        assert torch.equal(*runs), word


def test_patterns_of_later_steps_have_one_query():
    model, inputs, shapes = tiny("qwen2-vl"), make_inputs("qwen2-vl"), []
    hook = ("blocks.0.attn.hook_pattern", lambda x, hook: shapes.append(tuple(x.shape)))
    model.generate(inputs, fwd_hooks=[hook], **GREEDY)
    n = inputs["input_ids"].shape[1]
    assert shapes == [(1, 4, n, n), *((1, 4, 1, n + i) for i in range(1, 5))]


def test_a_hooks_block_covers_generation_and_can_be_prefill_only():
    model, inputs, steps = tiny("gemma-3"), make_inputs("gemma-3"), []
    hook = ("blocks.0.hook_resid_pre", lambda x, hook: steps.append(hook.step))
    with model.hooks([hook]):
        model.generate(inputs, **GREEDY)
    assert steps == [0, 1, 2, 3, 4]
    steps.clear()
    with model.hooks([hook], prefill_only=True):
        model.generate(inputs, **GREEDY)
    assert steps == [0]


@pytest.mark.parametrize("word", ["residual", "vision", "rot_k"])
def test_one_block_covers_one_generation_after_the_other(word):
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, seed=1)
    expected = model.generate(inputs, fwd_hooks=[EDITS[word]], prefill_only=True, **GREEDY)
    logits = model.run_with_hooks(inputs, [EDITS[word]])
    with model.hooks([EDITS[word]], prefill_only=True):
        for _ in range(2):
            assert torch.equal(hf(model).generate(**inputs, **GREEDY), expected)
            torch.testing.assert_close(model(inputs), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_drive_generation(family):
    model = tiny(family)
    inputs, source = (make_inputs(family, 2, seed=seed) for seed in (1, 2))
    patch = Patch(1, source=source)
    cached = model.generate(inputs, fwd_hooks=[patch], **GREEDY)
    assert torch.equal(cached, model.generate(inputs, fwd_hooks=[patch], use_cache=False, **GREEDY))
    logits = model.run_with_hooks(inputs, [patch])[:, -1]
    logits[:, GREEDY["suppress_tokens"]] = -torch.inf
    assert torch.equal(cached[:, inputs["input_ids"].shape[1]], logits.argmax(-1))


def test_the_token_types_of_qwen_reach_the_model():
    # Without them transformers cannot place the image: positions, and so the ids, would change.
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, images=2, seed=1)
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["position_ids"].clone())

    handle = hf(model).model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.generate(inputs, **GREEDY)
        expected = seen[0]
        model.generate(inputs, use_cache=False, **GREEDY)
    finally:
        handle.remove()
    n = inputs["input_ids"].shape[1]
    for positions in seen[-5:]:
        assert torch.equal(positions[..., :n], expected)
    assert len(expected[-1].unique()) < n  # tokens of one column share their last coordinate


def test_a_vision_hook_on_text_alone_is_said():
    model = tiny("llava")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    name = "vision_encoder.hook_patch_embed"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.generate(inputs, fwd_hooks=[(name, lambda x, hook: x)], **GREEDY)
    assert any(issubclass(w.category, HookedVLMWarning) for w in said)
