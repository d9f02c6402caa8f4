"""Caches are found by type and by annotation, whatever transformers calls the keyword."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from helpers.tiny_models import END, FAMILIES, IMAGE, START, make_inputs, tiny
from hooked_vlm.anatomy.caches import (
    cache_parameter,
    caches_among,
    is_cache,
    mask_parameter,
    prompts_among,
)
from hooked_vlm.errors import HookError


GREEDY: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [START, END, IMAGE],
}


class Renamed(nn.Module):
    def forward(self, stream: Tensor, remembered: Cache | None = None, seen_mask=None) -> Tensor:
        return stream


class Quoted(nn.Module):
    def forward(self, stream, memory: "DynamicCache | None" = None):
        return stream


class Unresolvable(nn.Module):
    def forward(self, stream, memory: "SomeCache | None" = None, other: "Nowhere" = None):  # noqa: F821 # pyright: ignore[reportUndefinedVariable]
        return stream


class Bare(nn.Module):
    def forward(self, stream, past_key_value=None, attention_mask=None):
        return stream


class Without(nn.Module):
    def forward(
        self, stream: Tensor, use_cache: bool = False, cache_position: Tensor | None = None
    ):
        return stream


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Renamed, "remembered"),
        (Quoted, "memory"),
        (Unresolvable, "memory"),
        (Bare, "past_key_value"),
        (Without, None),
    ],
)
def test_the_annotation_says_which_keyword_takes_the_cache(module, expected):
    assert cache_parameter(module()) == expected


def test_masks_are_found_by_what_their_name_holds():
    assert mask_parameter(Renamed()) == "seen_mask"
    assert mask_parameter(Bare()) == "attention_mask"
    assert mask_parameter(Without()) is None


def test_a_cache_is_what_is_of_that_type_or_answers_like_it():
    cache, both = DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert is_cache(cache)
    assert is_cache(both)
    assert not any(is_cache(x) for x in (None, True, torch.zeros(2), {"cache": cache}, (cache,)))
    assert caches_among((torch.zeros(1),), {"any name": cache, "use_cache": True}) == [cache]


def test_prompts_are_found_by_name_and_else_by_place():
    ids, embeds = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 8)
    assert prompts_among((), {"attention_mask": ids[:, :1], "input_ids": ids}) is ids
    assert prompts_among((), {"input_ids": None, "inputs_embeds": embeds}) is embeds
    assert prompts_among((ids,), {"pixel_values": embeds}) is ids
    assert prompts_among((), {"pixel_values": embeds}) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_a_language_model_takes_one(family):
    model = tiny(family)
    for block in model.anatomy.lm.blocks:
        module = model.hf_model.get_submodule(block.path)
        assert cache_parameter(module) is not None
        assert mask_parameter(module) == "attention_mask"


class Opaque:
    """A cache of no kind that anyone knows, around one that the model can use."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache


def hidden(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a model pass its cache on as an `Opaque`, under a keyword that nobody knows."""
    own = model.hf_model.forward
    # transformers 5.24 calls the keyword, and the field of the output, by another name.
    given = cache_parameter(model.hf_model)
    assert given is not None

    def forward(*args: Any, memory: Opaque | None = None, **kwargs: Any) -> Any:
        kwargs[given] = DynamicCache() if memory is None else memory.cache
        output = own(*args, **kwargs)
        field = next(name for name, value in output.items() if is_cache(value))
        output[field] = Opaque(output[field])
        return output

    monkeypatch.setattr(model.hf_model, "forward", forward)


def test_a_cache_of_an_unknown_kind_is_refused_where_it_comes_back(monkeypatch):
    model, inputs = tiny("llava"), make_inputs("llava", 1)
    hidden(model, monkeypatch)
    with torch.no_grad(), model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: None)]):
        output: Any = model.hf_model(**inputs)
        memory = next(value for value in output.values() if isinstance(value, Opaque))
        following = torch.ones(1, 1, dtype=torch.long)
        with pytest.raises(HookError, match="given the Opaque that the pass before returned"):
            model.hf_model(input_ids=following, memory=memory)
    assert not model.is_hooked


def test_a_generation_that_begins_twice_is_refused(monkeypatch):
    """What generates here passes neither a cache that is found nor the prompt."""
    model, inputs = tiny("llava"), make_inputs("llava", 1)

    def generate(**kwargs: Any) -> Tensor:
        model.hf_model(**inputs)
        return model.hf_model(input_ids=torch.ones(1, 1, dtype=torch.long)).logits.argmax(-1)

    monkeypatch.setattr(model.hf_model, "generate", generate)
    hook = ("blocks.0.hook_resid_pre", lambda x, hook: None)
    with torch.no_grad(), pytest.raises(HookError, match="One generation began twice"):
        model.generate(inputs, fwd_hooks=[hook])
    assert not model.is_hooked


@pytest.mark.parametrize("family", FAMILIES)
def test_whether_there_is_a_cache_is_seen_in_what_runs(family):
    """`use_cache` may be set in the generation config as well as in the call."""
    model, inputs = tiny(family), make_inputs(family, 1, seed=1)
    steps: list[tuple[int, int]] = []
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: steps.append((hook.step, x.shape[1])))
    config: Any = model.hf_model.generation_config
    before, config.use_cache = config.use_cache, False
    try:
        with torch.no_grad():
            model.generate(inputs, fwd_hooks=[hook], prefill_only=True, **GREEDY)
    finally:
        config.use_cache = before
    assert steps == [(i, inputs["input_ids"].shape[1]) for i in range(4)]


def test_passes_of_their_own_are_prefills_and_longer_ones_continue():
    model, inputs = tiny("llava"), make_inputs("llava", 1)
    steps: list[int] = []
    longer = dict(inputs) | {
        name: torch.cat([inputs[name], torch.ones_like(inputs[name][:, :1])], dim=1)
        for name in ("input_ids", "attention_mask")
    }
    other = {**longer, "input_ids": longer["input_ids"].clone()}
    other["input_ids"][:, 0] = 7
    hook = ("blocks.0.hook_resid_pre", lambda x, hook: steps.append(hook.step))
    with torch.no_grad(), model.hooks([hook]):
        for given in (inputs, inputs, longer, other, longer):
            model(given)
    assert steps == [0, 0, 1, 0, 0]
