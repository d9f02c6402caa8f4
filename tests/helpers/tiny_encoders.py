"""Tiny random vision encoders of 6x6 patches of 8 px, with image processors that leave 48 px be."""

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hooked_vlm.model.encoder import HookedVisionEncoder


SIDE, PATCH = 48, 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# Class, config, what the config takes besides SIZES, and the tokens before the patches.
ENCODERS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1),
    "clip-projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", {"num_patches": 36}, 0),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}, 1),
    "dinov2-gated": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}, 1),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 4},
        5,
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}, 5),
    "vit": ("ViTModel", "ViTConfig", {}, 1),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", {}, 1),
    "vit-mae": ("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}, 1),
    "deit": ("DeiTModel", "DeiTConfig", {}, 2),
    "i-jepa": ("IJepaModel", "IJepaConfig", {}, 0),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", {}, 0),
}


def build_encoder(name: str, attn: str = "eager", **options: Any) -> Any:
    """Returns a new transformers encoder, seeded, in eval mode, with no two layers alike."""
    model, config, extra, _ = ENCODERS[name]
    torch.manual_seed(0)
    config_class: Any = getattr(transformers, config)
    model_class: Any = getattr(transformers, model)
    made = model_class._from_config(
        config_class(**{**SIZES, **extra, **options}), attn_implementation=attn
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def processor_of(name: str) -> Any:
    if name == "siglip2":
        return Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=36)
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


@cache
def encoder(name: str, attn: str = "eager") -> HookedVisionEncoder:
    """Returns a wrapped tiny encoder, shared between tests: leave its weights alone."""
    return HookedVisionEncoder(build_encoder(name, attn), processor_of(name), name=f"tiny {name}")


def pictures(n: int = 2, seed: int = 0, side: int = SIDE) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(n)]
