"""Means and covariances of rows that come in parts, in float64."""

import torch
from torch import Tensor

from hooked_vlm.errors import DataError


class Sums:
    """The mean of rows `[row, …]`, and with `second` their covariance, of parts as they come.

    Sums are about the mean of the first part, so that a large common mean does not cancel digits.
    """

    def __init__(self, second: bool = False) -> None:
        self.n = 0
        self._second = second
        self._shift = self._first_sum = self._second_sum = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Adds rows `[row, …]`."""
        rows = rows.double()
        if not self.n:
            self._shift = rows.mean(0)
            self._first_sum = torch.zeros_like(self._shift)
            if self._second:
                width = self._shift.numel()
                self._second_sum = torch.zeros(width, width, dtype=torch.float64)
        rows = rows - self._shift
        self.n += len(rows)
        self._first_sum += rows.sum(0)
        if self._second:
            flat = rows.flatten(1)
            self._second_sum += flat.T @ flat

    def mean(self) -> Tensor:
        """Returns the mean row, in float64; raises `DataError` where there was none."""
        if not self.n:
            raise DataError("There are no rows to take a mean of.")
        return self._shift + self._first_sum / self.n

    def covariance(self) -> Tensor:
        """Returns the covariance `[d, d]` over n - 1, in float64."""
        if self.n < 2:
            raise DataError(f"A covariance needs two rows or more; there are {self.n}.")
        off = (self._first_sum / self.n).flatten()
        return (self._second_sum - self.n * torch.outer(off, off)) / (self.n - 1)
