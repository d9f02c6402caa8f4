"""Processors that want torchvision for videos, made to do without."""

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, Gemma3Processor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from conformance.processors import tiny_processor
from helpers.prepared_models import prepared
from hooked_vlm.errors import MissingExtraError, UnsupportedModelError
from hooked_vlm.inputs.without_torchvision import images_only, load_processor


ORDERS = {
    # where the parts stand in a class's signature
    "qwen2_vl": "image_processor tokenizer video_processor",
    "llava_next_video": "video_processor image_processor tokenizer",
    "gemma4": "feature_extractor image_processor tokenizer video_processor",
    "molmo2": "image_processor video_processor tokenizer",
    "minicpmv4_6": "image_processor video_processor tokenizer",  # reads its video part at once
    "ernie4_5_vl_moe": "image_processor tokenizer video_processor",  # reads it to be saved
}
NEEDS_TORCHVISION = {"molmo2"}  # for images as well, so nothing but the stand-in makes it


def test_a_processor_without_videos_is_left_alone():
    assert images_only(Gemma3Processor) is Gemma3Processor


def test_the_same_class_without_its_video_part():
    made = images_only(Qwen2VLProcessor)
    assert issubclass(made, Qwen2VLProcessor)
    assert made.__name__ == "Qwen2VLProcessor"
    assert made.__module__ == Qwen2VLProcessor.__module__
    processor = prepared("qwen2-vl").processor
    assert processor.video_processor is None
    made_inputs = processor(text="left", images=None, return_tensors="pt")
    assert made_inputs["input_ids"].ndim == 2


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision nothing is in the way")
@pytest.mark.parametrize("family", ["qwen2-vl", "gemma-3"])
def test_loading_gives_the_processor_that_was_saved(family, tmp_path):
    saved = prepared(family).processor
    saved.save_pretrained(tmp_path)
    hf_model: Any = prepared(family).hf_model
    hf_model.config.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert type(loaded).__name__ == type(saved).__name__
    assert loaded.chat_template == saved.chat_template
    image = (torch.arange(3 * 64 * 64) % 256).view(3, 64, 64).to(torch.uint8).numpy()
    text = "yes"
    one, two = (p.image_processor(image, return_tensors="pt") for p in (saved, loaded))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert loaded.tokenizer(text)["input_ids"] == saved.tokenizer(text)["input_ids"]


def small(model_type: str) -> tuple[Any, Any]:
    config = CONFIG_MAPPING[model_type]()  # of the usual sizes; there is no model
    processor = tiny_processor(model_type, config)
    return config, processor


@pytest.mark.parametrize(("model_type", "order"), ORDERS.items())
def test_parts_are_kept_wherever_they_stand(model_type, order):
    _, processor = small(model_type)
    made: Any = type(processor)
    base = made.__mro__[1]
    assert base.get_attributes() == order.split()
    kept = [part for part in order.split() if part in ("image_processor", "tokenizer")]
    assert made.get_attributes() == kept
    parts = {part: getattr(processor, part) for part in order.split()}
    assert [name for name, part in parts.items() if part is not None] == kept
    for again in (
        made(**{name: parts[name] for name in kept}, chat_template="hello"),
        made(*parts.values(), chat_template="hello"),
        made(*(parts[name] for name in kept), chat_template="hello"),
    ):
        assert type(again) is made
        assert again.chat_template == "hello"
        assert all(getattr(again, name) is part for name, part in parts.items())
    assert images_only(base) is made


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Ernie's own
@pytest.mark.parametrize("model_type", ORDERS)
def test_saving_and_loading_gives_the_same_processor(model_type, tmp_path, monkeypatch):
    config, saved = small(model_type)
    saved.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "processor_config.json").read_text())
    assert "image_processor" in options
    assert not {"video_processor", "feature_extractor"} & options.keys()
    if model_type in NEEDS_TORCHVISION:
        return
    # as a checkpoint has it that was saved whole
    options["video_processor"] = {"video_processor_type": "NoSuchVideoProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(options))
    monkeypatch.setattr(
        "hooked_vlm.inputs.without_torchvision.is_torchvision_available", lambda: False
    )
    loaded = load_processor(str(tmp_path))
    assert type(loaded) is type(saved)
    assert loaded.to_dict() == saved.to_dict()
    assert loaded.chat_template == saved.chat_template
    image = Image.new("RGB", (112, 84), (10, 200, 30))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    made = []
    for processor in (saved, loaded):
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        made.append(processor(text=[prompt], images=[[image]], return_tensors="pt"))
    assert made[0].keys() == made[1].keys()
    is_same = type(loaded.image_processor) is type(saved.image_processor)
    for name, value in made[0].items():
        again = torch.as_tensor(made[1][name])
        if is_same or not again.is_floating_point():
            assert torch.equal(torch.as_tensor(value), again), name
        else:  # where torchvision is installed it resizes what is loaded
            assert again.shape == torch.as_tensor(value).shape


def test_what_a_missing_part_would_read_is_refused(monkeypatch):
    monkeypatch.setattr(
        "hooked_vlm.inputs.without_torchvision.is_torchvision_available", lambda: False
    )
    _, processor = small("gemma4")
    video = torch.zeros(2, 3, 32, 32)
    with pytest.raises(MissingExtraError, match=r"without a video_processor.*torchvision"):
        processor(text="What is this?", videos=[video])
    with pytest.raises(MissingExtraError, match=r"without a feature_extractor.*torchvision"):
        processor(None, "What is this?", None, [video])
    with pytest.raises(UnsupportedModelError, match="video_processor was given"):
        type(processor)(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            video_processor=processor.image_processor,
        )
    with pytest.raises(TypeError, match="image_processor"):
        type(processor)(image_processor=processor.tokenizer, tokenizer=processor.tokenizer)
    with pytest.raises(TypeError, match="several values for tokenizer"):
        images = processor.image_processor
        type(processor)(images, processor.tokenizer, tokenizer=processor.tokenizer)


def test_a_chat_that_reads_defaults_off_a_missing_part():
    _, processor = small("smolvlm")
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    assert prompt.count(processor.image_token) == 1
    assert processor.video_processor is None
