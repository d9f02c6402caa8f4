"""The real processors of every architecture, small: a synthetic tokenizer and tiny pictures.

The idea: a processor class says in its own source which special tokens it wants and which
sizes its parts have, so all of that is read by machine, and only the rest is a table.
"""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from conformance import processor_table as table
from conformance.torchvision_stand_in import torchvision_or_stand_in
from hooked_vlm.inputs.without_torchvision import images_only


MODELS = Path(transformers.__file__).parent / "models"
SPECIAL = re.compile(r"</?[^<>\s\\]{1,40}>|\[[A-Z_]+\]|\]<\][a-z]+\[>\[")
TOKEN_ATTRIBUTE = re.compile(r"tokenizer\.(\w+_token)(?:_id)?\b")
TOKENIZER = r"(?:self\.)?tokenizer, \"(\w+_token)"
ASKED_FIRST = re.compile(
    rf"hasattr\({TOKENIZER}(?:_id)?\"|getattr\({TOKENIZER}(?:_id\"|\"(?!, None))"
)
WANTED = re.compile(rf"getattr\({TOKENIZER}\", None")
WRAPPERS = (("vision_start", "vision_end"), ("image_start", "image_end"))
USUAL = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
TOKEN_ID = re.compile(r"(\w+)_token_(?:id|index)")
OTHER = {"unk_token", "sep_token", "cls_token", "mask_token", *USUAL}
TEMPLATE = (
    "{%% for message in messages %%}{{ message['role'] }}: "
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}\n{%% endfor %%}{%% if add_generation_prompt %%}assistant: {%% endif %%}"
)


@cache
def _sources(prefix: str) -> dict[str, str]:
    """Returns the source of every module `models/*/<prefix>*.py`, by its dotted name."""
    files = sorted(MODELS.glob(f"*/{prefix}*.py"))
    return {f"transformers.models.{f.parent.name}.{f.stem}": f.read_text() for f in files}


@cache
def _class(name: str, prefix: str) -> Any:
    """Returns a class of transformers, also where torchvision is missing."""
    found = [m for m, text in _sources(prefix).items() if f"\nclass {name}(" in text]
    if not found:
        return None
    with torchvision_or_stand_in():
        return getattr(importlib.import_module(found[0]), name)


def processor_class(model_type: str) -> Any:
    """Returns the processor class of a model type, or None."""
    name = table.PROCESSORS.get(model_type) or PROCESSOR_MAPPING_NAMES.get(model_type)
    return _class(name, "processing_") if name else None


def _image_processor_class(model_type: str) -> Any:
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    name = table.IMAGE_PROCESSORS.get(model_type) or names.get("pil") or names.get("torchvision")
    return _class(name, "image_processing_") if name else None


def _special_tokens(source: str) -> tuple[set[str], dict[str, str]]:
    """Returns the special tokens in a processor's source, and those it reads off the tokenizer.

    What it asks for first (`hasattr`, `getattr` with a default) is left to its own default.
    """
    constants = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)]
    tokens = {c for c in constants if isinstance(c, str) and SPECIAL.fullmatch(c)}
    asked = {name for names in ASKED_FIRST.findall(source) for name in names}
    names = set(TOKEN_ATTRIBUTE.findall(source)) - asked | set(WANTED.findall(source))
    return tokens, {n: f"<|{n}|>" for n in sorted(names - OTHER) if not n.startswith("add_")}


def _tokenizer(source: str, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer that has the special tokens of a processor's source."""
    tokens, attributes = _special_tokens(source)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    every = list(dict.fromkeys([*USUAL.values(), *attributes.values(), *sorted(tokens), *more]))
    vocab = {word: i for i, word in enumerate([*every, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(every)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=attributes,
        **USUAL,
    )


class Sizes:
    """The sizes of a tiny configuration under the names that processors use."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.processor: Any = None
        names = ("vision_config", "vision_tower_config", "visual_config", "vq_config", "encoder")
        scopes = _scopes(config)
        found = (getattr(scope, name, None) for scope in scopes for name in names)
        self.vision = next((v for v in found if v is not None), config)

    def get(self, *names: str, default: Any = None) -> Any:
        """Returns the first of some attributes that the tower or the whole model has."""
        for name in names:
            for scope in (self.vision, *_scopes(self.config)):
                if (value := getattr(scope, name, None)) is not None:
                    return value
        return default

    @property
    def patch(self) -> int:
        """Pixels on a side of a patch."""
        size = self.get("patch_size", default=14)
        return size if isinstance(size, int) else size[0]

    @property
    def side(self) -> int:
        """Pixels on a side of a picture that needs no resizing."""
        size = self.get("image_size", "img_size", "resolution", default=8 * self.patch)
        size: Any = table.SIDES.get(self.config.model_type, size)
        return size if isinstance(size, int) else size[0]

    @property
    def merge(self) -> int:
        """Patches on a side of what becomes one token."""
        names = ("spatial_merge_size", "merge_size", "merge_kernel_size")
        merge = self.get(*names, "downsample_factor", "scale_factor", default=1)
        merge = merge[0] if isinstance(merge, list | tuple) else merge
        ratio = self.get("downsample_ratio", "pixel_shuffle_ratio", default=1)
        return merge if isinstance(merge, int) and merge > 1 else round(max(ratio, 1 / ratio))

    @property
    def tokens(self) -> int:
        """Tokens of one picture or tile."""
        known = table.TOKENS_OF_A_PICTURE.get(self.config.model_type)
        if known:
            return known(self)
        named = self.get("mm_tokens_per_image", "num_query_tokens", "resampler_n_latents")
        named = named or self.get("latent_query_num")
        return named or (self.side // self.patch // self.merge) ** 2


def _size_like(default: dict[str, int], side: int) -> dict[str, int]:
    """Returns a picture size with the keys of a default one."""
    pixels = default.get("shortest_edge", 0) > 2000
    if pixels:
        return {"shortest_edge": side * side, "longest_edge": 4 * side * side}
    return {k: 2 * side if k == "longest_edge" else side for k in default}


def _image_options(image_class: Any, sizes: Sizes) -> dict[str, Any]:
    """Returns the sizes that an image processor class has an attribute for."""
    names = [n for n in dir(image_class) if not n.startswith("_")]
    has: dict[str, Any] = {n: getattr(image_class, n, None) for n in names}
    square = {"height": sizes.patch, "width": sizes.patch}
    options: dict[str, Any] = {"image_seq_length": sizes.tokens}
    if has.get("patch_size") is not None:
        options["patch_size"] = square if isinstance(has["patch_size"], dict) else sizes.patch
    if isinstance(has.get("max_image_size"), dict):  # of a tile
        options["max_image_size"] = dict.fromkeys(has["max_image_size"], sizes.side)
    for name in ("size", "crop_size", "pad_size", "high_res_size"):
        if isinstance(has.get(name), dict):
            options[name] = _size_like(has[name], sizes.side)
    if isinstance(has.get("merge_size"), int):
        options["merge_size"] = sizes.merge
    if isinstance(has.get("temporal_patch_size"), int):
        options["temporal_patch_size"] = sizes.get(
            "temporal_patch_size", "patch_temporal", default=1
        )
    if has.get("image_grid_pinpoints"):
        a, b = sizes.side, 2 * sizes.side
        options["image_grid_pinpoints"] = [[a, b], [b, a], [b, b]]
    return options


def _processor_options(made: Any, sizes: Sizes) -> dict[str, Any]:
    """Returns the sizes that a processor class has a parameter for."""
    known = {
        "patch_size": sizes.patch,
        "spatial_merge_size": sizes.merge,
        "downsample_factor": sizes.merge,
        "downsample_rate": sizes.get("downsample_rate"),
        "img_size": sizes.side,
        "image_size": sizes.side,
        "vision_feature_select_strategy": sizes.get(
            "vision_feature_select_strategy", default="default"
        ),
        "num_additional_image_tokens": 1,
        **dict.fromkeys(
            ("image_seq_length", "image_seq_len", "num_image_tokens", "num_query_tokens"),
            sizes.tokens,
        ),
    }
    return {n: known[n] for n in inspect.signature(made).parameters if n in known}


def _options(rows: dict[str, Any], model_type: str, sizes: Sizes) -> dict[str, Any]:
    """Returns the row of a table for a model type, its functions of the sizes called."""
    row = rows.get(model_type, {})
    return {n: v(sizes) if callable(v) else v for n, v in row.items()}


def tiny_processor(model_type: str, config: Any) -> ProcessorMixin | None:
    """Returns the processor of a tiny model, and writes the ids of its tokens into `config`."""
    made, image_class = processor_class(model_type), _image_processor_class(model_type)
    if made is None or image_class is None:
        return None
    sizes = Sizes(config)
    module: Any = inspect.getmodule(made)
    source = inspect.getsource(module)
    tokenizer = _tokenizer(source, table.TOKENS.get(model_type, ()))
    with torchvision_or_stand_in():
        images = image_class(
            **_image_options(image_class, sizes) | _options(table.IMAGE_OPTIONS, model_type, sizes)
        )
        given: dict[str, Any] = {n: tokenizer for n in made.get_attributes() if "tokenizer" in n}
        options = _processor_options(made, sizes) | _options(
            table.PROCESSOR_OPTIONS, model_type, sizes
        )
        with patch.dict(vars(module), table.ASSUMED.get(model_type, {})):
            processor = images_only(made)(image_processor=images, **given, **options)
    sizes.processor = processor
    for name, value in _options(table.ATTRIBUTES, model_type, sizes).items():
        setattr(processor, name, value)
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = images.image_grid_pinpoints
    for name, value in _options(table.CONFIG, model_type, sizes).items():
        setattr(config, name, value)
    _write_ids(config, processor)
    for name, tokens in table.IDS.get(model_type, {}).items():
        ids = tokenizer.convert_tokens_to_ids(tokens)
        setattr(config, name, ids)
    processor.chat_template = TEMPLATE % _wrapped(
        _placeholder(model_type, processor, sizes), config, processor, sizes.side
    )
    return processor


def _scopes(config: Any) -> list[Any]:
    """Returns a configuration and the configurations inside it."""
    inner = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    return [config, *(scope for v in inner for scope in _scopes(v))]


def _write_ids(config: Any, processor: Any) -> None:
    """Writes the ids of the tokenizer's special tokens into a configuration."""
    for scope in _scopes(config):
        for name, value in list(vars(scope).items()):
            found = TOKEN_ID.fullmatch(name)
            if found and (isinstance(value, int) or found[1] == "image"):
                setattr(scope, name, _token_id(processor, found[1]))
            elif found and found[1] == "eos" and isinstance(value, list):
                setattr(scope, name, processor.tokenizer.eos_token_id)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = processor.tokenizer.bos_token_id


def _token_id(processor: Any, stem: str) -> int:
    """Returns the id of a token by its name in a configuration; a new one if nobody has it."""
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    for name in (stem, *table.SYNONYMS.get(stem, ())):
        for owner in (tokenizer, processor):
            token_id = getattr(owner, f"{name}_token_id", None)
            if isinstance(token_id, int):
                return token_id
            token = getattr(owner, f"{name}_token", None)
            if token is not None and str(token) in known:
                return known[str(token)]
        if name in known:
            return known[name]
    tokenizer.add_tokens([f"<|{stem}|>"], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(f"<|{stem}|>")


def _wrapped(placeholder: str, config: Any, processor: Any, side: int) -> str:
    """Returns the placeholder between the marks that a model looks for, if its processor adds none.

    Without them two pictures in a row would look like one.
    """
    names = next((w for w in WRAPPERS if hasattr(config, f"{w[0]}_token_id")), None)
    if names is None or not placeholder:
        return placeholder
    ids = [getattr(config, f"{name}_token_id") for name in names]
    made = processor(text=[placeholder], images=[[Image.new("RGB", (side, side))]])
    if ids[0] in made["input_ids"][0]:
        return placeholder
    start, end = processor.tokenizer.convert_ids_to_tokens(ids)
    return f"{start}{placeholder}{end}"


def _placeholder(model_type: str, processor: Any, sizes: Sizes) -> str:
    """Returns the text that stands for one picture in a prompt."""
    names = ("image_placeholder_token", "image_token")
    own: Any = next((v for n in names if (v := getattr(processor, n, None))), "")
    found: Any = table.PLACEHOLDERS.get(model_type, str(own))
    return str(found(sizes) if callable(found) else found)


def example(
    model_type: str,
    config: Any,
    images: list[list[Image.Image]],
    texts: list[str],
    processor: Any = None,
) -> dict[str, Any]:
    """Returns what a model takes for prompts with pictures before the text, padded on the left.

    Without a processor, the tiny one is made, which writes its token ids into `config`.
    """
    processor = tiny_processor(model_type, config) if processor is None else processor
    if processor is None:
        return _text_only(model_type, images, texts)
    prompts = [_prompt(processor, t, len(i)) for i, t in zip(images, texts, strict=True)]
    given: dict[str, Any] = {"text": prompts, "padding": True, "return_tensors": "pt"}
    flat = [image for row in images for image in row]
    if flat:
        given["images"] = flat if model_type in table.FLAT else images
    if model_type in table.TYPES_ASKED_FOR:
        given["return_mm_token_type_ids"] = True
    made = dict(processor(**given))
    if (
        config.is_encoder_decoder and "labels" in made
    ):  # what a recogniser is to say is where its decoder starts
        made["decoder_input_ids"] = made.pop("labels")
    if config.is_encoder_decoder and "decoder_input_ids" not in made:
        made["decoder_input_ids"] = torch.full((len(texts), 1), processor.tokenizer.bos_token_id)
    return made | {n: f(config, made) for n, f in table.MORE_INPUTS.get(model_type, {}).items()}


def _prompt(processor: Any, text: str, n_images: int) -> str:
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _text_only(model_type: str, images: list[Any], texts: list[str]) -> dict[str, Any]:
    if any(images):
        raise ValueError(f"{model_type} takes no pictures.")
    return dict(_tokenizer("")(texts, padding=True, return_tensors="pt"))
