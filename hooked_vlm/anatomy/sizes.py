"""The sizes of a wrapped model, with TransformerLens's names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hooked_vlm.anatomy.devices import compute_dtype, execution_device
from hooked_vlm.anatomy.model import Anatomy
from hooked_vlm.anatomy.vision import Stack, Vision


@dataclass(frozen=True)
class StackConfig:
    """Sizes of one residual stream."""

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int | None


@dataclass(frozen=True)
class VisionConfig(StackConfig):
    """Sizes of the vision encoder."""

    patch_size: int
    """Side of a patch, in pixels."""
    merge: int
    """Side of the square of patches that the encoder merges into one visual token (1: none)."""
    n_prefix: int
    """Number of encoder tokens before the patches, such as CLIP's class token."""
    image_size: int | None
    """Side in pixels of the only image size accepted; None when any size is."""
    last_read: int
    """Index of the last block whose output reaches the language model."""


@dataclass(frozen=True)
class HookedVLMConfig(StackConfig):
    """Sizes of the language model; `vision` has those of the vision encoder."""

    d_vocab: int
    model_name: str
    attn_implementation: str
    image_token_id: int | None
    vision: VisionConfig | None
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class EncoderConfig(VisionConfig):
    """Sizes of a vision encoder that is wrapped without a language model."""

    model_name: str
    attn_implementation: str
    device: torch.device
    dtype: torch.dtype

    @property
    def vision(self) -> "EncoderConfig":
        """Returns this config, so that code for `HookedVLM` and for encoders can be the same."""
        return self


def read_config(model: nn.Module, anatomy: Anatomy, name: str) -> HookedVLMConfig:
    """Returns the sizes of a model with the given anatomy."""
    unembed: Any = model.get_submodule(anatomy.unembed)
    embed = model.get_submodule(anatomy.embed)
    # A packed (quantised) weight has another shape than its map, so out_features comes first.
    d_vocab = getattr(unembed, "out_features", None) or unembed.weight.shape[0]
    return HookedVLMConfig(
        **_stack(anatomy.lm),
        d_vocab=d_vocab,
        model_name=name,
        attn_implementation=str(getattr(_config(model), "_attn_implementation", "eager")),
        image_token_id=anatomy.image_token_id,
        vision=_vision(anatomy),
        device=execution_device(embed) or torch.device("cpu"),
        dtype=compute_dtype(embed, model),
    )


def read_encoder_config(model: nn.Module, vision: Vision, name: str) -> EncoderConfig:
    """Returns the sizes of a vision encoder with the given anatomy."""
    block = model.get_submodule(vision.blocks[0].path)
    return EncoderConfig(
        **_vision_sizes(vision),
        model_name=name,
        attn_implementation=str(getattr(_config(model), "_attn_implementation", "eager")),
        device=execution_device(block) or torch.device("cpu"),
        dtype=compute_dtype(block, model),
    )


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _stack(stack: Stack) -> dict[str, Any]:
    attn = stack.attention
    mlp = next((block.mlp for block in stack.blocks if block.mlp), None)
    return {
        "n_layers": len(stack.blocks),
        "d_model": stack.d_model,
        "n_heads": attn.n_heads if attn else 0,
        "n_key_value_heads": attn.n_key_value_heads if attn else 0,
        "d_head": attn.d_head if attn else 0,
        "d_mlp": mlp.d_mlp if mlp else None,
    }


def _vision(anatomy: Anatomy) -> VisionConfig | None:
    vision = anatomy.vision
    if vision is None:
        return None
    return VisionConfig(**_vision_sizes(vision))


def _vision_sizes(vision: Vision) -> dict[str, Any]:
    return {
        **_stack(vision),
        "patch_size": vision.patch_size,
        "merge": vision.merge,
        "n_prefix": vision.n_prefix,
        "image_size": vision.image_size,
        "last_read": vision.last_read,
    }
