"""Clean / counterfactual pairs, drawn exactly as in the paper (protocol 2.5).

A *tuple* has k different entity names.  `sample_tuples` draws tuples for each direction with
one random stream.  `swap_pair` (k = 3) and `final_token_pair` (k = 5) convert a tuple to two
layouts, the question for each, and the answers that distinguish the hypotheses.  Entities are
plain strings; the setting (Squares, Shapes, Objects) draws them.

In all layouts the *clean* answer is t0: left and above ask for place 0, right and below for
place 2, and the clean layout is mirrored for the latter two.  The middle entity is the
reference that both prompts name.

The model decides through `accept` which draws are kept, and thereby where a direction stops
drawing.  The draws of a later direction therefore depend on the number of draws that earlier
directions consumed, and batching must consume exactly as many as a one-by-one loop.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Seed
from hooked_vlm.errors import DataError, HookedVLMWarning, callers_level, counted, did_you_mean
from hooked_vlm.stimuli.prompts import AXIS_OF, DIRECTIONS, OPPOSITE, Direction


Layout = tuple[str, str, str]
"""The entities of places 0, 1, 2: from left to right, or from top to bottom."""

BatchFilter = Callable[[str, list[tuple[str, ...]]], Sequence[bool]]
"""(direction, tuples) -> one verdict per tuple, in order."""


@checked(DataError)
def target_place(direction: str) -> int:
    """Returns the place of a direction's answer: 0 for left and above, 2 otherwise.

    Raises:
        DataError: `direction` is none of left, right, above, below.
    """
    if direction not in DIRECTIONS:
        raise DataError(
            f"Direction {direction!r} is unknown; expected one of {', '.join(DIRECTIONS)}."
            + did_you_mean(direction, DIRECTIONS)
        )
    return 0 if direction in ("left", "above") else 2


@checked(DataError)
@dataclass(frozen=True)
class Question:
    """One image and the question about it."""

    entities: Layout
    direction: Direction

    @property
    def reference(self) -> str:
        """The entity that the prompt names: always the middle one."""
        return self.entities[1]

    @property
    def target(self) -> str:
        """The correct answer: the entity in the asked direction of the reference."""
        return self.entities[target_place(self.direction)]

    @property
    def axis(self) -> str:
        """`"horizontal"` or `"vertical"`."""
        return AXIS_OF[self.direction]

    @property
    def name(self) -> str:
        """What tells the question from all others of its setting, in words."""
        return f"{self.direction} of {self.reference}: {', '.join(self.entities)}"


@dataclass(frozen=True)
class SwapPair:
    """Two mirrored layouts under one prompt, for strip and object swaps (E4, E6)."""

    clean: Question
    counterfactual: Question

    @property
    def clean_answer(self) -> str:
        """The correct answer on the clean image, t0: nothing was transferred."""
        return self.clean.target

    @property
    def swapped_answer(self) -> str:
        """The correct answer on the counterfactual image, t2: the swap flipped the answer."""
        return self.counterfactual.target

    @property
    def questions(self) -> tuple[Question, Question]:
        """The questions that a model must answer correctly for the pair to be kept."""
        return self.clean, self.counterfactual


@dataclass(frozen=True)
class FinalTokenPair:
    """Two images with questions in opposite directions, for the final-token interchange (E2).

    The prompts name the same reference.  The answer of the patched run shows what the final
    token carries, because the three answers below are three different entities.
    """

    clean: Question
    counterfactual: Question

    @property
    def clean_answer(self) -> str:
        """t0, the correct answer on the clean image: nothing was transferred."""
        return self.clean.target

    @property
    def ordering_answer(self) -> str:
        """t2, the clean image's entity at the place that the counterfactual asks for."""
        return self.clean.entities[target_place(self.counterfactual.direction)]

    @property
    def attribute_answer(self) -> str:
        """t3, the correct answer on the counterfactual image: the answer itself was transferred."""
        return self.counterfactual.target

    @property
    def questions(self) -> tuple[Question, Question]:
        """The questions that a model must answer correctly for the pair to be kept."""
        return self.clean, self.counterfactual


@checked(DataError)
def swap_pair(direction: str, names: Sequence[str]) -> SwapPair:
    """Returns the swap pair of a 3-tuple (t0, t1, t2), protocol 2.5.

    Raises:
        DataError: an unknown direction, or not three different names.

    >>> pair = swap_pair("right", ("red", "green", "blue"))
    >>> pair.clean.entities, pair.clean_answer, pair.swapped_answer
    (('blue', 'green', 'red'), 'red', 'blue')
    """
    t0, t1, t2 = _distinct(names, 3)
    clean, mirrored = _facing(direction, t0, t1, t2), _facing(direction, t2, t1, t0)
    return SwapPair(Question(clean, direction), Question(mirrored, direction))


@checked(DataError)
def final_token_pair(direction: str, names: Sequence[str]) -> FinalTokenPair:
    """Returns the final-token pair of a 5-tuple (t0, ..., t4), protocol 2.5.

    Raises:
        DataError: an unknown direction, or not five different names.

    >>> pair = final_token_pair("left", ("red", "green", "blue", "black", "gray"))
    >>> pair.counterfactual
    Question(entities=('gray', 'green', 'black'), direction='right')
    >>> pair.clean_answer, pair.ordering_answer, pair.attribute_answer
    ('red', 'blue', 'black')
    """
    t0, t1, t2, t3, t4 = _distinct(names, 5)
    clean = _facing(direction, t0, t1, t2)
    opposite = OPPOSITE[direction]
    return FinalTokenPair(
        Question(clean, direction), Question(_facing(opposite, t3, t1, t4), opposite)
    )


@checked(DataError)
def sample_tuples(
    names: Sequence[str],
    k: int,
    per_direction: int = 50,
    seed: Seed = 0,
    accept: Callable[[str, tuple[str, ...]], bool] | None = None,
    max_attempts: int = 2000,
    *,
    accept_batch: BatchFilter | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
) -> dict[str, list[tuple[str, ...]]]:
    """Returns direction -> accepted k-tuples of `names`, with exactly the paper's draws.

    One `random.Random(seed)` is used for left, right, above, below (or the given `directions`,
    in their order); a draw is `rng.sample(names, k)`.  Every draw counts as one of the
    direction's `max_attempts`, including draws that repeat a tuple of this direction and are
    skipped (the paper does not specify this).  A rejected tuple is not tried again.

    `accept(direction, tuple)` is the model's filter; without it every tuple is kept.
    `accept_batch(direction, tuples)` is the same filter for a list of tuples: it gets the same
    tuples in the same order, so the result is the same.

    Raises:
        DataError: fewer than k different names, or both filters given.

    Warns:
        HookedVLMWarning: a direction with fewer than `per_direction` accepted tuples.

    >>> sample_tuples(["red", "green", "blue"], 2, per_direction=2)["left"]
    [('green', 'blue'), ('red', 'green')]
    """
    names = _distinct(names, None)
    _check_request(names, k, per_direction, max_attempts)
    return sample_draws(
        lambda rng: tuple(rng.sample(names, k)),
        _batched(accept, accept_batch),
        per_direction,
        seed,
        max_attempts,
        directions=directions,
    )


def sample_draws(
    draw: Callable[[random.Random], tuple[str, ...]],
    accept_batch: BatchFilter,
    per_direction: int = 50,
    seed: int = 0,
    max_attempts: int = 2000,
    *,
    directions: Sequence[str] = DIRECTIONS,
) -> dict[str, list[tuple[str, ...]]]:
    """Returns direction -> accepted tuples, as `sample_tuples`, of any way to draw a tuple.

    Warns:
        HookedVLMWarning: a direction with fewer than `per_direction` accepted tuples.
    """
    rng = random.Random(int(seed))
    chosen: dict[str, list[tuple[str, ...]]] = {}
    tried: dict[str, int] = {}
    for direction in directions:
        draws = _unseen_draws(rng, draw, max_attempts)
        chosen[direction], tried[direction] = _collect(
            direction, draws, per_direction, accept_batch
        )
    _warn_if_short(chosen, tried, per_direction, max_attempts)
    return chosen


def right_on_both(
    pair_of: Callable[[str, tuple[str, ...]], SwapPair | FinalTokenPair],
    is_right: Callable[[list[Question]], Sequence[bool]],
) -> BatchFilter:
    """Returns the paper's filter for `sample_tuples(accept_batch=...)`: correct on both images.

    `pair_of` is `swap_pair` or `final_token_pair`; `is_right` runs the model on a list of
    questions.  The model runs once for each question, also where tuples share it.
    """
    known: dict[Question, bool] = {}

    def accept_batch(direction: str, tuples: list[tuple[str, ...]]) -> list[bool]:
        pairs = [pair_of(direction, each) for each in tuples]
        asked = dict.fromkeys(question for pair in pairs for question in pair.questions)
        new = [question for question in asked if question not in known]
        known.update(zip(new, map(bool, is_right(new)), strict=True) if new else ())
        return [all(known[question] for question in pair.questions) for pair in pairs]

    return accept_batch


def _unseen_draws(
    rng: random.Random, draw: Callable[[random.Random], tuple[str, ...]], max_attempts: int
) -> Iterator[tuple[str, ...]]:
    seen = set()
    for _ in range(max_attempts):
        drawn = draw(rng)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _collect(
    direction: str, draws: Iterator[tuple[str, ...]], wanted: int, judge: BatchFilter
) -> tuple[list[tuple[str, ...]], int]:
    """Returns at most `wanted` accepted tuples, and the number of judged tuples.

    A batch has as many tuples as are still missing.  A one-by-one loop would judge all of them
    too, because it stops only when all missing tuples are accepted.  So the stream is never
    read further than by that loop.
    """
    kept: list[tuple[str, ...]] = []
    judged = 0
    while len(kept) < wanted:
        missing = wanted - len(kept)
        batch = list(islice(draws, missing))
        if not batch:
            break
        verdicts = list(judge(direction, batch))
        if len(verdicts) != len(batch):
            raise DataError(
                f"accept_batch was given {counted(len(batch), 'tuple')} and returned "
                f"{counted(len(verdicts), 'verdict')}. Return one verdict per tuple, in order."
            )
        kept += [drawn for drawn, good in zip(batch, verdicts, strict=True) if good]
        judged += len(batch)
    return kept, judged


def _batched(
    accept: Callable[[str, tuple[str, ...]], bool] | None, accept_batch: BatchFilter | None
) -> BatchFilter:
    if accept is not None and accept_batch is not None:
        raise DataError("sample_tuples was given both accept and accept_batch. Pass one of them.")
    if accept_batch is not None:
        return accept_batch
    return lambda direction, batch: [accept is None or accept(direction, drawn) for drawn in batch]


def _warn_if_short(
    chosen: dict[str, list[tuple[str, ...]]], tried: dict[str, int], wanted: int, attempts: int
) -> None:
    short = [
        f"{direction}: {len(kept)} of {wanted} (of {counted(tried[direction], 'different tuple')} "
        "tried)"
        for direction, kept in chosen.items()
        if len(kept) < wanted
    ]
    if short:
        warnings.warn(
            f"Too few tuples were accepted in {counted(attempts, 'attempt')} per direction. "
            f"{'; '.join(short)}. Intervals will be wider. Either the model answers the clean or "
            "the counterfactual image incorrectly, or there are too few names.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )


def _check_request(names: Sequence[str], k: int, per_direction: int, max_attempts: int) -> None:
    if not 1 <= k <= len(names):
        raise DataError(
            f"Cannot draw {k} different entities from {counted(len(names), 'name')} "
            f"({', '.join(names)}); k must lie between 1 and {len(names)}."
        )
    if per_direction < 1 or max_attempts < 1:
        raise DataError(
            f"per_direction={per_direction} and max_attempts={max_attempts} were given; both must "
            "be at least 1."
        )


def _distinct(names: Sequence[str], count: int | None) -> tuple[str, ...]:
    if isinstance(names, str):
        raise DataError(f"Names were given as one string {names!r}; expected a list of names.")
    listed = tuple(names)
    if len(set(listed)) != len(listed) or (count is not None and len(listed) != count):
        expected = "different names" if count is None else f"{count} different names"
        raise DataError(f"Expected {expected}; got {len(listed)}: {', '.join(map(str, listed))}.")
    return listed


def _facing(direction: str, target: str, middle: str, other: str) -> Layout:
    """Returns the layout in which `target` is in the asked direction of `middle`."""
    return (target, middle, other) if target_place(direction) == 0 else (other, middle, target)
