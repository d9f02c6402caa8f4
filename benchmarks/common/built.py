"""Models to time, made from configs: two of a size whose arithmetic counts, and real ones.

`build` gives a seeded random model with 12 blocks of width 512 (about 50 million
parameters in them) and `make_inputs` prompts of about 160 tokens for it, one image each.
An image's size is its `side`: it is always `side / 2` tokens wide and high, which are merged
from `side` x `side` patches, save in LLaVA, where a token is one patch of a smaller picture.
`REAL` are the configs of published models; on the `meta` device they take no memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)


VOCAB, IMAGE, START, END = 4000, 3999, 3998, 3997
SIDE, PATCH = 16, 14
LENGTH = 160
LAYERS = {"qwen2-vl": (12, 6), "gemma-3": (12, 6)}
"""The families that are timed by default, and their blocks: language model, encoder."""


def _rotary(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)}


def _text(n_layers: int, width: int, vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": width // 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def _qwen(vision: dict[str, Any], n_layers: int, width: int, vocab: int) -> dict[str, Any]:
    half = width // 16
    time, rows = half // 4, (half - half // 4) // 2
    rope = _rotary(time, rows, half - time - rows)
    text = {**_text(n_layers, width, vocab), "rope_parameters": rope}
    del text["head_dim"]
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": IMAGE,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def _qwen2_vl(n_layers: int, n_vision: int, width: int, vocab: int, _side: int) -> tuple[type, Any]:
    vision = {"depth": n_vision, "embed_dim": 256, "hidden_size": width, "num_heads": 8}
    config = Qwen2VLConfig(**_qwen(vision, n_layers, width, vocab))
    return Qwen2VLForConditionalGeneration, config


def _qwen2_5_vl(
    n_layers: int, n_vision: int, width: int, vocab: int, _side: int
) -> tuple[type, Any]:
    vision = {
        "depth": n_vision,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "out_hidden_size": width,
        "num_heads": 8,
        "fullatt_block_indexes": [n_vision // 2, n_vision - 1],
    }
    config = Qwen2_5_VLConfig(**_qwen(vision, n_layers, width, vocab))
    return Qwen2_5_VLForConditionalGeneration, config


def _llava(n_layers: int, n_vision: int, width: int, vocab: int, side: int) -> tuple[type, Any]:
    config: Any = LlavaConfig
    vision: Any = CLIPVisionConfig
    text: Any = LlamaConfig
    tower = vision(
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=8,
        num_hidden_layers=n_vision,
        image_size=side // 2 * PATCH,
        patch_size=PATCH,
    )
    return LlavaForConditionalGeneration, config(
        vision_config=tower,
        text_config=text(**_text(n_layers, width, vocab)),
        image_token_index=IMAGE,
        image_seq_length=(side // 2) ** 2,
    )


def _gemma_3(n_layers: int, n_vision: int, width: int, vocab: int, side: int) -> tuple[type, Any]:
    config: Any = Gemma3Config
    text: Any = Gemma3TextConfig
    vision: Any = SiglipVisionConfig
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8}
    made = config(
        text_config=text(**_text(n_layers, width, vocab)).to_dict(),
        vision_config=vision(
            **sizes, num_hidden_layers=n_vision, image_size=side * PATCH, patch_size=PATCH
        ).to_dict(),
        mm_tokens_per_image=(side // 2) ** 2,
        image_token_id=IMAGE,
    )
    return Gemma3ForConditionalGeneration, made


FAMILIES: dict[str, Callable[..., tuple[type, Any]]] = {
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "gemma-3": _gemma_3,
    "llava": _llava,
}
"""The families that `build` knows."""


def build(
    family: str,
    layers: tuple[int, int] = (12, 6),
    width: int = 512,
    vocab: int = VOCAB,
    side: int = SIDE,
) -> Any:
    """Returns a new random transformers model of a family, seeded, in eval mode."""
    model_class, config = FAMILIES[family](*layers, width, vocab, side)
    torch.manual_seed(0)
    made: Any = model_class._from_config(config, attn_implementation="sdpa").eval()  # type: ignore[attr-defined]
    if family == "gemma-3":  # zeros otherwise, and no image would matter
        torch.nn.init.normal_(made.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    return made


def make_inputs(
    family: str,
    batch: int,
    seed: int = 0,
    side: int = SIDE,
    length: int = LENGTH,
    questions: int = 1,
) -> dict[str, Tensor]:
    """Returns inputs of `batch` prompts, each with one image of `side / 2` tokens a side.

    With several questions there are so many prompts about each image, question by question.
    """
    random = torch.Generator().manual_seed(seed)
    n_tokens = (side // 2) ** 2
    ids = torch.randint(2, 3000, (batch, length), generator=random)
    ids[:, 3], ids[:, 4 : 4 + n_tokens], ids[:, 4 + n_tokens] = START, IMAGE, END
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        inputs["pixel_values"] = torch.randn(batch * side**2, 3 * 2 * PATCH**2, generator=random)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * batch)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        across = (side // 2 if family == "llava" else side) * PATCH
        inputs["pixel_values"] = torch.randn(batch, 3, across, across, generator=random)
    if family == "gemma-3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    return asked(inputs, 5 + n_tokens, questions, seed)


def asked(inputs: dict[str, Tensor], end: int, questions: int, seed: int = 0) -> dict[str, Tensor]:
    """Returns prompts with other texts from position `end` on, after the same, for each question.

    All first questions come before all second ones.

    >>> ids = torch.tensor([[7, 8, 9]])
    >>> asked({"input_ids": ids}, 2, 2)["input_ids"][:, :2].tolist()
    [[7, 8], [7, 8]]
    """
    random = torch.Generator().manual_seed(10_000 + seed)
    found = {name: torch.cat([value] * questions) for name, value in inputs.items()}
    ids, batch = found["input_ids"], len(inputs["input_ids"])
    others = (ids.shape[0] - batch, ids.shape[1] - end)
    ids[batch:, end:] = torch.randint(2, 3000, others, generator=random)
    return found


# --- sizes of published models ------------------------------------------------------------


def _real_qwen(d: int, d_mlp: int, layers: int, heads: int, kv: int, vocab: int) -> Callable:
    def make() -> tuple[type, Any]:
        text = {
            "hidden_size": d,
            "intermediate_size": d_mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "vocab_size": vocab,
            "rope_parameters": _rotary(16, 24, 24),
        }
        vision = {"depth": 32, "embed_dim": 1280, "hidden_size": d, "num_heads": 16}
        config = Qwen2VLConfig(text_config=text, vision_config=vision)
        return Qwen2VLForConditionalGeneration, config

    return make


def _real_gemma() -> tuple[type, Any]:
    config: Any = Gemma3Config
    text: Any = Gemma3TextConfig
    vision: Any = SiglipVisionConfig
    inner = text(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=262208,
    )
    tower = vision(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
    )
    return Gemma3ForConditionalGeneration, config(
        text_config=inner.to_dict(), vision_config=tower.to_dict(), mm_tokens_per_image=256
    )


def _real_llava() -> tuple[type, Any]:
    config: Any = LlavaConfig
    vision: Any = CLIPVisionConfig
    tower = vision(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return LlavaForConditionalGeneration, config(
        vision_config=tower, text_config=LlamaConfig(vocab_size=32064)
    )


REAL: dict[str, Callable[[], tuple[type, Any]]] = {
    "Qwen2-VL-7B": _real_qwen(3584, 18944, 28, 28, 4, 152064),
    "Qwen2-VL-72B": _real_qwen(8192, 29568, 80, 64, 8, 152064),
    "Gemma-3-4b": _real_gemma,
    "LLaVA-1.5-7B": _real_llava,
}


def on_meta(name: str) -> Any:
    """Returns a published model without its weights."""
    model_class, config = REAL[name]()
    with torch.device("meta"):
        return model_class(config)
