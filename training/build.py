"""Configurations, tokenizers and processors of the shipped models and of the study's.

Three layouts of real transformers classes: Qwen2-VL (patches merged 2x2 in the encoder,
multimodal rotary positions, dynamic resolution) and Gemma-3 (a SigLIP tower of fixed
size, features pooled 2x2, image tokens that attend to each other in both directions,
sliding and full attention in turn) for the models of `training.train`; Qwen3-VL, whose encoder has
learned positions, for those of the study (`training.study`).  Each has a byte-level BPE tokenizer
of its own with its family's special tokens and chat template.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from hooked_vlm.inputs.without_torchvision import images_only
from hooked_vlm.stimuli.prompts import DIRECTIONS, SYSTEM_PROMPT, squares_prompt
from hooked_vlm.stimuli.squares import COLORS
from training.tasks import LIST_PROMPT


PATCH = 8
MERGE = 2
VOCAB = 640
WORDS = (
    "square",
    "circle",
    "triangle",
    "star",
    "cross",
    "heart",
    "shape",
    "object",
    "color",
    "left",
    "right",
    "above",
    "below",
    "yes",
    "no",
    "one",
    "two",
    "three",
    "orange",
    "apple",
    "pot",
    "bell",
    "hat",
    "rose",
    "key",
    "bomb",
    "chair",
    "table",
    "dog",
    "cat",
    "cup",
    "ball",
)

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(prefix='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if message['content'] is string %}{% set ns.prefix = message['content'] + '\n\n' %}"
    "{% else %}{% set ns.prefix = message['content'][0]['text'] + '\n\n' %}{% endif %}"
    "{% else %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ ns.prefix }}{% set ns.prefix = '' %}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """The tokenizer and the template of a model."""

    name: str
    special: tuple[str, ...]
    pad: str
    end: str
    bos: str | None
    template: str


RECIPES = {
    "tiny-qwen2-vl": Recipe(
        "tiny-qwen2-vl",
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ),
        pad="<|endoftext|>",
        end="<|im_end|>",
        bos=None,
        template=QWEN_TEMPLATE,
    ),
    "tiny-gemma-3": Recipe(
        "tiny-gemma-3",
        (
            "<pad>",
            "<eos>",
            "<bos>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ),
        pad="<pad>",
        end="<end_of_turn>",
        bos="<bos>",
        template=GEMMA_TEMPLATE,
    ),
}
"""Those of the models of `training.train`."""
LAYOUTS = {**RECIPES, "tiny-qwen3-vl": replace(RECIPES["tiny-qwen2-vl"], name="tiny-qwen3-vl")}
"""All that can be built."""


def corpus() -> list[str]:
    """Returns the text that tokenizers are trained on: all prompts, and names in all spellings."""
    prompts = [squares_prompt(d, color) for d in DIRECTIONS for color in COLORS]
    names = [*COLORS, *WORDS]
    spellings = [
        s for name in names for s in (name, name.capitalize(), f" {name}", f" {name.capitalize()}")
    ]
    roles = ["user\n", "system\n", "assistant\n", "model\n"]
    # Weighted so that whole words of prompts, roles and names become single tokens.
    return [*prompts, *LIST_PROMPT.values(), *[SYSTEM_PROMPT, *roles] * 20, *spellings * 20]


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with a family's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(recipe.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    extra = {}
    if recipe.bos:
        extra = {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=recipe.pad,
        eos_token=recipe.end,
        bos_token=recipe.bos,
        padding_side="left",
        chat_template=recipe.template,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": extra} if extra else {}),
    )


def build_processor(name: str, canvas: int, is_fixed: bool = False) -> Any:
    """Returns a processor whose pictures are `canvas` pixels on a side.

    Those of Qwen2-VL and Qwen3-VL take any size, unless `is_fixed`.
    """
    recipe = LAYOUTS[name]
    tokenizer = build_tokenizer(recipe)
    norm: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if recipe.template == QWEN_TEMPLATE:
        fewest, most = (canvas, canvas) if is_fixed else (2 * PATCH * MERGE, 512)
        pixels = {"shortest_edge": fewest**2, "longest_edge": most**2}
        images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=pixels, **norm)
        return images_only(Qwen2VLProcessor)(images, tokenizer, chat_template=recipe.template)
    size = {"height": canvas, "width": canvas}
    images = Gemma3ImageProcessorPil(size=size, **norm)
    n_tokens = (canvas // PATCH // MERGE) ** 2
    return Gemma3Processor(
        images, tokenizer, chat_template=recipe.template, image_seq_length=n_tokens
    )


def save_processor(processor: Any, out: Path) -> None:
    """Writes a processor as transformers loads it: one that can take videos with a part for them.

    A part for videos cannot be made without torchvision; its options are those for images.
    """
    processor.save_pretrained(out)
    file = out / "processor_config.json"
    saved = json.loads(file.read_text())
    if isinstance(processor, Qwen2VLProcessor):
        options = {n: v for n, v in saved["image_processor"].items() if n != "image_processor_type"}
        saved["video_processor"] = {**options, "video_processor_type": "Qwen2VLVideoProcessor"}
        file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


def build_model(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    canvas: int,
    blocks: int = 6,
    vision: Mapping[str, int] | None = None,
) -> Any:
    """Returns a model with fresh weights for pictures of `canvas` pixels on a side.

    `blocks` are those of the language model; `vision` replaces sizes of Qwen3-VL's encoder.
    """
    ids = tokenizer.convert_tokens_to_ids
    recipe = LAYOUTS[name]
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "pad_token_id": ids(recipe.pad),
        "eos_token_id": ids(recipe.end),
        "bos_token_id": ids(recipe.bos) if recipe.bos else None,
        "tie_word_embeddings": True,
    }
    if name == "tiny-qwen2-vl":
        return Qwen2VLForConditionalGeneration(_qwen2_vl(common, ids))
    if name == "tiny-qwen3-vl":
        return Qwen3VLForConditionalGeneration(_qwen3_vl(common, ids, canvas, vision or {}))
    return Gemma3ForConditionalGeneration(_gemma_3(common, ids, canvas))


def _qwen2_vl(common: dict[str, Any], ids: Any) -> Qwen2VLConfig:
    config: Any = Qwen2VLConfig
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    return config(
        vision_config={
            "embed_dim": 64,
            "hidden_size": 128,
            "depth": 3,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        text_config={**common, "num_key_value_heads": 2, "rope_parameters": rope},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        bos_token_id=common["bos_token_id"],
        eos_token_id=common["eos_token_id"],
        pad_token_id=common["pad_token_id"],
    )


def _qwen3_vl(
    common: dict[str, Any], ids: Any, canvas: int, vision: Mapping[str, int]
) -> Qwen3VLConfig:
    config: Any = Qwen3VLConfig
    rope = {
        "rope_type": "default",
        "mrope_section": [4, 6, 6],
        "mrope_interleaved": True,
        "rope_theta": 10000.0,
    }
    return config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "depth": 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "num_position_embeddings": (canvas // PATCH) ** 2,
            "deepstack_visual_indexes": [],  # image tokens enter once, as in most families
            **vision,
        },
        text_config={
            **common,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": rope,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _gemma_3(common: dict[str, Any], ids: Any, canvas: int) -> Gemma3Config:
    text = Gemma3TextConfig(
        **common,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"] * (common["num_hidden_layers"] // 2),
    )
    tower = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=canvas,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config: Any = Gemma3Config
    return config(
        text_config=text.to_dict(),
        vision_config=tower.to_dict(),
        mm_tokens_per_image=(canvas // PATCH // MERGE) ** 2,
        image_token_id=ids("<image_soft_token>"),
        boi_token_id=ids("<start_of_image>"),
        eoi_token_id=ids("<end_of_image>"),
        tie_word_embeddings=True,
        bos_token_id=common["bos_token_id"],
        eos_token_id=common["eos_token_id"],
        pad_token_id=common["pad_token_id"],
    )
