"""Digests of a model and its processor, to notice that stored features are another's."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


SAMPLED = 1024
"""Values of each parameter that are read: a model of billions takes a second."""


def model_digest(hf_model: nn.Module) -> str:
    """Returns a digest of the names, shapes, dtypes and some values of parameters and buffers.

    With them, which adapters (PEFT) act, and how strongly.  Values are a sample at equal distances,
    so a change of single weights may go unnoticed; another checkpoint, or training, does not.
    """
    made = hashlib.blake2b(digest_size=16)
    for name, value in (*sorted(hf_model.named_parameters()), *_buffers(hf_model)):
        made.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.is_meta:
            continue
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        made.update(sample.view(torch.uint8).numpy().tobytes())
    for name, module in hf_model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            asked = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
            state = [getattr(module, each, None) for each in asked]
            made.update(f"{name} {state}".encode())
    return made.hexdigest()


def _buffers(hf_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the buffers, but for those that runs change."""
    for path, module in hf_model.named_modules():
        rope = str(getattr(module, "rope_type", ""))
        if "dynamic" in rope or "longrope" in rope:  # follows the length of the last prompt
            continue
        yield from module.named_buffers(prefix=path, recurse=False)


def processor_digest(processor: Any) -> str:
    """Returns a digest of a processor's settings: sizes, means, templates, numbers of tokens."""
    tokenizer = getattr(processor, "tokenizer", None)
    told: list[Any] = [_own_settings(processor)]
    for name in ("image_processor", "video_processor"):
        part: Any = getattr(processor, name, None)
        told.append(part.to_dict() if hasattr(part, "to_dict") else _own_settings(part))
    if tokenizer is not None:
        names = ("chat_template", "special_tokens_map", "add_bos_token", "add_eos_token")
        told.append([len(tokenizer), *(getattr(tokenizer, name, None) for name in names)])
    said = json.dumps(told, default=_without_address, sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _own_settings(part: Any) -> Any:
    """Returns the numbers, texts and lists that an object without `to_dict` of its own holds."""
    held = getattr(part, "__dict__", {})
    return {name: value for name, value in held.items() if name[0] != "_" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _without_address(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    said = str(value)
    return type(value).__name__ if " at 0x" in said else said
