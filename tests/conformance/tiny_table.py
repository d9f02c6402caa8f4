"""Data for `tiny.py`: the small value of each attribute by its name, and what names cannot tell.

`TEXT`, `TOWER` and `QFORMER` are widths of a scope (a nested configuration); `NAMES` holds for
every scope.  A row of `OVERRIDES` is merged into the small configuration of one model type.
"""

from typing import Any


VOCABULARIES = ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")
TOWER_WORDS = ("vision", "vq", "sam", "audio", "protein", "adapter", "high_res", "encoder")

TEXT = {
    "hidden_size": 64,
    "embed_dim": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "head_dim": 16,
    "d_kv": 16,
}
TOWER = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
}
QFORMER = {**TOWER, "hidden_size": 48, "intermediate_size": 96, "head_dim": 12}

NAMES = {
    # widths of the text model, wherever they are named
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "decoder_hidden_size": 64,
    "projection_dim": 64,
    "output_dim": 64,
    "output_proj_dims": 64,
    "adapter_out_dim": 64,
    "word_embed_proj_dim": 64,
    "projector_hidden_size": 64,
    "projection_hidden_size": 32,
    "projection_hidden_dim": 64,
    "projection_intermediate_size": 96,
    "alignment_intermediate_size": 128,
    "moe_hidden_size": 64,
    "moe_latent_size": 32,
    "image_token_embed_dim": 64,
    "mm_embed_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
    # widths of the vision tower
    "encoder_hidden_size": 32,
    "vision_hidden_size": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "image_text_hidden_size": 32,
    "output_channels": 16,
    "mel_vocab_size": 32,
    "num_pos_feats": 8,
    "downsample_channels": 32,
    "hidden_sizes": 16,
    "depths": 2,
    "num_groups": 4,
    "channel_multiplier": 1,
    "post_conv_in_channels": 16,
    "post_conv_mid_channels": 32,
    "post_conv_out_channels": 64,
    "downsample_hidden_size": 16,
    # feed-forward
    "ffn_dim": 128,
    "d_ff": 128,
    "mlp_dim": 64,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "moe_intermediate_size": 32,
    "dense_intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "share_expert_dim": 32,
    "merged_hidden_size": 128,
    "block_multiple_of": 16,
    # heads
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "num_sliding_attention_heads": 4,
    "resampler_heads": 4,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
    "resampler_dim_head": 8,
    "conf_num_attention_heads": 4,
    "index_n_heads": 2,
    "query_pre_attn_scalar": 16,
    # depths other than the one that layers are chosen by
    "decoder_layers": 3,
    "num_decoder_layers": 3,
    "num_global_layers": 2,
    "resampler_depth": 2,
    "aligner_num_add_layers": 2,
    "conf_num_hidden_layers": 2,
    "insert_layer_id": 1,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    # linear attention, state space and convolutions
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    # sequence
    "sliding_window": 16,  # three layers of it reach over a picture
    "sliding_window_size": 16,
    "attention_chunk_size": 8,
    "index_topk": 4,
    "index_kpool": 2,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "rel_extent": 16,
    "canvas_length": 8,
    # images
    "mm_tokens_per_image": 16,
    "image_seq_length": 64,
    "num_image_tokens": 64,
    "num_patches": 64,
    "num_position_embeddings": 64,
    "mm_posemb_size": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "posemb_grid_size": 8,
    "position_embedding_size": 64,
    "max_num_patches": 64,
    "seq_len": 64,
    "num_query_tokens": 8,
    "latent_query_num": 8,
    "resampler_n_latents": 8,
    "resampler_num_latents": 8,
    "max_num_tiles": 4,
    "base_channels": 32,
    "num_embeddings": 64,
    "codebook_size": 64,
    "num_res_blocks": 1,
    "resolution": 64,
    "max_position_embeddings": 512,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}

_SECTIONS = {"mrope_section": [2, 3, 3]}
_M_ROPE = {"text_config": {"rope_parameters": _SECTIONS}}
_FOLDED = {"out_hidden_size": 128, "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4}}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _code(number: int) -> str:
    """Returns Chameleon's name of an image's discrete code: its digits as letters."""
    return f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(number))}Z"


_CONVOLUTIONS = {
    "num_stages": 1,
    "out_features": ["stage1"],
    "out_indices": [1],
    "depths": [3],
    "hidden_sizes": [32],
    "hidden_size": 32,
    "image_size": 32,
}

STAND_INS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # in place of timm's MobileNet-V5, where the class of the configuration allows no other
    "gemma3n": (
        "vision_config",
        "convnext",
        {**_CONVOLUTIONS, "vocab_size": 32, "vocab_offset": 448, "rms_norm_eps": 1e-6},
    ),
}

SUB_CONFIGS: dict[str, dict[str, str]] = {
    # configurations that are None by default: a model without a tower
    "gemma4": {"vision_config": "gemma4_vision"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision"},
    # towers of the timm package, in whose place stands one of transformers (OTHER_TOWERS)
    "fast_vlm": {"vision_config": "convnext"},
    "perception_lm": {"vision_config": "clip_vision_model"},
}

OTHER_TOWERS = ("fast_vlm", "gemma3n", "perception_lm")
"""Architectures built with a tower that their checkpoints do not have; the page says so."""

ADDED: dict[str, dict[str, Any]] = {
    # kinds of layers that checkpoints have and the default configuration has not
    "cohere_compass": {
        "text_config": {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 10}
    },
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}},
    "minimax_m3_vl": {
        "text_config": {
            "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
        }
    },
    "step3p7": {
        "text_config": {
            "layer_types": (["full_attention"] + ["sliding_attention"] * 4) * 9,
            "sliding_window": 512,
            "rope_parameters": {"sliding_attention": _ROPE},
        }
    },
    # numbers without which the default configuration builds no model
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * 31,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    },
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # sections of M-RoPE that the default configuration leaves to the code
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl"), _M_ROPE),
    "qwen2_5_omni_thinker": _M_ROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "sliding_attention": {**_ROPE, **_SECTIONS},
                "full_attention": {**_ROPE, **_SECTIONS},
            }
        }
    },
    "hunyuan_vl": {
        "text_config": {"head_dim": 16, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}
    },
    # an embed_dim beside the hidden_size: the latter is the width of the output
    "qwen2_vl": {"vision_config": {"hidden_size": 64}, **_M_ROPE},
    # four patches side by side, and windows as large as the table of positions
    **dict.fromkeys(("muse_glimmer", "muse_spark"), _FOLDED),
    # the last layer and two others side by side
    "mllama": {"vision_config": {"vision_output_dim": 96}},
    # keys and values from a tower as wide as the text model
    "pix2struct": {"vision_config": {"hidden_size": 64, "d_kv": 16}},
    # its eager attention repeats no keys
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    # heads are 64 wide, features enter at several layers of the text model
    "granite4_vision": {
        "vision_config": {"hidden_size": 128},
        "text_config": {"num_hidden_layers": 6},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-3, 0], [-1, 1]],
        "spatial_target_layers": [2, 3, 4, 5],
    },
    # n-gram embeddings at the first layer, an indexer in every fourth
    "qwen4_exp": {
        "text_config": {
            "eos_token_id": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 16,
            "ple_layer_ids": [1],
            "number_of_conv_states": 3,
            "ple_embed_dim": 64,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 2,
        }
    },
    # the names of discrete codes, which tokenizers bring
    "chameleon": {"vocabulary_map": {"<image>": 447, **{_code(i): 448 + i for i in range(64)}}},
    "emu3": {
        "vocabulary_map": {
            "<image>": 447,
            "<|extra_200|>": 446,
            **{f"<|visual token {i:06d}|>": 448 + i for i in range(64)},
        }
    },
    # its tower folds pixels into ever wider channels
    "inkling_mm_model": {"vision_config": {"patch_size": 8}},
    # in place of timm's towers
    "fast_vlm": {"vision_config": _CONVOLUTIONS},
    "gemma3n": {
        "vision_soft_tokens_per_image": 64,
        "audio_config": {"vocab_size": 32, "vocab_offset": 480},
    },
    "perception_lm": {
        "projector_pooling_ratio": 2,
        "vision_config": {"model_args": {"embed_dim": 32}},
    },
}
