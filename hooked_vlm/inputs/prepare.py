"""Converts images and prompts to model inputs, with a grid for every image.

`prepare_inputs` applies the chat template and calls the model's own processor.  The result
has all tensors of the processor, unchanged, and the grids: which position of which prompt
shows which part of which image.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.errors import (
    DataError,
    HookedVLMWarning,
    NoGridError,
    UnsupportedModelError,
    callers_level,
    counted,
)
from hooked_vlm.inputs.chat import chat_prompt
from hooked_vlm.inputs.grid_finder import GridFinder
from hooked_vlm.inputs.pixel_routing import Wrapped
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.processor import model_inputs, placeholder, placeholders, refusals
from hooked_vlm.inputs.rows import placeholder_ids
from hooked_vlm.regions.grid import TokenGrid, warn_if_resized


OneImage = Any
"""A PIL image, a numpy array `[height, width, 3]` or a tensor `[3, height, width]`."""
Images = OneImage | Sequence[Any] | None
Texts = str | Sequence[str]


def prepare_inputs(
    finder: GridFinder,
    images: Images,
    texts: Texts,
    *,
    system: str | None,
    chat: bool | None,
    processor_kwargs: dict[str, Any],
) -> Inputs:
    """Returns the inputs for a batch of prompts; see `HookedVLM.prepare`."""
    processor = finder.model.processor
    texts = [texts] if isinstance(texts, str) else list(texts)
    by_prompt = _images_by_prompt(images, len(texts))
    if any(by_prompt) and getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(
            f"Images were given, and {type(processor).__name__} has no image processor. Wrap the "
            "model with its AutoProcessor, not with its tokenizer."
        )
    # 1. The processor's tensors.
    chat = bool(getattr(processor, "chat_template", None)) if chat is None else chat
    if system is not None and not chat:
        raise DataError(
            "system=… was given, and these prompts have no chat template that could hold it"
            + (" (chat=False)." if hasattr(processor, "chat_template") else ".")
            + " Give it as part of the text, or use a processor with a chat template."
        )
    with refusals(by_prompt):
        made, prompts = processed(finder, by_prompt, texts, system, chat, processor_kwargs)
    # 2. The grids of the images.  Images without a grid give a warning, not an error.
    grids: Sequence[Sequence[TokenGrid]] = ((),) * len(texts)
    no_grid = ""
    if any(by_prompt):
        sizes = [[image.size for image in row] for row in by_prompt]

        def process(together: list[Image.Image]) -> dict[str, Any]:
            return processed(finder, [together], ["."], None, chat, processor_kwargs)[0]

        key = repr(sorted(processor_kwargs.items(), key=lambda item: item[0]))
        try:
            grids = finder.find(made, sizes, process, key)
        except NoGridError as error:
            no_grid = str(error)
            warnings.warn(no_grid, HookedVLMWarning, stacklevel=callers_level())
        warn_if_resized(grid for row in grids for grid in row)
    tokenizer = getattr(processor, "tokenizer", processor)
    known = placeholder_ids(finder.model.hf_model)
    return Inputs(made, grids, prompts, tokenizer, no_grid, known)


def processed(
    finder: GridFinder,
    by_prompt: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    system: str | None,
    chat: bool,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Returns the processor's tensors on the model's device, and the prompts."""
    model, options = finder.model, dict(options)
    processor = model.processor
    prompts = [
        chat_prompt(processor, text, len(i), system) if chat else _plain(finder, text, len(i))
        for text, i in zip(texts, by_prompt, strict=True)
    ]
    _check_placeholders(processor, prompts, by_prompt)
    # A chat template may begin with the token that the tokenizer would add again.
    bos = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    if bos and prompts[0].startswith(bos):
        options.setdefault("add_special_tokens", False)
    if len(prompts) > 1:
        options.setdefault("padding", True)
        options.setdefault("padding_side", "left")
    made = model_inputs(model, prompts, by_prompt, options)
    made |= padded_positions(model, made)
    say_padded(model, made)
    return {name: _placed(model, value) for name, value in made.items()}, prompts


def _placed(model: Wrapped, value: Any) -> Any:
    """Returns a tensor of the processor on the model's device.

    Most processors return float32, which the model's own code casts.  Llama 4's computes pixels in
    bfloat16; its model casts nothing, so that one in another dtype would not run.
    """
    if not isinstance(value, Tensor):
        return value
    if value.dtype not in (torch.bfloat16, torch.float16):
        return value.to(model.device)
    weights = (each.dtype for each in model.hf_model.parameters() if each.is_floating_point())
    return value.to(model.device, next(weights, value.dtype))


def _plain(finder: GridFinder, text: str, n_images: int) -> str:
    """Returns the text with its missing image placeholders added at the beginning."""
    if n_images and finder.placeholder is None:
        finder.placeholder = placeholder(finder.model)
    token = finder.placeholder
    return token * max(n_images - text.count(token), 0) + text if token else text


def _check_placeholders(
    processor: Any, prompts: Sequence[str], by_prompt: Sequence[Sequence[Image.Image]]
) -> None:
    for i, (prompt, images) in enumerate(zip(prompts, by_prompt, strict=True)):
        for token in placeholders(processor):
            if prompt.count(token) > len(images):
                raise DataError(
                    f"Prompt {i} has {counted(prompt.count(token), 'image placeholder')} ({token}) "
                    f"for {counted(len(images), 'image')}. Give as many images, or write the "
                    "text without placeholders: they are added at its beginning."
                )


def _images_by_prompt(images: Images, n_prompts: int) -> list[list[Image.Image]]:
    if not n_prompts:
        raise DataError("No prompt was given: texts is empty. Give at least one text.")
    if images is None:
        return [[] for _ in range(n_prompts)]
    if not isinstance(images, list | tuple):
        images = [images]
    if n_prompts == 1 and not any(isinstance(image, list | tuple) for image in images):
        images = [list(images)]
    if len(images) != n_prompts:
        raise DataError(
            f"Got {counted(len(images), 'entry', 'entries')} in images for "
            f"{counted(n_prompts, 'prompt')}. Give each prompt one image, a list of images, or "
            "None."
        )
    nested = [list(row) if isinstance(row, list | tuple) else [row] for row in images]
    return [[to_pil(image) for image in row if image is not None] for row in nested]


def to_pil(image: OneImage) -> Image.Image:
    """Returns a PIL image, `[height, width, 3]` array or `[3, height, width]` tensor as RGB.

    Integers must be in 0..255 and floats in 0..1; raises `DataError` for anything else.
    """
    if isinstance(image, Image.Image) and image.mode in _DEEP:
        image = _deep(image)
    if isinstance(image, Image.Image):
        return _loaded(image)
    given = image
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # numpy has no bfloat16
        if image.ndim == 3 and image.shape[0] in (1, 3):
            image = image.permute(1, 2, 0)
        image = image.numpy()
    if (
        not isinstance(image, np.ndarray)
        or image.ndim not in (2, 3)
        or image.shape[2:] not in ((), (1,), (3,))
        or not image.size
    ):
        shape = getattr(given, "shape", None)
        shaped = f" and shape {tuple(shape)}" if shape is not None else ""
        is_path = isinstance(given, str | PathLike)
        opened = " Open a file first: PIL.Image.open(path)." if is_path else ""
        raise DataError(
            f"An image of type {type(given).__name__}{shaped} was given; expected a PIL image, an "
            f"array [height, width, 3] or a tensor [3, height, width].{opened}"
        )
    image = image.reshape(*image.shape[:2]) if image.shape[2:] == (1,) else image
    is_float = np.issubdtype(image.dtype, np.floating)
    if not is_float and not np.issubdtype(image.dtype, np.integer):
        raise DataError(
            f"An image of {image.dtype} was given; expected integers in 0..255 or floats in 0..1."
        )
    low, high, most = image.min(), image.max(), 1 if is_float else 255
    if not (low >= 0 and high <= most):
        raise DataError(
            f"An image of {image.dtype} has values from {low:.3g} to {high:.3g}; expected 0..1 for "
            "floats and 0..255 for integers."
        )
    image = (image * 255).round() if is_float else image
    return Image.fromarray(image.astype(np.uint8)).convert("RGB")


_DEEP = ("F", "I", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of more than 8 bits, which PIL's own conversion to RGB cuts off at 255."""


def _deep(image: Image.Image) -> np.ndarray:
    """Returns a picture of 16 bits, or of floats in 0..1, as an array of floats in 0..1."""
    values = np.asarray(image)
    if image.mode == "F":
        return values
    if image.mode == "I" and not 255 < values.max() <= 65535:
        raise DataError(
            f"An image of mode I with values up to {values.max()} was given; expected 16 bits (up "
            "to 65535). Give an array: integers in 0..255 or floats in 0..1."
        )
    return values.astype(np.float32) / 65535


def _loaded(image: Image.Image) -> Image.Image:
    """Returns a PIL image as RGB; raises `DataError` for a damaged file and for no pixels."""
    if 0 in image.size:
        raise DataError(f"An image of {image.width}x{image.height} px was given; it has no pixels.")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        file = getattr(image, "filename", "")
        raise DataError(
            f"The image{f' of the file {str(file)!r}' if file else ''} cannot be read: "
            f"{str(error)[:120]}. Replace the file."
        ) from None


def say_padded(model: Wrapped, made: Mapping[str, Any]) -> None:
    """Warns when padding changes results because positions count from the padding's start."""
    mask = made.get("attention_mask" if "input_ids" in made else "decoder_attention_mask")
    if mask is None or bool(mask.all()) or _is_rotary(model):
        return
    tables = [
        module
        for name, module in model.hf_model.named_modules()
        if re.search("pos", name.rpartition(".")[2]) and isinstance(module, nn.Embedding)
    ]
    knows = r"attention_mask|padding_idx"
    own = [type(table).forward for table in tables if type(table) is not nn.Embedding]
    if any(re.search(knows, forward_source(function)) for function in own):
        return
    warnings.warn(
        f"{type(model.hf_model).__name__} counts positions from the start of the padding, so "
        "prompts of different lengths in one batch change each other's results. Give prompts of "
        "one length, or one at a time.",
        HookedVLMWarning,
        stacklevel=callers_level(),
    )


def _is_rotary(model: Wrapped) -> bool:
    attention = model.anatomy.lm.attention
    return attention is None or attention.rotary


def padded_positions(model: Wrapped, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns position ids that count from each prompt's first token, where padding needs them.

    By default transformers counts positions from the start of the padding.  Its M-RoPE models
    and models with a table of positions count from the mask, so they need no position ids.
    """
    hf_model, rotary = model.hf_model, _is_rotary(model)
    mask = made.get("attention_mask") if "input_ids" in made else None  # else a mask of patches
    base = getattr(hf_model, "base_model", hf_model)
    if mask is None or bool(mask.all()) or not rotary or hasattr(base, "get_rope_index"):
        return {}
    if "mrope" in str(getattr(hf_model, "config", "")):
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} gives image tokens positions in several axes (M-RoPE) and "
            "has no get_rope_index() that computes them, so prompts of different lengths cannot "
            "be padded into one batch. Give prompts of one length, or one at a time."
        )
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
