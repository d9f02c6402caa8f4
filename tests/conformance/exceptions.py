"""What does not hold, and why: the one place where the suite names architectures.

`NOT_SERVED` are architectures that cannot be wrapped as vision-language models, `EXCEPT` the
laws that one of the others breaks for a reason of its own.  A row here is no excuse for a
wrong number: each says what a user meets instead.
"""

NOT_SERVED: dict[str, str] = {
    # no image encoder whose features reach a decoder
    "chameleon": "images become tokens of a codebook; no encoder's features reach the decoder",
    "emu3": "images become tokens of a codebook; no encoder's features reach the decoder",
    "evolla": "reads proteins, not images",
    "fuyu": "no image encoder: patches go through one linear map into the decoder",
    "gemma4_unified": "no image encoder: patches go through one linear map into the decoder",
    "mistral4": "text only, although transformers lists it",
    "udop": "one encoder for text and patches together; no image encoder of its own",
    # no next-token logits
    "diffusion_gemma": "block diffusion: its forward draws noise, and no token follows another",
    "pi0": "gives robot actions, not text",
    # not to be had in this environment
    "instructblipvideo": "its processor takes videos only; not tried",
}

_PADDED = "transformers' own results change with padding here"

EXCEPT: dict[tuple[str, str], str] = {
    ("gemma3n", "residual"): "several residual streams, mixed around each block",
    ("gemma3n", "start layer"): "the last blocks use keys and values of earlier ones",
    ("gemma4", "residual"): "per-layer inputs are added, and the sum scaled, after the MLP",
    ("inkling2", "residual"): "a short convolution mixes the residual itself",
    ("glm5_next", "residual"): "several residual streams, mixed around each block",
    (
        "hunyuan_vl",
        "images",
    ): "projected rows of several images, with separators, are refused",
    ("qwen4_exp", "residual"): "several residual streams, mixed around each block",
    ("muse_spark", "residual"): "a learned gate mixes what is added into the residual",
    ("idefics", "residual"): "gated cross-attention blocks stand between the blocks, unnamed",
    ("pix2struct", "start layer"): "the first block makes the position bias of all others",
    ("pix2struct", "residual"): "attention and MLP add to the residual inside themselves",
    ("minicpmv4_6", "residual"): "patches are merged in the middle of the encoder",
    ("minicpmv4_7", "residual"): "patches are merged in the middle of the encoder",
    ("mllama", "residual"): "cross-attention blocks drop what they add where a row sees no image",
    ("mllama", "mixed batch"): "transformers lets a row without an image attend to a blank one",
    **dict.fromkeys(
        ((n, "mixed batch") for n in ("mistral_large4", "minimax_m3_vl", "dots3_note")),
        f"{_PADDED} (which keys its index picks)",
    ),
    ("mistral_large4", "padding"): f"{_PADDED} (which keys its index picks)",
    ("minimax_m3_vl", "padding"): f"{_PADDED} (which keys its index picks)",
    ("dots3_note", "padding"): f"{_PADDED} (which keys its index picks)",
    ("glm5_next", "padding"): f"{_PADDED} (which keys its index picks)",
    ("instructblip", "padding"): f"{_PADDED} (its Q-former reads the padded question)",
    ("kosmos-2.5", "padding"): _PADDED,
    ("shieldgemma2", "own output"): "a classifier whose processor makes three prompts of one",
    ("shieldgemma2", "padding"): "a classifier whose processor makes three prompts of one",
}
