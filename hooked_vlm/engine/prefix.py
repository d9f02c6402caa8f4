"""The clean run's keys and values before those of rows, as a block's key-value cache."""

from typing import Any

from torch import Tensor


class Prefix:
    """The clean keys and values of the tokens before the rows', for every job."""

    def __init__(self, key: Tensor, value: Tensor, n_jobs: int) -> None:
        """Takes keys and values `[row, head, pos, d]` of one job's rows."""
        self.key, self.value, self.n_jobs = key, value, n_jobs

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns the rows' keys and values after the clean run's."""
        return self._clean_then(self.key, key), self._clean_then(self.value, value)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """How many tokens come before."""
        return self.key.shape[2]

    def _clean_then(self, clean: Tensor, own: Tensor) -> Tensor:
        front = clean.to(own.device)
        n_rows, n_before = len(front), front.shape[2]
        # Attention takes one tensor, so each job has a copy, but of those of the clean run's only
        # one is written: expanded to all jobs and concatenated they would be copied twice.
        sizes = (own.shape[1], n_before + own.shape[2], own.shape[3])
        whole = own.new_empty(self.n_jobs * n_rows, *sizes)
        whole.unflatten(0, (self.n_jobs, n_rows))[:, :, :, :n_before] = front
        whole[:, :, n_before:] = own
        return whole
