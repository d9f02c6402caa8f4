"""Attention masks that are no tensors: none at all (Flash Attention), and FlexAttention's."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn


_MADE: WeakKeyDictionary[Any, tuple[tuple[int, ...], Any]] = WeakKeyDictionary()
"""The mask that was last made of a model's own: all blocks of a pass are given the same."""


def is_block_mask(value: Any) -> bool:
    """Whether a value is FlexAttention's `BlockMask`, which holds a function instead of numbers."""
    return callable(getattr(value, "mask_mod", None))


def is_causal_alone(block: nn.Module) -> bool:
    """Whether a block attends to earlier positions without a mask, however many keys there are.

    Flash Attention takes no mask over queries and keys; its own is aligned to the last key, so the
    rows' positions see what they see in a whole prompt.
    """
    configs = (getattr(module, "config", None) for module in block.modules())
    names = (getattr(config, "_attn_implementation", None) for config in configs)
    # A tapped config (`hooks.attention`) names the implementation under it.
    return any("flash" in getattr(name, "base", str(name)) for name in names)


def fitted(mask: Any, batch: int, n_jobs: int, start: int) -> Any:
    """Returns a `BlockMask` of a batch of prompts for rows of jobs, from position `start` on."""
    wanted = (batch, n_jobs, start)
    found = _MADE.get(mask)
    if found is None or found[0] != wanted:
        own = mask.mask_mod
        n_heads, n_queries, n_keys = mask.shape[-3:]
        made = _block_mask(
            lambda b, h, q, k: own(b % batch, h, q + start, k),
            (n_jobs * batch, n_heads, n_queries - start, n_keys),
            mask.kv_num_blocks,
        )
        found = _MADE[mask] = wanted, made
    return found[1]


def sees_later(mask: Any, start: int) -> bool:
    """Whether, by a `BlockMask`, a position before `start` sees one from `start` on."""
    from torch.nn.attention.flex_attention import create_mask

    own, (batch, n_heads, _, n_keys) = mask.mask_mod, mask.shape
    corner = create_mask(
        lambda b, h, q, k: own(b, h, q, k + start),
        batch,
        n_heads,
        start,
        n_keys - start,
        device=mask.kv_num_blocks.device,
    )
    return bool(corner.any())


def _block_mask(function: Any, shape: tuple[int, ...], like: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(function, *shape, device=str(like.device))
