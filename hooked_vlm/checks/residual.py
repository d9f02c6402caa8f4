"""Verifies that the parts of a block sum to the change of its residual stream."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.hooks.names import site_path
from hooked_vlm.hooks.patch_order import listed


class BlockSums:
    """The activations of one block, and the checks of their sums."""

    def __init__(self, cache: Mapping[str, Any], prefix: str) -> None:
        self.cache, self.prefix = cache, prefix

    def get(self, name: str) -> Any:
        return self.cache.get(f"{self.prefix}{name}")

    def sums(self) -> Iterator[str]:
        """Yields each wrong sum of a block, or `"scaled …"` for a part scaled by features."""
        pre, mid, post = (self.get(f"resid_{place}") for place in ("pre", "mid", "post"))
        attn, cross, mlp = (self.get(f"{part}_out") for part in ("attn", "cross_attn", "mlp"))
        if cross is not None or pre is None or post is None:
            return
        if mid is not None and attn is not None and not _alike(mid, attn):  # attention in windows
            pre, mid, attn = mid, None, None
        if mid is not None and attn is not None:
            yield from self._sum("attn_out", mid, pre, attn)
            pre, attn = mid, None
        if attn is not None and mlp is not None:
            if not _close(_add(_add(pre, attn), mlp), post):
                yield from self._sum("mlp_out", post, _add(pre, attn), mlp)
        elif mlp is not None or attn is not None:
            yield from self._sum("mlp_out", post, pre, mlp if attn is None else attn)

    def _sum(self, part: str, whole: Any, start: Any, added: Any) -> Iterator[str]:
        if _close(_add(start, added), whole):
            return
        if _proportional(whole, start, added):
            stack = "vision" if site_path(self.prefix).is_vision else "LM"
            yield f"scaled on the way into the {stack}'s residual"
        else:
            yield f"{self.prefix.removesuffix('.hook_')}: {part} is not what the residual gains"


def same(a: Any, b: Any) -> bool:
    """Whether two activations are equal, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(listed(a), listed(b), strict=True))


def _add(a: Any, b: Any) -> list[Tensor]:
    """Returns sums; unequal shapes give an empty tensor, which equals no activation."""
    pairs = zip(listed(a), listed(b), strict=True)
    return [x + y if x.shape == y.shape else x.new_zeros(0) for x, y in pairs]


def _alike(a: Any, b: Any) -> bool:
    return [x.shape for x in listed(a)] == [y.shape for y in listed(b)]


def _close(a: Any, b: Any) -> bool:
    pairs = list(zip(listed(a), listed(b), strict=True))
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-5, rtol=1e-5) for x, y in pairs)


def _proportional(whole: Any, start: Any, added: Any) -> bool:
    """Whether the change of the residual is `added` times one factor for each feature."""
    for w, s, a in zip(listed(whole), listed(start), listed(added), strict=True):
        if w.shape != s.shape or w.shape != a.shape:
            return False
        gained, a = (w - s).flatten(0, -2), a.flatten(0, -2)
        factor = (gained * a).sum(0) / (a * a).sum(0).clamp(min=1e-20)
        if not torch.allclose(gained, factor * a, atol=1e-3, rtol=1e-2):
            return False
    return True
