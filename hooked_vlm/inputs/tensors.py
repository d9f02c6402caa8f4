"""Inputs that no model can run: refused by what they are, before a run.

torch and transformers would report them from inside the model, in words about their own
arithmetic, or, on a GPU, after the kernel has failed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.caches import PROMPTS, caches_among
from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import HookedVLMError, HookError, counted
from hooked_vlm.inputs.rows import placeholder_ids, prompt_shape


_MASKS = ("attention_mask", "decoder_attention_mask")
_PIXELS = "pixel_values"
_NOT_INTEGERS = (torch.bool, torch.uint8)


def require_tensors(hf_model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises `HookError` for a prompt, a mask or pixels that the model cannot take.

    That is: no tensor, one of another layout, without values or of other axes, tokens that are
    no integers or not in the vocabulary, and masks of other prompts.
    """
    for name, value in inputs.items():
        has_pixels = str(name).startswith(_PIXELS)
        if value is None or not (has_pixels or name in PROMPTS or name in _MASKS):
            continue
        if not isinstance(value, Tensor):
            if not _may_be(name, value):
                raise HookError(
                    f"inputs[{name!r}]={shown(value)} was given; expected a tensor. Use "
                    "prepare(images, texts), or torch.as_tensor."
                )
            continue
        require_usable(f"inputs[{name!r}]", value, hf_model)
        if has_pixels and not (value.ndim and value.numel()):
            raise HookError(f"inputs[{name!r}] of shape {tuple(value.shape)} holds no image.")
        if name.endswith("input_ids"):
            _require_tokens(hf_model, name, value, "inputs_embeds" in inputs)
    _require_masks(inputs)


def _may_be(name: str, value: Any) -> bool:
    """Whether an entry may be no tensor: images of several sizes, and masks by kind of layer."""
    if name.startswith(_PIXELS):
        return (
            isinstance(value, list | tuple)
            and len(value) > 0
            and all(isinstance(part, Tensor) or _may_be(name, part) for part in value)
        )
    if name not in _MASKS or not isinstance(value, Mapping):
        return False
    # A compiled mask of flex attention is no tensor.
    plain = str | bytes | int | float | complex | list | tuple | Mapping
    return bool(value) and not any(isinstance(mask, plain) for mask in value.values())


def require_usable(
    what: str, value: Tensor, hf_model: nn.Module, error: type[HookedVLMError] = HookError
) -> None:
    """Raises an error for a sparse tensor, and for one without values beside a real model."""
    if value.layout != torch.strided:
        raise error(f"{what} is sparse ({value.layout}). Give its to_dense().")
    if value.is_meta and not any(parameter.is_meta for parameter in hf_model.parameters()):
        raise error(
            f"{what} is on the meta device, where tensors have no values. Give it on the model's "
            "device."
        )


def _require_tokens(hf_model: nn.Module, name: str, ids: Tensor, has_embeds: bool) -> None:
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype in _NOT_INTEGERS)
    if ids.ndim != 2 or not integers or not (ids.numel() or has_embeds):
        raise HookError(
            f"inputs[{name!r}] is a tensor of {str(ids.dtype).removeprefix('torch.')} of shape "
            f"{tuple(ids.shape)}; expected token ids [batch pos], of integers, with one prompt or "
            "more."
        )
    rows = _vocabulary(hf_model)
    if rows is None or ids.device.type != "cpu":  # a GPU would have to be waited for
        return
    outside = (ids < 0) | (ids >= rows)
    if bool(outside.any()):
        # Tokens that stand for images need not be in the vocabulary.
        known = torch.tensor(placeholder_ids(hf_model), dtype=ids.dtype)
        outside &= ~torch.isin(ids, known)
        if bool(outside.any()):
            raise HookError(
                f"inputs[{name!r}] holds {int(ids[outside][0])}, which is no token: the model "
                f"embeds 0 to {rows - 1}. Use the model's own tokenizer."
            )


def _vocabulary(hf_model: nn.Module) -> int | None:
    """Returns how many tokens a model embeds (None: unknown)."""
    try:
        found = hf_model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):  # an encoder, or remote code
        return None
    return found.num_embeddings if isinstance(found, nn.Embedding) else None


def _require_masks(inputs: Mapping[str, Any]) -> None:
    for name in _MASKS:
        mask = inputs.get(name)
        part = name.removesuffix("attention_mask")
        own = {n: v for n, v in inputs.items() if n in (f"{part}input_ids", f"{part}inputs_embeds")}
        shape = prompt_shape(own)
        if not isinstance(mask, Tensor) or shape is None:
            continue
        batch, length = shape
        by_key = mask.ndim == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
        by_position = mask.ndim == 2 and len(mask) in (1, batch) and mask.shape[1] >= length
        if not (by_key or by_position) or mask.is_complex():
            raise _unfit(name, mask, batch, length)


def require_as_long(given: Mapping[str, Any]) -> None:
    """Raises `HookError` for a mask of more positions than the prompt, without a cache of them."""
    if caches_among((), given):
        return
    shape, mask = prompt_shape(given), given.get("attention_mask")
    if "decoder_input_ids" in given or shape is None or not isinstance(mask, Tensor):
        return
    if mask.ndim == 2 and mask.shape[1] > shape[1]:
        raise _unfit("attention_mask", mask, *shape)


def _unfit(name: str, mask: Tensor, batch: int, length: int) -> HookError:
    return HookError(
        f"inputs[{name!r}] is a tensor of {str(mask.dtype).removeprefix('torch.')} of shape "
        f"{tuple(mask.shape)}, and there {'is' if batch == 1 else 'are'} "
        f"{counted(batch, 'prompt')} of {counted(length, 'position')}. Give the mask that prepare "
        "returns with the prompt."
    )
