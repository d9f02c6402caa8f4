"""Flash Attention and FlexAttention on a CPU: their definitions in the place of the kernels."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils as masks
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flex_attention as flex

from hooked_vlm.model.vlm import HookedVLM


FLASH, FLEX = "flash_attention_2", "flex_attention"


class Flash:
    """flash_attn's functions, by their definition; what they were given is noted.

    As in flash_attn from 2.1 on, the causal mask is aligned to the last key.  There is no other
    mask; sequences of different lengths come one after the other, with their bounds.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def whole(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """`[batch, pos, head, d_head]`, as `flash_attn_func` takes them."""
        self.calls.append({"q": tuple(q.shape), "k": tuple(k.shape), "causal": causal})
        return attended(q, k, v, softmax_scale, causal, window_size)

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """`[pos, head, d_head]` of all sequences, as `flash_attn_varlen_func` takes them."""
        bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        # On a GPU what lies outside is memory of something else.
        assert bounds[0][-1] == len(q) and bounds[1][-1] == len(k) == len(v)
        self.calls.append({"q": tuple(q.shape), "bounds": bounds, "causal": causal})
        (from_q, from_k), made = bounds, torch.zeros_like(q)
        for i in range(len(from_q) - 1):
            own, seen = slice(*from_q[i : i + 2]), slice(*from_k[i : i + 2])
            parts = q[None, own], k[None, seen], v[None, seen]
            made[own] = attended(*parts, softmax_scale, causal, window_size)[0]
        return made

    def functions(self, *_: Any, **__: Any) -> Any:
        """What transformers loads of the package."""
        own = (self.whole, self.packed, None, flash._pad_input, flash._unpad_input)
        process = flash._lazy_define_process_function(self.packed)
        # Later versions unpack a second function beside it, for pages.
        is_pair = "process_paged_kwargs_fn" in inspect.getsource(flash._flash_attention_forward)
        return own, (process, dict) if is_pair else process


def attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int]
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    n, m = q.shape[2], k.shape[2]
    distance = torch.arange(n)[:, None] + m - n - torch.arange(m)  # from the last key
    seen = torch.ones(n, m, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window[0] >= 0:
        seen &= distance <= window[0]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@contextmanager
def attending(model: HookedVLM, name: str) -> Iterator[tuple[HookedVLM, Flash]]:
    """A copy of a model that attends by another implementation, for the length of a block."""
    kernels = Flash()
    hf: Any = deepcopy(model.hf_model)
    with (
        patch.object(flash, "lazy_import_flash_attention", kernels.functions),
        patch.object(flex, "compile_friendly_flex_attention", _interpreted),
        patch.object(masks, "create_block_mask", _interpreted_mask),
    ):
        # `set_attn_implementation` asks for flash_attn, which is not there.
        hf.config._attn_implementation = name
        yield HookedVLM(hf), kernels


def _interpreted(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **how: Any):
    return flex_attention(query, key, value, **how)


def _interpreted_mask(*args: Any, _compile: bool = False, **how: Any) -> Any:
    return create_block_mask(*args, **how)
