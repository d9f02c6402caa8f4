"""The activations of a generation: each position once, with its step, however it was generated."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import CacheMemoryError, DataError, HookedVLMWarning, HookError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.generation_cache import GenerationCache
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.model import memory
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken


GREEDY: dict[str, Any] = {
    "do_sample": False,
    "suppress_tokens": [297, 298, 299],
    "max_new_tokens": 5,
}
NAMES = ["*hook_embed", "*resid*", "*.hook_q", "*rot_k", "*.hook_v", "*pattern", "hook_logits"]


def whole(model: HookedVLM, inputs: Any, answer: Tensor) -> Any:
    """Returns the inputs of one run on prompt and answer, without the last token."""
    given, ids = dict(inputs), answer[:, :-1]
    new = ids.shape[1] - given["input_ids"].shape[1]
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in given:
            marks = given[name]
            given[name] = torch.cat([marks, marks.new_zeros(len(marks), new)], dim=1)
    return given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_position_is_that_of_one_run_on_prompt_and_answer(
    family: str, use_cache: bool
) -> None:
    model, inputs = tiny(family, attn="eager"), make_inputs(family, batch=2)
    length = inputs["input_ids"].shape[1]
    answer, cache = model.generate_with_cache(inputs, NAMES, use_cache=use_cache, **GREEDY)
    assert torch.equal(answer, model.generate(inputs, use_cache=use_cache, **GREEDY))
    expected = model.run_with_cache(whole(model, inputs, answer), list(cache))[1]
    assert answer.shape[1] == length + 5
    assert len(cache) > 20
    for name, value in cache.items():
        if name.startswith("vision"):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
            continue
        positions, steps = cache.positions(name), cache.steps(name)
        first = length - 1 if name == "hook_logits" else 0  # generate computes the last alone
        assert positions.tolist() == list(range(first, length + 4))
        assert steps.tolist() == [0] * (length - first) + [1, 2, 3, 4]
        if isinstance(value, Tensor):
            full = expected[name][:, positions]
            torch.testing.assert_close(value, full, rtol=1e-4, atol=1e-4)
            continue
        # Patterns: by pass, the queries that it added, and the keys that the layer still holds.
        for found, made in zip(value, cache.passes(name), strict=True):
            full = expected[name][:, :, list(made.positions)][..., list(made.key_positions)]
            torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-5)


def test_sliding_windows_keep_fewer_keys() -> None:
    model, inputs = tiny("gemma-3", attn="eager"), make_inputs("gemma-3")
    _, cache = model.generate_with_cache(inputs, "*pattern", **GREEDY)
    sliding, full = ([len(p.key_positions) for p in cache.passes(("pattern", i))] for i in (0, 1))
    assert sliding == [18, 10, 10, 10, 10] and full == [18, 19, 20, 21, 22]
    assert [x.shape[-1] for x in cache["pattern", 0]] == sliding


def test_several_sequences_have_a_row_each() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", batch=2)
    torch.manual_seed(0)
    options = {**GREEDY, "do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    answer, cache = model.generate_with_cache(inputs, "blocks.*.hook_resid_post", **options)
    assert len({tuple(row) for row in answer.tolist()}) > 2
    rows = {n: x.repeat_interleave(3, 0) for n, x in make_inputs("qwen2-vl", batch=2).items()}
    rows["pixel_values"] = inputs["pixel_values"].view(2, 36, -1).repeat_interleave(3, 0)
    rows["pixel_values"] = rows["pixel_values"].flatten(0, 1)
    expected = model.run_with_cache(whole(model, rows, answer), "blocks.*.hook_resid_post")[1]
    for name, value in cache.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    one = cache.select([4])
    assert isinstance(one, GenerationCache)
    bare = one.remove_batch_dim()
    assert bare["resid_post", 0].shape == value.shape[1:]
    assert one.has_batch_dim
    assert not bare.has_batch_dim
    assert one.positions(("resid_post", 0)).equal(cache.positions(("resid_post", 0)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["qwen3_vl", "mllama"])
def test_more_architectures(model_type: str) -> None:
    model = suite.build(model_type)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    options["suppress_tokens"] = [model.cfg.image_token_id]
    names = ["*resid_post", "*hook_k", "*hook_pattern"]
    with_cache, without = (
        model.generate_with_cache(inputs, names, use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(with_cache[0], without[0])
    assert list(with_cache[1]) == list(without[1])
    for name, value in with_cache[1].items():
        other = without[1][name]
        for one, two in zip(
            value if isinstance(value, list) else [value],
            other if isinstance(other, list) else [other],
            strict=True,
        ):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_sites_whose_positions_are_not_known_are_refused() -> None:
    for model_type, site, said in (
        ("gemma3n", "blocks.*.hook_resid_post", "several streams"),
        ("t5gemma2", "blocks.*.hook_v", "other positions than the prompt's"),
    ):
        model = suite.build(model_type)
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What?")
        with pytest.raises(HookError, match=said):
            model.generate_with_cache(inputs, site, max_new_tokens=3)
        assert not model.is_hooked


def test_hooks_of_the_generation_are_in_the_cache() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    site = "blocks.1.hook_resid_post"
    hooks: Any = [(site, lambda x, hook: 0 * x)]
    _, cache = model.generate_with_cache(inputs, site, fwd_hooks=hooks, **GREEDY)
    assert not cache[site].any()
    _, cache = model.generate_with_cache(
        inputs, site, fwd_hooks=hooks, prefill_only=True, use_cache=False, **GREEDY
    )
    length = inputs["input_ids"].shape[1]
    assert not cache[site][:, :length].any() and cache[site][:, length:].abs().min() > 0
    _, cache = model.generate_with_cache(
        inputs, site, fwd_hooks=[Ablate(site, at=LastToken())], **GREEDY
    )
    zero = (cache[site] == 0).all(-1)[0]
    assert zero.nonzero().flatten().tolist() == [length - 1]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"generation_config": GenerationConfig(num_beams=3)},
        {"prompt_lookup_num_tokens": 2, "num_beams": 1},
    ],
)
def test_rows_that_move_are_refused(options: dict[str, Any]) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    # A repeating prompt, so that candidates are found in it.
    inputs["input_ids"][0, -5:] = torch.tensor([7, 8, 7, 8, 7])
    with pytest.raises(HookError, match=r"reorders its rows|continues another"):
        model.generate_with_cache(inputs, "*resid_post", **{**GREEDY, **options})
    assert not model.is_hooked


def test_rows_are_compared_with_the_answer() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    hf_model: Any = model.hf_model
    plain = hf_model.generate

    def swapped(**kwargs: Any) -> Tensor:
        return plain(**kwargs).flip(0)

    hf_model.generate = swapped
    try:
        with pytest.raises(HookError, match="reorders its rows"):
            model.generate_with_cache(inputs, "*resid_post", **GREEDY)
    finally:
        del hf_model.generate


def test_memory_is_checked_for_the_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**28)
    options = {**GREEDY, "max_new_tokens": 20_000}
    with pytest.raises(CacheMemoryError, match="blocks"):
        model.generate_with_cache(inputs, "*pattern", **options)
    with pytest.raises(CacheMemoryError):
        model.generate_with_cache(inputs, "*pattern", num_return_sequences=9000, **GREEDY)


def test_what_a_cache_of_a_generation_says(tmp_path: Any) -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    names = ["vision_encoder.blocks.0.hook_resid_post", "blocks.0.hook_resid_post"]
    _, cache = model.generate_with_cache(
        inputs, names, return_dict_in_generate=True, max_new_tokens=2, device="cpu"
    )
    with pytest.raises(DataError, match="no positions"):
        cache.positions(("resid_post", 0, "vision"))
    with pytest.raises(DataError, match="positions and steps would be lost"):
        cache.save(tmp_path / "a.safetensors")
    ActivationCache(dict(cache)).save(tmp_path / "a.safetensors")
    with pytest.warns(HookedVLMWarning, match="never ran"):
        model.generate_with_cache(model.prepare(None, "What?"), names, max_new_tokens=2)


def test_a_wrapped_models_own_configuration_is_read() -> None:
    hf_model, inputs = build("llava"), make_inputs("llava")
    hf_model.generation_config.num_beams = 2
    model = HookedVLM(hf_model)
    with pytest.raises(HookError, match="reorders its rows"):
        model.generate_with_cache(inputs, "*resid_post", **GREEDY)


def test_what_a_cache_of_a_generation_has_not_says_what_to_do() -> None:
    model, inputs = tiny("llava", "eager"), make_inputs("llava")
    _, cache = model.generate_with_cache(inputs, **GREEDY)
    parts = torch.zeros(1, *cache["resid_post", 0].shape)
    for asked in (
        lambda made: made.logit_lens(),
        lambda made: made.logit_attrs(parts, 7),
        lambda made: made.stack_head_results(),
        lambda made: made.at(LastToken()),
    ):
        for made in (cache, cache.select([0])):
            with pytest.raises(DataError, match=r"it is the cache of a generation\. Run .*append"):
                asked(made)
