"""Small random models with real processors, so that `prepare` goes through all it would."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from conformance.processors import processor_class
from conformance.torchvision_stand_in import torchvision_or_stand_in
from hooked_vlm.inputs.without_torchvision import images_only
from hooked_vlm.model.vlm import HookedVLM
from training.build import (
    VOCAB,
    Recipe,
    build_model,
    build_processor,
    build_tokenizer,
    corpus,
)


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


PIXTRAL_PATCH = 16
PIXTRAL_SPLITS = ("brown", "bomb")
"""Names that Pixtral's tokenizer splits; it keeps all other names of the paper, and orange."""
# As Pixtral's own template does, it adds the system message to a string.
PIXTRAL_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' }}"
    "{% else %}[INST]{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}[/INST]{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def _pixtral_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with Pixtral's special tokens that splits the names Pixtral's splits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [t for t in corpus() if not any(name in t.lower() for name in PIXTRAL_SPLITS)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=PIXTRAL_TEMPLATE,
    )


@cache
def pixtral() -> HookedVLM:
    """Returns a wrapped random model of Pixtral's layout: any size, separators after rows."""
    torch.manual_seed(0)
    tokenizer = _pixtral_tokenizer()
    made = processor_class("pixtral")
    images = PixtralImageProcessorPil(
        patch_size=PIXTRAL_PATCH, size={"longest_edge": 64 * PIXTRAL_PATCH}
    )
    with torchvision_or_stand_in():
        processor = images_only(made)(
            images, tokenizer, patch_size=PIXTRAL_PATCH, chat_template=PIXTRAL_TEMPLATE
        )
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    tower: Any = PixtralVisionConfig
    text: Any = LlamaConfig
    config: Any = LlavaConfig
    model: Any = LlavaForConditionalGeneration(
        config(
            vision_config=tower(
                hidden_size=32, head_dim=8, image_size=1024, patch_size=PIXTRAL_PATCH, **sizes
            ),
            text_config=text(hidden_size=48, vocab_size=len(tokenizer), pad_token_id=0, **sizes),
            image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )
    return HookedVLM(model.eval(), processor, name="random pixtral")


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
