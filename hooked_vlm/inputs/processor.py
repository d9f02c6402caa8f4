"""Calls a model's own processor, and verifies and completes its output.

Processors differ in how they take the images of several prompts.  A list of images for each
prompt is unambiguous, and nearly all processors take it.  A flat list is unambiguous only
where each prompt has exactly one image, so it is used only there, as the second choice.  The
output is verified: a prompt without an image must have no image tokens.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import huggingface_hub.errors
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hooked_vlm.anatomy.parts import first_of
from hooked_vlm.anatomy.source import forward_parameters, forward_source
from hooked_vlm.errors import DataError, HookedVLMError, counted
from hooked_vlm.inputs.pixel_routing import Wrapped


Nested = Sequence[Sequence[Image.Image]]
"""The images of each prompt."""

STRICT = getattr(huggingface_hub.errors, "StrictDataclassError", OSError)
"""What a configuration or a processor raises for a value; no error of Python's own."""
_OF_STRUCTURE = (ValueError, TypeError, AttributeError, IndexError)
"""Errors that processors raise for an unknown nesting of images."""


def model_inputs(
    model: Wrapped, prompts: Sequence[str], images: Nested, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the processor's tensors for prompts and images, and a decoder's start tokens.

    `options` are passed to the processor.  Tensors that the model does not read are left out,
    because transformers' `generate` raises for them.  Raises `DataError` when the processor
    does not keep which image belongs to which prompt.
    """
    processor, hf_model = model.processor, model.hf_model
    asked: dict[str, Any] = dict(text=list(prompts), return_tensors="pt", **options)
    if _gives_types_on_demand(processor, hf_model):
        asked.setdefault("return_mm_token_type_ids", True)
    made = _called(processor, images, asked) if any(images) else dict(processor(**asked))
    _check_assigned(model, made, asked, images)
    made |= _decoder_start(model, made, prompts)
    if "labels" not in options and "input_ids" not in made:
        made.pop("labels", None)  # a copy of the prompt, with which the decoder starts
    return {name: value for name, value in made.items() if is_read(hf_model, name)}


@contextmanager
def refusals(images: Nested) -> Iterator[None]:
    """Converts a processor's exceptions to `DataError`, with the sizes of the images."""
    try:
        yield
    except HookedVLMError:
        raise
    except (*_OF_STRUCTURE, ArithmeticError, KeyError, RuntimeError, OSError, STRICT) as error:
        if "out of memory" in str(error).lower():
            raise
        sizes = list(dict.fromkeys(f"{i.width}x{i.height}" for row in images for i in row))
        shown = ", ".join(sizes[:3]) + (", …" if len(sizes) > 3 else "") or "none"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        lines[0] += lines[1] if lines[0].endswith(":") and len(lines) > 1 else ""
        raise DataError(
            f"The model's processor refuses these inputs: {lines[0][:180]} (sizes of the images: "
            f"{shown} px). Give images and options that it takes."
        ) from error


def placeholder(model: Wrapped) -> str:
    """Returns the image placeholder for prompts without a chat template (`""`: none needed).

    It is found by trying.  Some processors add the tokens of an image themselves, so that a
    placeholder would be one token too many.  Others accept only one of their tokens.
    """
    candidates = placeholders(model.processor)
    lengths = {text: _length(model, text) for text in ("", *candidates)}
    bare = lengths.pop("")
    for text, length in lengths.items():
        if length is not None and (bare is None or length <= bare):
            return text
    return "" if bare is not None or not candidates else candidates[0]


def placeholders(processor: Any) -> list[str]:
    """Returns the texts that may be the placeholder of an image in a prompt."""
    tokens = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
    # Some processors have a token object, which str() converts to its text.
    return list(dict.fromkeys(str(token) for token in tokens if token))


def _length(model: Wrapped, text: str) -> int | None:
    """Returns the number of tokens of a prompt with one image; None if the processor raises."""
    asked = {"text": [f"{text}."], "return_tensors": "pt"}
    try:
        made = _called(model.processor, [[Image.new("RGB", (224, 224))]], asked)
    except _OF_STRUCTURE:
        return None
    if "input_ids" not in made:
        return 0
    lost = model.anatomy.image_token_id is not None and _image_tokens(model, made) is None
    return None if lost else int(made["input_ids"].shape[1])


def _called(processor: Any, images: Nested, asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(processor(images=[list(row) for row in images], **asked))
    except _OF_STRUCTURE as error:
        if any(len(row) != 1 for row in images):
            raise
        try:
            return dict(processor(images=[image for row in images for image in row], **asked))
        except _OF_STRUCTURE:
            raise error from None


def _gives_types_on_demand(processor: Any, hf_model: nn.Module) -> bool:
    """Whether the model takes token type ids that the processor returns only on request."""
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    known = defaults.get("text_kwargs", {}).get("return_mm_token_type_ids")
    known = getattr(processor, "return_mm_token_type_ids", known)
    return known is False and "mm_token_type_ids" in forward_parameters(hf_model)


def _check_assigned(
    model: Wrapped, made: Mapping[str, Any], asked: Mapping[str, Any], images: Nested
) -> None:
    """Raises `DataError` when the output does not keep which image belongs to which prompt."""
    counts = [len(row) for row in images]
    if not any(counts) or set(counts) == {1}:
        return
    held = _image_tokens(model, made)
    if held is None:  # no image tokens: images belong to prompts by their index
        told = not any(_is_flat(name, value, sum(counts)) for name, value in made.items())
    else:
        told = [bool(n) for n in held] == [bool(n) for n in counts] and not any(
            len(row) > 1 and _counts_once(model, asked, prompt, row, n_tokens)
            for prompt, row, n_tokens in zip(asked["text"], images, held, strict=True)
        )
    if not told:
        raise DataError(
            f"{', '.join(map(str, counts))} images were given for "
            f"{counted(len(counts), 'prompt')}, and {type(model.processor).__name__} does not keep "
            "which image belongs to which prompt. Give exactly one image for each prompt."
        )


def _counts_once(
    model: Wrapped, asked: Mapping[str, Any], prompt: str, images: Sequence[Image.Image], n: int
) -> bool:
    """Whether several images give only the `n` tokens of one image, without a placeholder."""
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    written = [*placeholders(model.processor)]
    if model.anatomy.image_token_id is not None:
        written.append(tokenizer.convert_ids_to_tokens(model.anatomy.image_token_id))
    if any(text in prompt for text in written):
        return False
    one = _called(model.processor, [images[:1]], {**asked, "text": [prompt]})
    return [n] == _image_tokens(model, one)


def _image_tokens(model: Wrapped, made: Mapping[str, Any]) -> list[int] | None:
    """Returns each prompt's number of image tokens; None where no prompt has any."""
    ids = made.get("input_ids")
    if ids is None:
        return None
    tokens = [
        model.anatomy.image_token_id,
        *(getattr(model.processor, "image_token_ids", ()) or ()),
    ]
    known = torch.tensor([token for token in tokens if isinstance(token, int)])
    places = [torch.isin(ids, known)]
    places += [v.bool() for n, v in made.items() if _is_mask_of_images(n, v, ids)]
    held = torch.stack(places).any(0).sum(1)
    return held.tolist() if bool(held.any()) else None


def _is_mask_of_images(name: str, value: Any, ids: Tensor) -> bool:
    return "image" in name and "mask" in name and getattr(value, "shape", None) == ids.shape


def _is_flat(name: str, value: Any, n_images: int) -> bool:
    """Whether a tensor has all pictures in one axis, without the prompts they belong to."""
    pixels = ("pixel_values", "flattened_patches")
    return (
        name in pixels and isinstance(value, Tensor) and value.ndim < 5 and len(value) == n_images
    )


def _decoder_start(
    model: Wrapped, made: Mapping[str, Any], prompts: Sequence[str]
) -> dict[str, Tensor]:
    """Returns the tokens with which an encoder-decoder's answer starts, one row per prompt.

    When the encoder does not take the prompt, the answer starts with the prompt's tokens.  The
    start token comes before them, as in `generate`.
    """
    config = getattr(model.hf_model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    start, given = _start_token(model.hf_model), made.get("decoder_input_ids")
    if "input_ids" in made:
        ids = torch.full((len(made["input_ids"]), 1), start)
        return {"decoder_input_ids": ids} if given is None else {}
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    if given is None:
        written = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    else:
        mask = made.get("decoder_attention_mask", torch.ones_like(given)).bool()
        written = [row[kept].tolist() for row, kept in zip(given, mask, strict=True)]
    rows = [torch.tensor(row if row[:1] == [start] else [start, *row]) for row in written]
    pad = first_of(config, "pad_token_id") or tokenizer.pad_token_id or 0
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    masked = "decoder_attention_mask" in made or not mask.all()
    return {"decoder_input_ids": ids} | ({"decoder_attention_mask": mask} if masked else {})


def _start_token(hf_model: nn.Module) -> int:
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for owner in ("generation_config", "config"):
            token = first_of(getattr(hf_model, owner, None), name)
            if isinstance(token, int):
                return token
    return 0


def is_read(hf_model: nn.Module, name: str) -> bool:
    """Whether a model, or a module to which it passes its arguments, reads an argument."""
    own = inspect.signature(inspect.unwrap(type(hf_model).forward)).parameters
    if name in own or not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return name in own
    forwards = {type(module): module for module in hf_model.modules()}.values()
    return any(
        name in forward_parameters(module) or f'"{name}"' in forward_source(type(module).forward)
        for module in forwards
    )
