"""Where the parts of a transformers model are, for tools that know modules and no names.

Qwen's encoders are `visual`, the others' `vision_tower`; the language model and its blocks have
the same path in every family that is timed.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


VISION = (
    "visual.blocks",
    "vision_tower.encoder.layers",
    "vision_tower.vision_model.encoder.layers",
)


def vision_path(hf_model: Any) -> str:
    """Returns the path of the vision encoder's blocks in `hf_model.model`."""
    for path in VISION:
        try:
            hf_model.model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ValueError(f"No vision encoder at any of {VISION}.")


def n_vision_read(hf_model: Any) -> int:
    """Returns how many blocks of the vision encoder the language model gets to see.

    LLaVA reads what the last block but one gave, and the last one does nothing.
    """
    n_blocks = len(hf_model.model.get_submodule(vision_path(hf_model)))
    layer = getattr(hf_model.config, "vision_feature_layer", -1)
    return layer if layer >= 0 else n_blocks + 1 + layer


def patch_rows(family: str, side: int) -> Tensor:
    """Returns `[token, row]`: the encoder's rows of one image that visual tokens are made from.

    Tokens are `side` x `side` in raster order.  Qwen2-VL has the four rows of a token next to
    one another, Qwen2.5-VL as well but by windows of 4 x 4 tokens, Gemma 3 pools squares of a
    raster, and in LLaVA a token is a row, after that of CLIP's class.
    """
    n_tokens = side * side
    if family == "llava":
        return 1 + torch.arange(n_tokens)[:, None]
    if family == "gemma-3":
        raster = torch.arange(4 * n_tokens).reshape(side, 2, side, 2)
        return raster.transpose(1, 2).reshape(n_tokens, 4)
    rows = torch.arange(4 * n_tokens).reshape(n_tokens, 4)
    if family == "qwen2-vl":
        return rows
    if side % 4:
        raise ValueError(f"{side} tokens a side are no whole number of windows of 4.")
    by_window = torch.arange(n_tokens).reshape(side // 4, 4, side // 4, 4).transpose(1, 2)
    return rows[by_window.flatten().argsort()]


def pixels(inputs: Any) -> dict[str, Tensor]:
    """Returns those of the inputs that the vision encoder takes."""
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}


class _Reached(Exception):  # noqa: N818 - no error: the pass ends here
    pass


def merged(hf_model: Any, inputs: Any, questions: int = 1) -> dict[str, Any]:
    """Returns what the language model is called with, vision encoded and merged in.

    Prompts of several questions about the same images come question by question; then images are
    encoded for the first question, and merged into the prompts of all.
    """
    if questions == 1:
        return _merged(hf_model, inputs)
    owner, batch = hf_model.model, len(inputs["input_ids"])
    encode, encoded = owner.get_image_features, []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not encoded:
            encoded.append(encode(*args, **kwargs))
        return copy.copy(encoded[0])  # its fields may be replaced

    owner.get_image_features = once
    try:
        parts = []
        for i in range(questions):
            own = {name: x.chunk(questions)[i] for name, x in inputs.items()}
            parts.append(_merged(hf_model, own))
    finally:
        del owner.get_image_features
    return pytree.tree_map(partial(_joined, batch=batch // questions), *parts)


def _joined(*parts: Any, batch: int) -> Any:
    """Returns tensors along the axis of prompts; Qwen's positions have it second."""
    if not isinstance(parts[0], Tensor) or batch not in parts[0].shape[:2]:
        return parts[0]
    return torch.cat(parts, dim=0 if parts[0].shape[0] == batch else 1)


def _merged(hf_model: Any, inputs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.update(kwargs)
        raise _Reached

    handle = hf_model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        hf_model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found


def split_heads(z: Tensor, n_heads: int) -> Tensor:
    """Returns `[batch, pos, head, d_head]` of what an attention's output map reads."""
    return z.unflatten(-1, (n_heads, z.shape[-1] // n_heads))


def twin(hf_model: nn.Module) -> Any:
    """Returns a model of modules of its own with the same weights in them.

    Tools put hooks and modules of theirs into a model, and transformers leaves hooks in one
    that it has once collected hidden states from.  Nobody pays for another's.
    """
    return copy.deepcopy(hf_model, {id(p): p for p in hf_model.parameters()})
