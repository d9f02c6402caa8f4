"""Muon in single precision, all matrices of one shape at once.

torch's own Muon iterates in bfloat16, one matrix after the other.  A CPU without instructions for
bfloat16 emulates it, and took half of a training step for it.  The update is the same; a test holds
the two against each other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as in torch."""
ITERATIONS = 5
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose update has singular values near one (Jordan 2024), with weight decay.

    Its states have the names of `torch.optim.Muon`.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        """Takes matrices alone; raises `ValueError` for anything else."""
        matrices = list(matrices)
        if wrong := [tuple(p.shape) for p in matrices if p.ndim != 2]:
            raise ValueError(f"Muon takes matrices. These have other shapes: {wrong}")
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Changes the matrices that have a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute gradients before the step.")
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weights in group["params"]:
                if weights.grad is not None:
                    alike[weights.shape].append(weights)
            for shape, matrices in alike.items():
                updates = orthogonal(torch.stack([self._update(p, group) for p in matrices]))
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for weights, update in zip(matrices, updates, strict=True):
                    weights.mul_(1 - group["lr"] * group["weight_decay"])
                    weights.add_(update, alpha=-rate)

    def _update(self, weights: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Returns the gradient after Nesterov's momentum."""
        gradient = weights.grad
        assert gradient is not None
        state = self.state[weights]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        held = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(held, group["momentum"])


def orthogonal(
    matrices: Float[Tensor, "matrix rows columns"],
) -> Float[Tensor, "matrix rows columns"]:
    """Returns matrices with the same singular vectors and singular values near one."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    # The largest singular value must be at most one.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
