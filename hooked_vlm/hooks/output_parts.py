"""What single heads and neurons add to a residual stream, up to the stream.

The output of attention is a sum over heads, that of an MLP a sum over neurons.  Before it reaches
the stream a model may normalise it (Gemma), or scale it.  Each piece is followed through that at
the run's own scale, and the pieces are compared with what was added.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import DataError
from hooked_vlm.hooks.linear_norm import LinearNorm


_ENOUGH = 8
"""Positions from which on one factor for each feature is determined beyond doubt."""


@dataclass(frozen=True, eq=False)
class Summands:
    """How a part's output is summed: a linear map, and the norm after it, if there is one."""

    apply: Callable[[Tensor], Tensor]
    """The map, from all heads' (or neurons') values to the part's output."""
    norm: LinearNorm | None = None
    normed: Callable[[Tensor], Tensor] | None = None

    def of_heads(self, z: Float[Tensor, "*pos head d_head"]) -> Float[Tensor, "head *pos d_model"]:
        """Returns what the map makes of each head's values, without its bias."""
        bias = self.bias(z.flatten(-2))
        pieces = []
        for head in range(z.shape[-2]):
            alone = torch.zeros_like(z)
            alone[..., head, :] = z[..., head, :]
            pieces.append((self.apply(alone.flatten(-2)) - bias).double())
        return torch.stack(pieces)

    def of_neurons(
        self, post: Float[Tensor, "*pos d_mlp"], chosen: list[int]
    ) -> Float[Tensor, "neuron *pos d_model"]:
        """Returns what the map makes of chosen neurons, without its bias."""
        index = torch.tensor(chosen, device=post.device)
        ones = torch.nn.functional.one_hot(index, post.shape[-1]).to(post.dtype)
        rows = (self.apply(ones) - self.bias(ones)).double()
        return torch.einsum("...n,nd->n...d", post[..., index].double(), rows)

    def bias(self, values: Float[Tensor, "*pos values"]) -> Float[Tensor, "*pos d_model"]:
        """Returns what the map gives for zeros."""
        return self.apply(torch.zeros_like(values))

    def to_stream(
        self, values: Float[Tensor, "*pos values"], added: Float[Tensor, "*pos d_model"], name: str
    ) -> "ToStream":
        """Returns what lies between the map's output and the stream in a run.

        Raises `DataError` where no norm at a fixed scale and no factor lead from one to the other.
        """
        whole, scale = self.apply(values).double(), None
        if whole.shape != added.shape:
            raise _no_sum(name, f"heads or neurons have shape {tuple(whole.shape)}", added)
        if self.norm is not None and self.normed is not None:
            scale = self.norm.scale(whole, self.normed(whole.float()))
            whole = self.norm.through(whole, scale) + self.norm.bias
        factor = _factor(whole, added)
        if factor is None:
            raise _no_sum(name, "what comes after is no norm or factor", added)
        return ToStream(self.norm, scale, factor)


@dataclass(frozen=True, eq=False)
class ToStream:
    """What lies between a part's output and the stream: a norm at a fixed scale, and a factor."""

    norm: LinearNorm | None
    scale: Float[Tensor, "*pos 1"] | None
    factor: Tensor

    def through(
        self, pieces: Float[Tensor, "piece *pos d_model"], at: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "piece *pos d_model"]:
        """Returns pieces as they are added to the stream; `at` selects their positions."""
        if self.norm is not None and self.scale is not None:
            pieces = self.norm.through(pieces, at(self.scale))
        return pieces * (at(self.factor) if self.factor.ndim else self.factor)


def _factor(whole: Tensor, added: Tensor) -> Tensor | None:
    """Returns what `whole` is multiplied by to give `added`: one number, or one a feature."""
    target = added.double()
    if _alike(whole, added):
        return whole.new_ones(())
    # Where nothing is added, the model masks the part.
    added_at = (added != 0).any(-1, keepdim=True).to(whole.dtype)
    whole = whole * added_at
    one = (whole * target).sum() / (whole * whole).sum().clamp(min=1e-300)
    if _alike(one * whole, added):
        return one * added_at
    rows, gains = whole.flatten(0, -2), target.flatten(0, -2)
    if len(rows) < _ENOUGH:
        return None
    each = (rows * gains).sum(0) / (rows * rows).sum(0).clamp(min=1e-300)
    return each * added_at if _alike(each * whole, added) else None


def _alike(found: Tensor, added: Tensor) -> bool:
    """Whether a sum is what was added, within the rounding of the dtype of what was added."""
    size = torch.maximum(found.abs(), added.abs()).amax(-1, keepdim=True)
    return bool(((found - added).abs() <= rounding(added.dtype) * size).all())


def rounding(dtype: torch.dtype) -> float:
    """Returns by how much sums of a dtype may differ, as a share of the largest value of a row.

    >>> rounding(torch.float32), rounding(torch.bfloat16)
    (2e-05, 0.03125)
    """
    return max(2e-5, 4 * torch.finfo(dtype).eps)


def _no_sum(name: str, what: str, added: Tensor) -> DataError:
    return DataError(
        f"The pieces of {name} do not sum to what is added to the stream ({tuple(added.shape)}): "
        f"{what}. A hook may have written there. Use decompose_resid(), or the activations of "
        "single heads, cache['z', layer]."
    )
