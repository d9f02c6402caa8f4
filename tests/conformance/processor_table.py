"""Data for `processors.py`: what cannot be found by machine, one row for each exception."""

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor


def _codes(sizes: Any, n: int, name: Callable[[int], str]) -> dict[str, int]:
    """Returns ids at the end of a vocabulary of 512 for a picture's discrete codes."""
    return {"<image>": sizes.processor.image_token_id} | {name(i): 511 - n + i for i in range(n)}


def _letters(code: int) -> str:
    """Returns Chameleon's name of a code: its digits as letters."""
    return f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(code))}Z"


def _with_a_mark(sizes: Any) -> Callable[..., str]:
    """Returns Fuyu's placeholder after one more token, where it expects SentencePiece's mark."""
    own = sizes.processor.replace_image_token
    return lambda *args, **kwargs: " " + own(*args, **kwargs)


def _square(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


_VISION_MARKS = {
    "vision_start_token_id": "<|vision_bos_token|>",
    "vision_end_token_id": "<|vision_eos_token|>",
}

PROCESSORS: dict[str, str] = {
    # model types that share a class without being named in transformers' own table
    "fast_vlm": "LlavaProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "cosmos3_omni": "Qwen3VLProcessor",
    "vision-encoder-decoder": "TrOCRProcessor",
    "kosmos-2": "Kosmos2Processor",
    "kosmos-2.5": "Kosmos2_5Processor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
IMAGE_PROCESSORS: dict[str, str] = {
    "fuyu": "FuyuImageProcessor",  # the PIL one mixes up numpy and torch
    "diffusion_gemma": "Gemma4ImageProcessorPil",
    "fast_vlm": "LlavaImageProcessorPil",
    "vision-encoder-decoder": "ViTImageProcessorPil",
    "glm4v_moe": "Glm4vImageProcessorPil",
    "glm_ocr": "Glm46VImageProcessorPil",
    "qwen2_5_omni_thinker": "Qwen2VLImageProcessorPil",
    "qwen3_omni_moe_thinker": "Qwen2VLImageProcessorPil",
    "qwen3_vl_moe": "Qwen2VLImageProcessorPil",
}
TOKENS: dict[str, tuple[str, ...]] = {
    "fuyu": ("|SPEAKER|", "|NEWLINE|"),
    "pp_chart2table": ("<img>", "<imgpad>", "</img>"),
}
PLACEHOLDERS: dict[str, Any] = {
    # the processor puts the picture's tokens into the prompt itself
    **dict.fromkeys(("blip-2", "florence2", "fuyu", "instructblip", "kosmos-2.5", "pi0"), ""),
    "hunyuan_vl": "<|image_start_token|><|image_token|><|image_end_token|>",  # or it refuses
    # nor does its processor: the template holds as many as there are features
    "pp_chart2table": lambda s: f"<img>{'<imgpad>' * s.tokens}</img>",
}
FLAT = {
    # processors that take one list of pictures, one for each prompt
    "blip",
    "blip-2",
    "florence2",
    "fuyu",
    "git",
    "got_ocr2",
    "instructblip",
    "kosmos-2",
    "kosmos-2.5",
    "pix2struct",
    "pp_chart2table",
    "pp_formulanet",
    "udop",
}
PROCESSOR_OPTIONS: dict[str, Any] = {
    "fast_vlm": {"num_additional_image_tokens": 0},  # its tower has no class token
    "aria": {"size_conversion": lambda s: {s.side: s.tokens}},
}
ASSUMED: dict[str, Any] = {
    # a package that only videos need
    "smolvlm": {"num2words": str},
}
SIDES: dict[str, int] = {
    # where the tower's strides multiply to more than its first patch
    "florence2": 64,
    "deepseek_ocr2": 1024,  # its tower has 16 x 16 queries, and as many patches by four
    "aria": 490,  # the smaller of the two that its image processor allows
}
TOKENS_OF_A_PICTURE: dict[str, Any] = {
    "florence2": lambda s: (s.side // 32) ** 2 + 1,  # and their mean
    **dict.fromkeys(  # two convolutions of stride two after the tower
        ("got_ocr2", "pp_chart2table"), lambda s: (s.side // s.patch // 4) ** 2
    ),
    "aria": lambda s: 16,
    "chameleon": lambda s: (s.side // 2 ** (len(s.get("channel_multiplier")) - 1)) ** 2,
}
CONFIG: dict[str, Any] = {
    # what a configuration has to know of the pictures
    "aria": {"projector_patch_to_query_dict": lambda s: {(s.side // s.patch) ** 2: s.tokens}},
    "chameleon": {"vocabulary_map": lambda s: _codes(s, s.get("num_embeddings"), _letters)},
    "emu3": {
        "vocabulary_map": lambda s: (
            _codes(s, s.get("codebook_size"), "<|visual token {:06d}|>".format)
            | {"<|extra_200|>": s.processor.tokenizer.eof_token_id}
        )
    },
}
IMAGE_OPTIONS: dict[str, Any] = {
    # tokens on a side of a tile go by the name of a patch size
    "cohere2_vision": {"patch_size": lambda s: s.side // s.patch // s.merge},
    # patches of what one token sees
    "inkling2": {"size": lambda s: _square(s.patch * s.merge)},
    "inkling_mm_model": {"size": lambda s: _square(s.patch)},
    # fewer tokens at least, or small pictures are enlarged
    "diffusion_gemma": {"max_soft_tokens": 70},
    "gemma4": {"max_soft_tokens": 70},
    "gemma4_unified": {"max_soft_tokens": 70},
    "lfm2_vl": {"min_image_tokens": 4, "max_image_tokens": 64},
    "nemotron_h_omni": {"min_num_patches": 16, "max_num_patches": 256},
    "minicpm_ocr": {"scale_resolution": lambda s: s.side},
    "minicpmv4_6": {"scale_resolution": lambda s: s.side},
    "minicpmv4_7": {"scale_resolution": lambda s: s.side},
    "perception_lm": {"tile_size": lambda s: s.side, "max_num_tiles": 4},
    "aria": {"max_image_size": lambda s: s.side},
    "video_llava": {
        "size": lambda s: {"shortest_edge": s.side},
        "crop_size": lambda s: _square(s.side),
    },
    "deepseek_vl_hybrid": {
        "high_res_size": lambda s: _square(s.config.high_res_vision_config.image_size)
    },
    "deepseek_ocr2": {"size": _square(1024), "tile_size": 768},
    "unlimited_ocr": {"size": lambda s: _square(s.side), "tile_size": lambda s: s.side},
    "step3p7": {"patch_size": lambda s: s.side, "vision_patch_size": lambda s: s.patch},
    "molmo2": {"overlap_margins": [2, 2]},
    "emu3": {"min_pixels": 32 * 32, "max_pixels": 128 * 128},
    "udop": {"apply_ocr": False},
    "pix2struct": {"patch_size": lambda s: _square(isqrt(s.get("patch_embed_hidden_size") // 3))},
    "kosmos-2.5": {"patch_size": lambda s: _square(isqrt(s.get("patch_embed_hidden_size") // 3))},
}
ATTRIBUTES: dict[str, Any] = {
    # what else a processor reads when it is called
    "fuyu": {"replace_image_token": _with_a_mark},
    "got_ocr2": {"num_image_tokens": lambda s: s.tokens},
    "kosmos-2": {"num_image_tokens": lambda s: s.tokens, "first_image_token_id": 100},
    "aria": {"images_kwargs": lambda s: {"max_image_size": s.side, "split_image": False}},
    "kosmos-2.5": {"images_kwargs": {"max_patches": 64, "return_tensors": "pt"}},
    "pix2struct": {"images_kwargs": {"max_patches": 64}},
}

SYNONYMS: dict[str, tuple[str, ...]] = {
    # the same token under other names, in processors and tokenizers
    "vision_start": ("<|vision_start|>", "vision_bos"),
    "vision_end": ("<|vision_end|>", "vision_eos"),
    "image_start": ("start_image", "boi", "<|begin_of_image|>", "<|image_start|>", "<im_start>"),
    "image_end": ("end_image", "eoi", "<|end_of_image|>", "<|image_end|>", "<im_end>"),
    "boi": ("image_start", "start_image"),
    "eoi": ("image_end", "end_image"),
}
TYPES_ASKED_FOR = {
    "cosmos3_edge"
}  # needs mm_token_type_ids, and its processor gives them on demand
IDS: dict[str, dict[str, Any]] = {
    # attributes of configurations whose tokens have another name, or an order
    "ovis2": {
        "image_token_id": "<IMG_ATOM>",
        "visual_indicator_token_ids": (
            "<IMG_START>",
            "<IMG_GRID>",
            "<IMG_COL>",
            "<IMG_ROW>",
            "<IMG_END>",
        ),
    },
    "llama4": {"image_token_index": "<|patch|>"},
    "molmo2": {"image_patch_id": "<im_patch>"},
    "pp_chart2table": {"image_token_id": "<imgpad>"},
    # read by the model, set by its checkpoints, and not a default of its configuration
    "qwen2_5_omni_thinker": _VISION_MARKS,
    "qwen3_omni_moe_thinker": _VISION_MARKS,
}
MORE_INPUTS: dict[str, dict[str, Callable[[Any, dict[str, Any]], Tensor]]] = {
    # what a user brings himself
    "pi0": {
        "state": lambda config, made: torch.zeros(len(made["input_ids"]), config.max_state_dim)
    },
    "udop": {"bbox": lambda config, made: torch.zeros(*made["input_ids"].shape, 4).long()},
}
