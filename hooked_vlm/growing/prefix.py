"""Keys and values of the clean run, in front of those of rows that carry a suffix.

Both classes stand where transformers' blocks expect a key-value cache, and answer the one
call that attention modules make of it.
"""

from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Notes the keys and values that a block makes, and hands them back as they are."""

    def __init__(self, last: int | None = None) -> None:
        """Notes the positions in front of `last`; all, where there is none."""
        self.last = last
        self.found: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with `[batch, head, pos, d]`."""
        self.found.append((self._kept(key), self._kept(value)))
        return key, value

    def _kept(self, x: Tensor) -> Tensor:
        x = x.detach()
        # A copy: a view would keep all of it.
        return x if self.last is None else x[:, :, : self.last].clone()

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing has come before."""
        return 0


class Prefix:
    """The clean keys and values of the positions in front of the rows', for every job."""

    def __init__(self, key: Tensor, value: Tensor, start: int, n_jobs: int) -> None:
        self.key, self.value, self.start, self.n_jobs = key, value, start, n_jobs

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns the rows' keys and values behind the clean run's."""
        return self._behind(self.key, key), self._behind(self.value, value)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """How many positions stand in front."""
        return self.start

    def _behind(self, clean: Tensor, own: Tensor) -> Tensor:
        front = clean[:, :, : self.start].to(own.device)
        front = front.expand(self.n_jobs, *front.shape).flatten(0, 1)
        return torch.cat([front, own], dim=2)
