"""What an answer names: the right end, the other end, the reference, or nothing in the picture.

A loss of order shows as the other end; a loss of names as a thing that is not in the picture.
Accuracy alone counts both as the same.  The question names the reference, so of an answer without
any order one of two ends is right: given that an end was named, chance is 1/2 and not 1/3.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.stimuli.pairs import Question


KINDS = ("right", "other end", "reference", "not in the picture")
"""What an answer may name."""
ORDER = "order, given an end"
"""Quantity: the share of right answers among those that name one of the two ends."""
CHANCE = 1 / 2
"""The share of right answers among those that name an end, without any order."""
RIGHT, OTHER = 0, 1


def without_numbers(logits: Float[Tensor, "item ..."]) -> Bool[Tensor, " item"]:
    """Returns the rows in which a logit is NaN or infinitely large: they give no answer."""
    return (logits.isnan() | (logits == float("inf"))).flatten(1).any(1)


def answers_of(logits: Float[Tensor, "item d_vocab"], tokenizer: Any) -> list[str | None]:
    """Returns the most probable answer of each row; None where its logits are not numbers."""
    wrong = without_numbers(logits)
    answers = top_answer(logits.masked_fill(wrong[:, None], 0.0), tokenizer)
    return [None if bad else said for said, bad in zip(answers, wrong.tolist(), strict=True)]


def named(
    logits: Float[Tensor, "item d_vocab"], tokenizer: object, questions: Sequence[Question]
) -> Bool[np.ndarray, "item kind"]:
    """Returns which of `KINDS` the most probable answer to each question names."""
    answers = top_answer(logits, tokenizer)  # type: ignore[arg-type]
    return np.array([_kind(a, q) for a, q in zip(answers, questions, strict=True)], dtype=bool)


def _kind(answer: str, question: Question) -> list[bool]:
    ends = (question.entities[0], question.entities[2])
    other = ends[1] if question.target == ends[0] else ends[0]
    known = [answer == normalise(name) for name in (question.target, other, question.reference)]
    return [*known, not any(known)]


def picture_of(question: Any) -> str:
    """Returns the picture of a question: two questions about one picture are one observation."""
    return f"{question.axis}: {', '.join(question.entities)}"
