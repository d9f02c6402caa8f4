"""Small random models with real processors, so that `prepare` goes through all it would."""

from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hooked_vlm.model.vlm import HookedVLM
from training.build import Recipe, build_model, build_processor, build_tokenizer


CANVAS, PATCH = 64, 8
SHIPPED = {"qwen2-vl": "tiny-qwen2-vl", "gemma-3": "tiny-gemma-3"}
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def _llava() -> tuple[Any, Any]:
    special = ("<pad>", "</s>", "<s>", "<image>")
    tokenizer = build_tokenizer(Recipe("llava", special, "<pad>", "</s>", None, LLAVA_TEMPLATE))
    images = CLIPImageProcessorPil(
        size={"shortest_edge": CANVAS}, crop_size={"height": CANVAS, "width": CANVAS}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    tower = CLIPVisionConfig(hidden_size=32, image_size=CANVAS, patch_size=PATCH, **sizes)
    text = LlamaConfig(hidden_size=48, vocab_size=len(tokenizer), pad_token_id=0, **sizes)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    options: dict[str, Any] = {"image_token_id": image_token}
    config = LlavaConfig(vision_config=tower, text_config=text, **options)
    return LlavaForConditionalGeneration(config), processor


@cache
def prepared(family: str) -> HookedVLM:
    """Returns a wrapped random model with a processor for 64x64 px images (Qwen2-VL: any size)."""
    torch.manual_seed(0)
    if family in SHIPPED:
        processor = build_processor(SHIPPED[family], CANVAS)
        model = build_model(SHIPPED[family], processor.tokenizer, CANVAS)
    else:
        model, processor = _llava()
    with torch.no_grad():  # a fresh Gemma-3 projector is zero, which would fake "no effect"
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return HookedVLM(model.eval(), processor, name=f"random {family}")
