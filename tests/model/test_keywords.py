"""A keyword that nobody would read is an error that names the nearest, before anything runs."""

from typing import Any

import pytest
import torch
from PIL import Image

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import Ablate, HookedVisionEncoder, HookedVLM, Sweep
from hooked_vlm.errors import DataError, HookError


HOOK = ("blocks.0.hook_resid_pre", lambda x, hook: x * 0)


@pytest.fixture(scope="module")
def shipped() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-gemma-3")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, i: m.run_with_hooks(i, fwd_hook=[HOOK]), "Did you mean 'fwd_hooks'"),
        (lambda m, i: m.run_with_hooks(i, hooks=[HOOK]), "hooks="),
        (lambda m, i: m.generate(i, bwd_hooks=[HOOK]), "Use run_with_hooks"),
        (lambda m, i: m(i, incl_bwd=True), "Use run_with_cache"),
        (lambda m, i: m(i, fwd_hooks=[HOOK]), "Use run_with_hooks"),
        (lambda m, i: m(i, return_type="los"), "expected logits, loss, both or None"),
        (lambda m, i: m(i, stop_at_layer=2), "Use run_with_cache"),
        (lambda m, i: m.generate(i, fwd_hook=[HOOK]), "Did you mean 'fwd_hooks'"),
        (lambda m, i: m.generate(i, max_new_token=3), "Did you mean 'max_new_tokens'"),
        (lambda m, i: m.generate(i, prefil_only=True), "Did you mean 'prefill_only'"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a1_a3_keywords_that_nobody_reads(family: str, call: Any, said: str) -> None:
    model = tiny(family)
    ran = []
    handle = model.hf_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(HookError, match=said) as caught:
            call(model, make_inputs(family))
    finally:
        handle.remove()
    assert not ran and len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"name_filter": "hook_embed"}, "Did you mean 'names_filter'"),
        ({"bwd_hooks": [HOOK]}, "Use run_with_hooks"),
        ({"return_cache_object": False}, "dict"),
    ],
)
def test_a2_caching(option: Any, said: str) -> None:
    with pytest.raises(HookError, match=said):
        tiny("llava").run_with_cache(make_inputs("llava"), **option)


def test_a3_other_ways_in(shipped: HookedVLM) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    residual = torch.zeros(1, inputs["input_ids"].shape[1], 48)
    with pytest.raises(HookError, match="'fwd_hooks'"):
        model.run_from_layer(inputs, residual, 1, fwd_hook=[HOOK])
    made: list[int] = []
    sweep = Sweep(inputs, {"slot": [0, 1]}, lambda slot: made.append(slot) or Ablate(slot))
    for run in (sweep.run, sweep.attribution):
        with pytest.raises(HookError, match="batchsize="):
            run(model, lambda x: x[:, -1, 0], batchsize=3)
    assert not made  # nothing was recorded or checked first
    image = Image.new("RGB", (192, 192))
    with pytest.raises(DataError, match=r"sytem=.*Did you mean 'system'"):
        shipped.prepare(image, "What?", sytem="x")
    with pytest.raises(DataError, match=r"text=.*Did you mean 'texts'"):
        shipped.prepare(image, text="What?")
    with pytest.raises(DataError, match="do_risize="):
        shipped.prepare(image, "What?", do_risize=False)
    encoder = HookedVisionEncoder.from_pretrained("tiny-gemma-3")
    with pytest.raises(DataError, match="do_risize="):
        encoder.prepare(image, do_risize=False)


def test_what_the_model_or_its_processor_reads_goes_through(shipped: HookedVLM) -> None:
    inputs = shipped.prepare(Image.new("RGB", (192, 192)), "What?", do_rescale=True, padding=True)
    read: Any = {"output_attentions": False, "use_cache": False, "return_dict": True}
    logits = shipped(inputs, logits_to_keep=1, **read)
    assert logits.shape[1] == 1
    options: Any = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "logits_to_keep": 1}
    options |= {"stop_strings": "x", "tokenizer": shipped.tokenizer}
    assert shipped.generate(inputs, **options).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a5_image_tokens_without_an_image(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    blind = {"input_ids": inputs["input_ids"]}
    for run in (model, lambda i: model.generate(i, max_new_tokens=1)):
        with pytest.raises(HookError, match="the model would run blind"):
            run(blind)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "call",
    [
        lambda m, i: m(i),
        lambda m, i: m.run_with_hooks(i, [HOOK]),
        lambda m, i: m.run_with_cache(i, "hook_embed"),
        lambda m, i: m.generate(i, max_new_tokens=1),
        lambda m, i: m.run_from_layer(i, torch.zeros(1, 1, 48), 1),
        lambda m, i: m.grids(i),
        lambda m, i: m.hooks([Ablate(0)], inputs=i).__enter__(),
        lambda m, i: Sweep(i, {"slot": [0]}, lambda slot: Ablate(slot)).run(
            m, lambda x: x[:, -1, 0]
        ),
        lambda m, i: Sweep(i, {"slot": [0]}, lambda slot: Ablate(slot)).attribution(
            m, lambda x: x[:, -1, 0]
        ),
        lambda m, i: Sweep(i, {"slot": [0]}, lambda slot: Ablate(slot)).plan(m).explain(),
    ],
)
@pytest.mark.parametrize("wrong", ["pixel_vaules", "atention_mask", 7])
def test_a1_entries_of_a_plain_mapping_that_nobody_reads(
    family: str, call: Any, wrong: str | int
) -> None:
    model, inputs = tiny(family), dict(make_inputs(family))
    right = {"pixel_vaules": "pixel_values", "atention_mask": "attention_mask", 7: ""}[wrong]
    inputs = {wrong if name == right else name: value for name, value in inputs.items()}
    inputs.setdefault(wrong, torch.zeros(1))
    said = f"Did you mean '{right}'" if right else "7.*Leave it out|a mapping from texts"
    ran: list[int] = []
    handle = model.hf_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(HookError, match=said) as caught:
            call(model, inputs)
    finally:
        handle.remove()
    assert not ran and len(str(caught.value)) <= 400


def test_a1_an_encoders_plain_mapping_too() -> None:
    model = HookedVisionEncoder(tiny("llava").hf_model)
    pixels = make_inputs("llava")["pixel_values"]
    with pytest.raises(HookError, match=r"'pixel_valeus'.*Did you mean 'pixel_values'"):
        model({"pixel_values": pixels, "pixel_valeus": pixels})


def test_a1_what_a_processor_returns_and_the_model_does_not_read_goes_through(
    shipped: HookedVLM,
) -> None:
    image = Image.new("RGB", (192, 192))
    inputs = dict(shipped.prepare(image, "What?"))
    assert "n_of_things" not in inputs
    model = HookedVLM(shipped.hf_model, Returning(shipped.processor, "n_of_things"))
    more = {**inputs, "n_of_things": torch.zeros(1)}
    assert torch.equal(model(more), shipped(inputs))
    with pytest.raises(HookError, match="'n_of_things'"):
        shipped(more)


class Returning:
    """A processor that also returns something that the model does not read."""

    def __init__(self, processor: Any, name: str) -> None:
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.model_input_names = [*processor.model_input_names, name]


@pytest.mark.parametrize("method", ["forward", "run_with_hooks", "run_with_cache", "generate"])
def test_a1_a_keyword_that_the_inputs_hold_too(method: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with pytest.raises(HookError, match="attention_mask=… was given, and the inputs hold"):
        getattr(model, method)(inputs, attention_mask=inputs["attention_mask"])
