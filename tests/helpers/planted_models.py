"""A VLM whose weights are set by hand, so that every experiment's answer is known beforehand.

It is a real `LlavaForConditionalGeneration` with a real processor, for pictures of 48x48 px
(6x6 patches of 8 px, one visual token each), and it answers all 480 Squares questions.
How, step by step, with the dimensions that carry each thing:

Vision encoder (one block; `V` below).  The patch embedding writes a patch's mean colour;
the position embedding writes which strip of columns and which strip of rows it is in.
Head 0 lets every token look up the object in its own strip of columns and copies its
colour, head 1 the same for rows.  So each token comes to carry the colour of "its" object.
The MLP writes the *order code* (`column_code`, `row_code`) that the projector hands on:

- `planted("background")`: in every token.  The language model reads white tokens alone.
- `planted("object")`: in object tokens alone.  There the language model must read.
- `planted("attention")`: in every token whose head 0 (columns) or head 1 (rows) found an object.
  So the background has it only as long as it attends to the objects.

Language model (two blocks; `L` below).  In block 0 every position copies the direction word
("left", "right", "above", "below") that it finds before it.  In block 1 the last
position looks for visual tokens whose order code is the one that the direction asks for and
copies the colour that they carry; with no direction it looks at a token that holds nothing
(a sink).  The vocabulary projection scores the colour names by their distance from it.

Hence, for any model of this kind: the final token holds no order at slot 0, the direction at
slot 1 and the answer at slot 2; and a swap flips the answer, at slots 0 and 1, exactly if it
moves the tokens that are read.

Norms are made harmless by ballast: a constant in one dimension that is far larger than all
else, so that every norm divides by the same number, which its weight multiplies back.  The
vision encoder's LayerNorm also subtracts the mean, so all that is written there is written
once more with the other sign, in the upper half.  RoPE turns with a base so large that
the dimensions of a head that are used (2 and up) do not turn within a prompt.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.prompts import DIRECTIONS
from hooked_vlm.stimuli.squares import COLORS
from training.build import RECIPES, build_tokenizer


SIDE, PATCH, WIDTH = 6, 8, 64
GEOMETRY = geometry_for(SIDE, PATCH)
BALLAST = {"vision": 1000.0, "language": 20.0}
CODE = 3.0
"""The order code's size after the projector; colours are between -1 and 1."""

V = {  # dimensions of the vision encoder, each mirrored 32 dimensions up
    "rgb": range(3),
    "column_strip": range(3, 6),
    "row_strip": range(6, 9),
    "column_color": range(9, 12),
    "row_color": range(12, 15),
    "column_code": range(15, 18),
    "row_code": range(18, 21),
    "ballast": [31],
}
COPIES = 4
"""Dimensions for each strip of an order code: with one alone, a probe's random start drowns it."""
L = {  # dimensions of the language model
    "column_code": range(3 * COPIES),
    "row_code": range(12, 12 + 3 * COPIES),
    "column_color": range(24, 27),
    "row_color": range(27, 30),
    "whiteness": [30],  # the mean of a token's own colour: 1 where white, 0 or less in objects
    "direction_word": range(31, 35),
    "is_direction": [35],
    "sink": [36],
    "direction": range(40, 44),
    "answer_color": range(44, 47),
    "ballast": [63],
}


@cache
def planted(coded: str) -> HookedVLM:
    """Returns the model whose order code is in `"background"` or `"object"` tokens, or comes by
    `"attention"`."""
    tokenizer = build_tokenizer(RECIPES["tiny-qwen2-vl"])
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE * PATCH},
        crop_size={"height": SIDE * PATCH, "width": SIDE * PATCH},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
    )
    model = LlavaForConditionalGeneration(_config(tokenizer)).eval()
    parts: Any = model.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _plant_vision(parts.vision_tower, coded)
        _plant_projector(parts.multi_modal_projector)
        _plant_language(parts.language_model, tokenizer, reads_white=coded != "object")
        _plant_answers(model.lm_head, tokenizer)
    return HookedVLM(model, processor, name=f"planted-{coded}")


def _config(tokenizer: Any) -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        hidden_act="relu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    image_token: Any = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>")}
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        **image_token,
        vision_feature_layer=-1,
        projector_hidden_act="relu",
        tie_word_embeddings=False,
    )


def _both_signs(weight: Tensor) -> None:
    """Writes what stands in the lower half of the output dimensions, negated, in the upper."""
    weight[WIDTH // 2 :] = -weight[: WIDTH // 2]


def _plant_vision(tower: Any, coded: str) -> None:
    tower = getattr(tower, "vision_model", tower)
    patches = tower.embeddings.patch_embedding.weight
    for channel, dim in enumerate(V["rgb"]):
        patches[dim, channel] = 1 / PATCH**2
    _both_signs(patches)
    positions = tower.embeddings.position_embedding.weight  # row 0 is the class token's
    positions[:, V["ballast"]] = BALLAST["vision"]
    for row in range(SIDE):
        for col in range(SIDE):
            here = 1 + row * SIDE + col
            positions[here, V["column_strip"][col * 3 // SIDE]] = 1
            positions[here, V["row_strip"][row * 3 // SIDE]] = 1
    _both_signs(positions.T)
    block = tower.encoder.layers[0]
    for norm in (tower.pre_layrnorm, block.layer_norm1, block.layer_norm2):
        norm.weight.fill_(BALLAST["vision"] * (2 / WIDTH) ** 0.5)

    attn, scale = block.self_attn, 32**0.5
    for head, name in enumerate(("column", "row")):
        at = 32 * head
        for i, strip in enumerate(V[f"{name}_strip"]):
            attn.q_proj.weight[at + i, strip] = 80 * scale  # the own strip before all else,
            attn.k_proj.weight[at + i, strip] = 1
        attn.q_proj.bias[at + 3] = 10 * scale  # then whatever is least white
        for channel, color in zip(V["rgb"], V[f"{name}_color"], strict=True):
            attn.k_proj.weight[at + 3, channel] = -1
            attn.v_proj.weight[at + channel, channel] = 1
            attn.out_proj.weight[color, at + channel] = 1
    _both_signs(attn.out_proj.weight)

    mlp = block.mlp
    codes = [*V["column_code"], *V["row_code"]]
    for i, strip in enumerate([*V["column_strip"], *V["row_strip"]]):
        mlp.fc1.weight[i, strip] = 1  # unit i: the code
        mlp.fc2.weight[codes[i], i] = 1
        if coded == "object":
            mlp.fc1.weight[6 + i, strip] = 1  # unit 6 + i: the code if the token is white, else 0
            mlp.fc1.weight[6 + i, list(V["rgb"])] = 10 / 3
            mlp.fc1.bias[6 + i] = -10
            mlp.fc2.weight[codes[i], 6 + i] = -1
        if coded == "attention":
            color = V["column_color" if i < 3 else "row_color"]
            mlp.fc1.weight[6 + i, strip] = 1  # the code if the colour found is white, else 0
            mlp.fc1.weight[6 + i, list(color)] = 10 / 3
            mlp.fc1.bias[6 + i] = -10
            mlp.fc2.weight[codes[i], 6 + i] = -1
    _both_signs(mlp.fc2.weight)


def _plant_projector(projector: Any) -> None:
    """Copies codes and colours; relu(x) - relu(-x) is x."""
    unit = 0

    def copy(sources: list[int], target: int, size: float) -> None:
        nonlocal unit
        for sign in (1.0, -1.0):
            projector.linear_1.weight[unit, sources] = sign
            projector.linear_2.weight[target, unit] = sign * size
            unit += 1

    for name in ("column_code", "row_code"):
        for i, target in enumerate(L[name]):
            copy([V[name][i // COPIES]], target, CODE)
    for name in ("column_color", "row_color"):
        for source, target in zip(V[name], L[name], strict=True):
            copy([source], target, 1.0)
    copy(list(V["rgb"]), L["whiteness"][0], 1 / 3)
    projector.linear_2.bias[L["ballast"]] = BALLAST["language"]


def _plant_language(lm: Any, tokenizer: Any, reads_white: bool) -> None:
    embed = lm.embed_tokens.weight
    embed[:, L["ballast"]] = BALLAST["language"]
    for i, word in enumerate(DIRECTIONS):
        (token,) = tokenizer.encode(f" {word}", add_special_tokens=False)
        embed[token, L["direction_word"][i]] = 1
        embed[token, L["is_direction"]] = 1
    embed[tokenizer.convert_tokens_to_ids("<|im_start|>"), L["sink"]] = 1
    one = torch.zeros(WIDTH)
    one[L["ballast"]] = 1 / BALLAST["language"]  # what reads 1 at every position
    for norm in (*(block.input_layernorm for block in lm.layers), lm.norm):
        norm.weight.fill_(BALLAST["language"] / WIDTH**0.5)

    scale = 16**0.5
    copy_direction = lm.layers[0].self_attn
    copy_direction.q_proj.weight[2] = 40 * scale * one
    copy_direction.k_proj.weight[2, L["is_direction"]] = 1
    for i in range(4):
        copy_direction.v_proj.weight[i, L["direction_word"][i]] = 1
        copy_direction.o_proj.weight[L["direction"][i], i] = 1

    look_up = lm.layers[1].self_attn
    white = 30.0 if reads_white else 0.0
    for head, name in enumerate(("column", "row")):
        at = 16 * head
        for i, place in enumerate((0, 2)):  # left and right, above and below
            look_up.q_proj.weight[at + 2 + i, L["direction"][2 * head + i]] = 60 * scale
            look_up.k_proj.weight[at + 2 + i, L[f"{name}_code"][place * COPIES]] = 1 / CODE
        look_up.q_proj.weight[at + 4] = scale * one
        look_up.k_proj.weight[at + 4, L["whiteness"]] = white
        look_up.k_proj.weight[at + 4, L["sink"]] = white + 30  # less than a code that matches
        for i, (color, answer) in enumerate(
            zip(L[f"{name}_color"], L["answer_color"], strict=True)
        ):
            look_up.v_proj.weight[at + i, color] = 1
            look_up.o_proj.weight[answer, at + i] = 1


def _plant_answers(head: Any, tokenizer: Any) -> None:
    """A colour name's logit falls with its squared distance d from the answer: 20 * (5 - d) + c."""
    for name, rgb in COLORS.items():
        (token,) = tokenizer.encode(name, add_special_tokens=False)
        color = torch.tensor(rgb) / 127.5 - 1
        head.weight[token, list(L["answer_color"])] = 40 * color
        head.weight[token, L["ballast"]] = 20 * (5 - color.square().sum()) / BALLAST["language"]
