"""`Generated`: the tokens of an answer, as a place for interventions in generations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Whole
from hooked_vlm.errors import RegionError
from hooked_vlm.regions.positions import PromptRow, _Joinable


@checked(RegionError)
@dataclass(frozen=True)
class Generated(_Joinable):
    """The tokens that a generation adds to the prompt: numbers `first` to `last`, from 0 on.

    `last=None` is all that follow.  Token 0 is the first new one.  It is predicted at the prompt's
    last token, and computed in the next pass (`hook.step` 1), so an edit there changes token 1 and
    those after it.  `LastToken() | Generated()` is both.

    >>> Generated(first=1, last=2).index(held=range(10, 16), end=11)
    [2, 3]
    """

    first: Whole = 0
    last: Whole | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < self.first:
            raise RegionError(
                f"Generated(first={self.first}, last={self.last}) names no token. Give a last of "
                f"{self.first} or more, or None for all that follow."
            )

    @checked(RegionError)
    def positions(self, _where: PromptRow) -> Int[Tensor, " 0"]:
        """Returns no position: none of the prompt's tokens is generated."""
        return torch.empty(0, dtype=torch.long)

    def index(self, held: range, end: int) -> list[int]:
        """Returns which of the positions `held` are these tokens, where the prompt ends at `end`.

        The result counts from the first position held.
        """
        start = end + self.first
        stop = held.stop if self.last is None else min(end + self.last + 1, held.stop)
        return [position - held.start for position in range(max(start, held.start), stop)]

    def __str__(self) -> str:
        if self.last is None:
            return f"generated tokens from {self.first} on" if self.first else "generated tokens"
        return f"generated tokens {self.first} to {self.last}"


def generated_in(place: Any) -> tuple[Generated, ...]:
    """Returns the parts of a place that are generated tokens."""
    parts: Iterable[Any] = getattr(place, "parts", None) or (place,)
    return tuple(part for part in parts if isinstance(part, Generated))
