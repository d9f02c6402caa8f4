"""What processors of every kind make of images and prompts, and what is added to it."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conformance.processors import tiny_processor
from conformance.tiny import tiny_config, tiny_model
from hooked_vlm.errors import DataError, HookedVLMWarning, NoGridError
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.processor import model_inputs, placeholder
from hooked_vlm.inputs.rows import rows_of
from hooked_vlm.model.vlm import HookedVLM


ONE_EACH = ["blip", "blip-2", "git", "got_ocr2", "instructblip", "kosmos-2", "kosmos-2.5"]
NO_TOKENS = ["pix2struct", "vision-encoder-decoder", "pp_formulanet"]
"""Those whose encoder takes no tokens of the prompt."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::hooked_vlm.errors.HookedVLMWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # their own
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def built(model_type: str) -> HookedVLM:
    config = tiny_config(model_type)
    processor = tiny_processor(model_type, config)
    return HookedVLM(tiny_model(model_type, config), processor)


def picture(model: HookedVLM, seed: int) -> Image.Image:
    side = model.require_vision().image_size or 64
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("model_type", ONE_EACH + NO_TOKENS)
def test_each_prompt_gets_its_own_image(model_type):
    model = built(model_type)
    one, two = picture(model, 1), picture(model, 2)
    texts = ["Here", "This"]
    both, swapped = model(model.prepare([one, two], texts)), model(model.prepare([two, one], texts))
    for i, (image, other) in enumerate(((one, two), (two, one))):
        alone, wrong = (model(model.prepare([x], texts[i]))[0, -1] for x in (image, other))
        torch.testing.assert_close(both[i, -1], alone, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(swapped[i, -1], wrong, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(alone, wrong, atol=1e-3)


@pytest.mark.parametrize("model_type", [m for m in ONE_EACH if m != "got_ocr2"] + NO_TOKENS)
def test_images_that_would_lose_their_prompt_are_refused(model_type):
    model = built(model_type)
    one, two = picture(model, 1), picture(model, 2)
    for images in ([one, None], [None, one], [[one, two], None]):
        with pytest.raises(DataError, match="belongs to which prompt"):
            model.prepare(images, ["Here", "And here"])
    with pytest.raises(DataError, match="2 images were given for 1 prompt,"):
        model.prepare([[one, two]], ["Here"])


def test_a_processor_that_wants_no_nesting_is_given_none():
    model = built("got_ocr2")
    one, two = picture(model, 1), picture(model, 2)
    inputs = model.prepare([one, two], ["Here", "This"])
    assert len(inputs["pixel_values"]) == len(inputs["input_ids"]) == 2
    for images in ([one, None], [[one, two], None]):  # a flat list would not say whose they are
        with pytest.raises(ValueError, match="Nested images are only supported"):
            model.prepare(images, ["Here", "This"])


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("llava", "<image>"),
        ("gemma3", "<|boi_token|>"),
        ("gemma4", "<|image_token|>"),  # the other one is for its chats
        ("paligemma", "<image>"),  # adds it itself where it is missing
        ("blip-2", ""),  # adds it itself in any case
        ("kosmos-2.5", ""),
        ("git", ""),
        ("vision-encoder-decoder", ""),
    ],
)
def test_the_placeholder_of_a_processor_is_found_by_trying(model_type, text):
    model = built(model_type)
    assert placeholder(model) == text
    inputs = model.prepare(picture(model, 1), "Here", chat=False)
    assert inputs.texts == (f"{text}Here",)
    assert model(inputs).isfinite().all()


@pytest.mark.parametrize("model_type", NO_TOKENS)
def test_a_prompt_that_no_encoder_takes_begins_the_answer(model_type):
    model = built(model_type)
    config: Any = model.hf_model.config
    with pytest.warns(HookedVLMWarning, match="no input_ids"):
        inputs = model.prepare(picture(model, 1), "Here", chat=False)
    assert inputs.grids == ((),)
    assert "no input_ids" in inputs.no_grid
    with pytest.raises(NoGridError, match="no input_ids"):
        _ = inputs.grid
    with pytest.raises(NoGridError, match="no input_ids"):
        model.grids(dict(inputs))
    assert not {"input_ids", "labels"} & inputs.keys()
    ids = inputs["decoder_input_ids"][0].tolist()
    own = model.tokenizer("Here", add_special_tokens=False)["input_ids"]
    assert ids == [config.decoder_start_token_id, *own]
    (row,) = rows_of(inputs, inputs.grids, text=True)
    assert row.input_ids is not None
    assert row.input_ids.tolist() == ids
    new = model.generate(inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert new[0, : len(ids)].tolist() == ids


def test_shorter_beginnings_of_answers_are_padded_on_the_left():
    model = built("pp_formulanet")
    images = [picture(model, 1), picture(model, 2)]
    inputs = model.prepare(images, ["Hi", "Hello"], chat=False)
    ids, mask = inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    config: Any = model.hf_model.config
    assert ids[0, 3] == ids[1, 0] == config.decoder_start_token_id
    assert "decoder_attention_mask" not in model.prepare(images, ["Hi", "Yo"], chat=False)


def test_kinds_of_tokens_are_asked_for_where_the_model_takes_them():
    model = built("cosmos3_edge")
    image = picture(model, 1)
    inputs = model.prepare(image, "Here")
    kinds = inputs["mm_token_type_ids"]
    assert torch.equal(kinds == 1, inputs["input_ids"] == model.cfg.image_token_id)
    assert model(inputs).isfinite().all()
    # the user's word goes before ours
    made = model_inputs(model, inputs.texts, [[image]], {"return_mm_token_type_ids": False})
    assert "mm_token_type_ids" not in made
    assert "mm_token_type_ids" not in built("llava").prepare(picture(built("llava"), 1), "Here")


def test_what_nothing_in_the_model_reads_is_left_out():
    model = built("llava")
    image, processor = picture(model, 1), model.processor
    call = type(processor).__call__

    class Talkative(type(processor)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = call(self, *args, **kwargs)
            return made | {"weather": torch.zeros(1), "inputs_embeds": None}

    processor.__class__ = Talkative
    try:
        inputs = model.prepare(image, "Here")
    finally:
        processor.__class__ = Talkative.__mro__[1]
    assert isinstance(inputs, Inputs)
    assert "weather" not in inputs
    assert {"input_ids", "pixel_values", "inputs_embeds"} <= inputs.keys()
    model.generate(inputs, max_new_tokens=1)  # which raises for what it does not know
