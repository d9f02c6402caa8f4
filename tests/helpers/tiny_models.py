"""Tiny random models of the three layouts, and inputs for them, made in well under a second.

Weights are random but not degenerate: Gemma-3's fresh projector weight is zero, which
would fake "no effect", and layer norms are jittered so that no two layers act alike.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from hooked_vlm.model.vlm import HookedVLM


VOCAB, IMAGE, START, END, PAD = 300, 299, 298, 297, 0
FAMILIES = ("qwen2-vl", "gemma-3", "llava")

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}


def _qwen2_vl() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    return Qwen2VLConfig(
        vision_config={
            "embed_dim": 32,
            "hidden_size": 48,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 8,
            "mlp_ratio": 2,
        },
        text_config={**_TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _gemma_3() -> Gemma3Config:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text_config: Any = Gemma3TextConfig
    text = text_config(**_TEXT, head_dim=16, sliding_window=10, layer_types=layers)
    config: Any = Gemma3Config
    tower: Any = SiglipVisionConfig
    return config(
        vision_config=tower(**_TOWER).to_dict(),
        text_config=text.to_dict(),
        mm_tokens_per_image=9,
        image_token_id=IMAGE,
    )


def _llava(vision_feature_layer: int | list[int] = -2) -> LlavaConfig:
    config: Any = LlavaConfig
    tower: Any = CLIPVisionConfig
    return config(
        vision_config=tower(**_TOWER),
        text_config=LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=vision_feature_layer,
    )


_MADE: dict[str, tuple[Callable[..., Any], type]] = {
    "qwen2-vl": (_qwen2_vl, Qwen2VLForConditionalGeneration),
    "gemma-3": (_gemma_3, Gemma3ForConditionalGeneration),
    "llava": (_llava, LlavaForConditionalGeneration),
}


def build(
    family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Returns a new transformers model of a family, seeded, in eval mode."""
    config, model_class = _MADE[family]
    torch.manual_seed(0)
    model = model_class._from_config(config(**options), attn_implementation=attn)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(dtype)


@cache
def tiny(family: str, attn: str = "sdpa") -> HookedVLM:
    """Returns a wrapped tiny model, shared between tests: leave its weights alone."""
    return HookedVLM(build(family, attn), name=f"tiny {family}")


def tokens_of(family: str, rows: int = 6, cols: int = 6) -> int:
    """Returns how many visual tokens an image of that many patches makes."""
    return rows * cols if family == "llava" else rows * cols // 4


def make_inputs(
    family: str, batch: int = 1, images: int = 1, seed: int = 0, text: int = 5
) -> dict[str, torch.Tensor]:
    """Returns inputs of `batch` prompts of equal length with 48x48 px images (6x6 patches)."""
    random = torch.Generator().manual_seed(seed)
    n_images = batch * images
    block = [START, *[IMAGE] * tokens_of(family), END]
    head = torch.randint(2, 290, (batch, 2), generator=random)
    tail = torch.randint(2, 290, (batch, text), generator=random)
    middle = torch.tensor(block * images).expand(batch, -1)
    ids = torch.cat([head, middle, tail], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "qwen2-vl":
        inputs["pixel_values"] = torch.randn(n_images * 36, 3 * 2 * 8 * 8, generator=random)
        inputs["image_grid_thw"] = torch.tensor([[1, 6, 6]] * n_images)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        inputs["pixel_values"] = torch.randn(n_images, 3, 48, 48, generator=random)
    if family == "gemma-3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    return inputs
