"""Runs in turns, for as long as there is time, and how far their answers are apart."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.given import Given
from benchmarks.throughput.measure import timed


MARGIN = 2.0
"""Seconds that a part keeps for coming to its end."""
ENOUGH = 5
"""Turns after which a median is good enough."""


@dataclass
class Turns:
    """Seconds and answers by name."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many turns were timed."""
        return min(map(len, self.seconds.values()))

    def median(self, name: str) -> float:
        """Returns the median of one's seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, above: str, below: str) -> float:
        """Returns the median over turns of two's seconds, one divided by the other."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def apart(self, one: str, other: str) -> float:
        """Returns the largest difference of two's answers, as a share of the largest."""
        return apart(self.answers[one], self.answers[other])


def in_turns(
    given: Given,
    runs: Mapping[str, Callable[[], Tensor]],
    seconds: float,
    most: int = ENOUGH,
    *,
    warm: bool = True,
) -> Turns:
    """Returns what runs took, each once in a turn, and the order reversed in every second one.

    With `warm` a first turn is not counted.  Turns are made until so many seconds are spent or
    there are `most`; the first one always, unless a turn takes longer than the part has left.
    """
    found = Turns({name: [] for name in runs})
    took, until = 0.0, given.left - seconds
    for turn in range(-1 if warm else 0, 1 if given.tiny else most):
        began = given.left
        if began < 1.2 * took + MARGIN or (turn > 0 and began < until):
            break
        for name in runs if turn % 2 == 0 else list(runs)[::-1]:
            spent, found.answers[name] = timed(runs[name])
            if turn >= 0:
                found.seconds[name].append(spent)
        took = began - given.left
        if turn < 0:
            until = given.left - seconds
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference, as a share of the second's largest; NaN where one has it."""
    a, b = one.double().cpu(), other.double().cpu()
    return float((a - b).abs().max() / b.abs().max())


def peak(run: Callable[[], object]) -> tuple[int, int]:
    """Returns the most bytes that a run on a GPU takes beside what was there, and reserves."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
