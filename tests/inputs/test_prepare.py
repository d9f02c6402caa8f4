"""Preparing inputs: images of every kind, batches, padding, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, build, make_inputs
from hooked_vlm.errors import DataError, GridError, HookedVLMWarning, UnsupportedModelError
from hooked_vlm.inputs.prepare import to_pil
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.processor import model_inputs
from hooked_vlm.model.vlm import HookedVLM


QUESTIONS = ["What color is the square above the red square?", "left or right", "yes"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def picture(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_point_at_the_image_tokens_of_their_image(family):
    model = prepared(family)
    images = [picture(0), [picture(1), picture(2)]]
    inputs = model.prepare(images, QUESTIONS[:2])
    ids = inputs["input_ids"]
    assert [len(row) for row in inputs.grids] == [1, 2]
    cells = 8 if family == "llava" else 4
    for row, grids in enumerate(inputs.grids):
        positions = torch.cat([grid.positions.flatten() for grid in grids])
        found = (ids[row] == model.cfg.image_token_id).nonzero().flatten()
        assert torch.equal(positions, found)
        for grid in grids:
            assert grid.shape == (cells, cells)
            assert (grid.patch_rows, grid.patch_cols, grid.image_size) == (8, 8, (64, 64))
            assert grid.n_prefix == (1 if family == "llava" else 0)
            assert (grid.prompt, grid.is_resized) == (row, False)
    assert [grid.image for row in inputs.grids for grid in row] == [0, 1, 2]
    assert torch.equal(model.grids(inputs)[1][1].positions, inputs.grids[1][1].positions)
    # The second prompt's images are the encoder's second and third.
    alone = model.prepare(picture(2), "yes")
    name = "vision_projector.hook_out"
    _, cache = model.run_with_cache(inputs, name)
    _, single = model.run_with_cache(alone, name)
    torch.testing.assert_close(cache[name][2], single[name][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_result(family):
    model = prepared(family)
    images = [[picture(0)], [picture(1), picture(2)], [picture(3)]]
    batch = model.prepare(images, QUESTIONS)
    assert (batch["attention_mask"] == 0).any(1).sum() == 2
    logits = model(batch)
    for row, (row_images, text) in enumerate(zip(images, QUESTIONS, strict=True)):
        alone = model.prepare(row_images, text)
        n = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -n:], alone["input_ids"][0])
        torch.testing.assert_close(logits[row, -n:], model(alone)[0], atol=1e-5, rtol=1e-5)
        shift = batch["input_ids"].shape[1] - n
        for grid, own in zip(batch.grids[row], alone.grids[0], strict=True):
            assert torch.equal(grid.positions, own.positions + shift)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_generated_token(family):
    model = prepared(family)
    images = [[picture(0)], [picture(1), picture(2)]]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    options["suppress_tokens"] = list(range(8))  # special tokens
    batch = model.prepare(images, QUESTIONS[:2])
    edit = [("blocks.1.hook_resid_post", lambda x, hook: x * 1.1)]
    for hooks in ([], edit):
        ids = model.generate(batch, fwd_hooks=hooks, **options)
        uncached = model.generate(batch, fwd_hooks=hooks, use_cache=False, **options)
        assert torch.equal(ids, uncached)
        for row, text in enumerate(QUESTIONS[:2]):
            alone = model.generate(model.prepare(images[row], text), fwd_hooks=hooks, **options)
            assert torch.equal(ids[row, -4:], alone[0, -4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_every_kind_are_the_same_image(family):
    model, image = prepared(family), picture()
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = model.prepare(image, "yes")["pixel_values"]
    kinds = [array, array / 255, array.astype(np.int64), tensor, tensor / 255, [image], (tensor,)]
    for kind in kinds:
        assert torch.equal(model.prepare(kind, "yes")["pixel_values"], expected)


def test_pixels_that_a_processor_computes_in_half_precision_run(monkeypatch):
    model, image = prepared("qwen2-vl"), Image.new("RGB", (64, 64), "red")
    expected = model.prepare(image, "What?")

    def halved(*args: Any) -> Any:  # as Llama 4's processor
        made = model_inputs(*args)
        return made | {"pixel_values": made["pixel_values"].to(torch.bfloat16)}

    monkeypatch.setattr("hooked_vlm.inputs.prepare.model_inputs", halved)
    inputs = model.prepare(image, "What?")
    assert inputs["pixel_values"].dtype == model.cfg.dtype == torch.float32
    assert inputs["input_ids"].dtype == torch.int64
    torch.testing.assert_close(model(inputs), model(expected), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_an_image_and_with_one(family):
    model = prepared(family)
    inputs = model.prepare(None, "yes")
    assert inputs.grids == ((),)
    assert "pixel_values" not in inputs
    assert not (inputs["input_ids"] == model.cfg.image_token_id).any()
    alone = model(inputs)[0, -1]
    mixed = model.prepare([picture(), None], QUESTIONS[1:])
    assert [len(row) for row in mixed.grids] == [1, 0]
    torch.testing.assert_close(model(mixed)[1, -1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_system_prompt_and_plain_text(family):
    model, tokenizer = prepared(family), prepared(family).tokenizer
    chat = model.prepare(picture(), "yes")
    system = model.prepare(picture(), "yes", system="Answer left or right")
    plain = model.prepare(picture(), "yes", chat=False)
    assert "Answer left or right" in system.texts[0]
    assert system.texts[0].index("Answer") < system.texts[0].index("yes")
    lengths = [inputs["input_ids"].shape[1] for inputs in (plain, chat, system)]
    assert lengths == sorted(set(lengths))
    assert plain.texts[0].endswith("yes")
    assert len(plain.grid) == len(chat.grid)
    if tokenizer.bos_token:
        assert (chat["input_ids"] == tokenizer.bos_token_id).sum() == 1
    placeholder = plain.texts[0].removesuffix("yes")
    after = model.prepare(picture(), f"yes{placeholder}", chat=False)
    assert int(after.grid.positions[0, 0]) > int(plain.grid.positions[0, 0])
    with pytest.raises(DataError, match=r"Prompt 0 has 2 image placeholders .* for 1 image"):
        model.prepare(picture(), placeholder * 2 + "yes", chat=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resized_image_is_said_with_both_sizes(family):
    model = prepared(family)
    with pytest.warns(HookedVLMWarning, match="changed an image of 100x80 px to") as w:
        inputs = model.prepare(picture(0, 100, 80), "yes")
    assert inputs.grid.image_size == (100, 80)
    assert inputs.grid.is_resized
    processed = "x".join(map(str, inputs.grid.processed_size))
    assert f"to {processed} px" in str(w[0].message)


def test_sizes_of_any_kind_in_one_batch_of_qwen():
    model = prepared("qwen2-vl")
    inputs = model.prepare([picture(0, 96, 48), picture(1, 64, 64)], ["yes", "no"])
    assert [row[0].shape for row in inputs.grids] == [(3, 6), (4, 4)]
    _, cache = model.run_with_cache(inputs, "vision_projector.hook_out")
    assert [len(value) for value in cache["vision_projector.hook_out"]] == [18, 16]


def test_counts_that_do_not_agree():
    model = prepared("gemma-3")
    for images, texts, text in (
        ([picture()], ["a", "b"], "1 entry in images for 2 prompts"),
        (picture(), ["a", "b"], "1 entry in images for 2 prompts"),
        ([picture(), picture(), picture()], ["a", "b"], "3 entries in images for 2 prompts"),
        ([[picture()], [picture()]], "a", "2 entries in images for 1 prompt"),
        ([], ["a"], None),
        (None, [], "texts is empty"),
    ):
        if text is None:
            assert model.prepare(images, texts).grids == ((),)
            continue
        with pytest.raises(DataError, match=text):
            model.prepare(images, texts)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.full((8, 8, 3), 300), "int64 has values from 300 to 300; expected 0..1 for floats and"),
        (np.full((8, 8, 3), -1), "values from -1"),
        (np.full((8, 8, 3), 1.5), "float64 has values from 1.5 to 1.5"),
        (np.full((8, 8, 3), np.nan), "values from nan"),
        (np.ones((8, 8, 3), dtype=bool), "An image of bool was given"),
        (np.zeros((8, 8, 4), dtype=np.uint8), r"ndarray and shape \(8, 8, 4\) was given"),
        (np.zeros((0, 8, 3), dtype=np.uint8), r"shape \(0, 8, 3\)"),
        (torch.zeros(2, 3, 8, 8), r"Tensor and shape \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8) - 0.5, "float32 has values from -0.5"),
        ("picture.png", "An image of type str was given; expected a PIL image"),
    ],
)
def test_images_that_are_none(image, text):
    with pytest.raises(DataError, match=text):
        to_pil(image)


def test_images_of_every_shape():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for image in (grey, grey[..., None], torch.from_numpy(grey)[None], torch.from_numpy(grey)):
        made = to_pil(image)
        assert (made.size, made.mode) == ((4, 3), "RGB")
        assert np.array_equal(np.array(made)[..., 0], grey)
    assert to_pil(np.zeros((1, 5, 3))).size == (5, 1)
    assert to_pil(torch.full((3, 2, 2), 0.5).bfloat16()).getpixel((0, 0)) == (128, 128, 128)
    assert to_pil(Image.new("RGBA", (2, 2))).mode == "RGB"


def test_a_processor_that_takes_no_images():
    model = HookedVLM(build("llava"), prepared("llava").tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"has no image processor.*AutoProcessor"):
        model.prepare(picture(), "yes")
    assert model.prepare(None, "yes", chat=False)["input_ids"].shape[0] == 1


def test_processor_arguments_are_passed_on():
    model = prepared("qwen2-vl")
    assert "attention_mask" not in model.prepare(None, "yes", return_attention_mask=False)


def test_inputs_are_a_mapping():
    model = prepared("llava")
    inputs = model.prepare([picture(0), picture(1)], QUESTIONS[1:])
    assert torch.equal(model.hf_model(**inputs).logits, model(inputs))
    moved = inputs.to("meta")
    assert moved["pixel_values"].device.type == "meta"
    assert (moved.texts, moved.grids) == (inputs.texts, inputs.grids)
    assert "2 images" in repr(inputs)
    with pytest.raises(GridError, match=r"2 images in 2 prompts; .*needs exactly one"):
        _ = inputs.grid
    with pytest.raises(GridError, match=r"0 images"):
        _ = Inputs({}, [()]).grid


def test_tensors_whose_image_tokens_do_not_fit_are_refused():
    model = HookedVLM(build("gemma-3"))
    inputs = make_inputs("gemma-3")
    inputs["input_ids"][0, 4] = 5
    with pytest.raises(GridError, match="8 image tokens for 1 image of 36 patches"):
        model.grids(inputs)
