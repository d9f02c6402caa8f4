"""A norm as a linear map at a scale of its own: how parts of a stream pass through it.

LayerNorm and RMSNorm divide a stream by one number for each position.  With that number kept as
it was in a run, all that is left is linear, so the parts of the stream can be followed through.
Gain, bias and centring are measured on the module itself: some models keep the gain as `1 + w`,
some have none, and their classes have many names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


_SIZE = 256.0
"""Size of the probing rows, beside which the norm's epsilon is nothing."""
_TOLERANCE = 1e-3
"""Allowed error of a probed row, as a share of its largest value (weights may be bfloat16)."""


@dataclass(frozen=True, eq=False)
class LinearNorm:
    """`gain * (x - mean(x)) / scale + bias`, with the mean left out where nothing is centred."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool

    @classmethod
    @torch.no_grad()
    def measured(
        cls, norm: Callable[[Tensor], Tensor], width: int, device: torch.device
    ) -> "LinearNorm | None":
        """Returns the map that a norm is at a fixed scale, or None for anything else.

        `norm` takes `[row, d_model]` in float32.
        """
        draw = torch.Generator().manual_seed(0)
        x = (_SIZE * torch.randn(4, width, generator=draw)).to(device)
        bias = norm(torch.zeros_like(x))[0].double()
        y, moved, doubled = (norm(rows).double() - bias for rows in (x, x + _SIZE, 2 * x))
        size = float(y.abs().max())
        if not size or not float((doubled - y).abs().max()) <= _TOLERANCE * size:
            return None  # an identity, or another function than a norm
        centred = float((moved - y).abs().max()) <= _TOLERANCE * size
        unit = _centred(x.double(), centred)
        unit = unit / unit.pow(2).mean(-1, keepdim=True).sqrt()
        gain = (y * unit).sum(0) / (unit * unit).sum(0)
        if not float((gain * unit - y).abs().max()) <= _TOLERANCE * size:
            return None
        return cls(gain, bias, centred)

    def scale(
        self, x: Float[Tensor, "*pos d_model"], y: Float[Tensor, "*pos d_model"]
    ) -> Float[Tensor, "*pos 1"]:
        """Returns the number by which the norm divided each position of `x` to give `y`."""
        inner = self.gain * _centred(x.double(), self.centred)
        gained = (inner * (y.double() - self.bias)).sum(-1, keepdim=True)
        return torch.where(gained > 0, (inner * inner).sum(-1, keepdim=True) / gained, 1.0)

    def through(
        self, parts: Float[Tensor, "*part d_model"], scale: Float[Tensor, "*pos 1"]
    ) -> Float[Tensor, "*part d_model"]:
        """Returns what parts of the stream become, without the bias: it belongs to none."""
        return self.gain * _centred(parts.double(), self.centred) / scale


def _centred(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x
