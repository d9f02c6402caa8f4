"""Processors that want torchvision for videos, made to do without."""

from typing import Any

import pytest
import torch
from prepared_models import prepared
from transformers import Gemma3Processor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from hooked_vlm.processors import images_only, load_processor


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
