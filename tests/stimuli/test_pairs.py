"""The draws against a plain loop, and the layouts against what they must mean."""

import itertools
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.errors import DataError, HookedVLMWarning
from hooked_vlm.stimuli import sample_tuples
from hooked_vlm.stimuli.pairs import (
    Question,
    final_token_pair,
    right_on_both,
    swap_pair,
    target_place,
)
from hooked_vlm.stimuli.prompts import DIRECTIONS, OPPOSITE
from hooked_vlm.stimuli.squares import COLORS as RGB


COLORS = list(RGB)


def plain_loop(names, k, per_direction, seed, accept, max_attempts):
    """The paper's procedure, one tuple at a time."""
    rng = random.Random(seed)
    result = {}
    for direction in ["left", "right", "above", "below"]:
        kept, seen, attempts = [], [], 0
        while len(kept) < per_direction and attempts < max_attempts:
            attempts += 1
            names_drawn = tuple(rng.sample(names, k))
            if names_drawn in seen:
                continue
            seen.append(names_drawn)
            if accept(direction, names_drawn):
                kept.append(names_drawn)
        result[direction] = kept
    return result


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("seed", [0, 7])
def test_unfiltered_draws_are_the_papers(k, seed):
    assert sample_tuples(COLORS, k, seed=seed) == plain_loop(
        COLORS, k, 50, seed, lambda *_: True, 2000
    )


def test_first_draws_are_pinned():
    """Python promises the same `sample` for the same seed; written down in case it does not."""
    first = sample_tuples(COLORS, 3)
    assert first["left"][:2] == [("black", "gray", "red"), ("blue", "brown", "black")]
    assert [len(set(first[direction])) for direction in DIRECTIONS] == [50] * 4


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 4),
    per_direction=st.integers(1, 30),
    seed=st.integers(0, 5),
    keep=st.integers(0, 10),
    max_attempts=st.integers(1, 90),
)
def test_filters_change_only_where_the_stream_stops(k, per_direction, seed, keep, max_attempts):
    def accept(direction, drawn):
        return sum(map(len, (*drawn, direction))) % 11 < keep or drawn[0] == "red"

    batches = []

    def accept_batch(direction, tuples):
        batches.append(list(tuples))
        return [accept(direction, each) for each in tuples]

    arguments = (COLORS, k, per_direction, seed)
    expected = plain_loop(*arguments, accept, max_attempts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)
        one_by_one = sample_tuples(*arguments, accept, max_attempts)
        batched = sample_tuples(*arguments, max_attempts=max_attempts, accept_batch=accept_batch)
    assert one_by_one == expected
    assert batched == expected
    assert all(batches)  # an empty list is never put to the model


def test_the_filter_is_asked_no_more_than_the_plain_loop_asks():
    asked, asked_in_batches = [], []

    def accept(direction, drawn):
        asked.append((direction, drawn))
        return "red" in drawn

    def accept_batch(direction, tuples):
        asked_in_batches.extend((direction, each) for each in tuples)
        return ["red" in each for each in tuples]

    plain_loop(COLORS, 3, 20, 0, accept, 2000)
    sample_tuples(COLORS, 3, 20, accept_batch=accept_batch)
    assert asked_in_batches == asked


def test_too_few_accepted_warns_with_the_count():
    def accept(direction, drawn):
        return direction != "right" or drawn[0] == "red"

    with pytest.warns(HookedVLMWarning, match=r"right: 20 of 50 \(of 120 different") as caught:
        tuples = sample_tuples(COLORS, 3, accept=accept)
    assert len(caught) == 1
    assert [len(tuples[direction]) for direction in DIRECTIONS] == [50, 20, 50, 50]
    assert tuples == plain_loop(COLORS, 3, 50, 0, accept, 2000)


def test_names_keep_their_order():
    by_position = sample_tuples(COLORS, 3)
    by_other = sample_tuples(COLORS[::-1], 3)
    other_name = dict(zip(COLORS, COLORS[::-1], strict=True))
    assert by_other["left"] == [tuple(map(other_name.get, each)) for each in by_position["left"]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_swap_pair_mirrors_and_asks_for_the_ends(direction):
    pair = swap_pair(direction, ("t0", "t1", "t2"))
    clean, counterfactual = pair.questions
    assert counterfactual.entities == clean.entities[::-1]
    assert clean.direction == counterfactual.direction == direction
    assert clean.reference == counterfactual.reference == "t1"
    place = {"left": 0, "right": 2, "above": 0, "below": 2}[direction]
    assert (clean.entities[place], pair.clean_answer) == ("t0", "t0")
    assert (counterfactual.entities[place], pair.swapped_answer) == ("t2", "t2")
    expected = {0: ("t0", "t1", "t2"), 2: ("t2", "t1", "t0")}
    assert clean.entities == expected[place]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_final_token_pair_separates_clean_ordering_and_attribute(direction):
    pair = final_token_pair(direction, ("t0", "t1", "t2", "t3", "t4"))
    clean, counterfactual = pair.questions
    assert counterfactual.direction == OPPOSITE[direction]
    assert clean.axis == counterfactual.axis
    assert clean.reference == counterfactual.reference == "t1"
    answers = pair.clean_answer, pair.ordering_answer, pair.attribute_answer
    assert answers == ("t0", "t2", "t3")
    asked, asked_opposite = target_place(direction), target_place(OPPOSITE[direction])
    assert {asked, asked_opposite} == {0, 2}
    assert clean.entities[asked] == "t0"
    assert clean.entities[asked_opposite] == "t2"
    assert counterfactual.entities[asked_opposite] == "t3"
    if direction in ("left", "above"):
        assert counterfactual.entities == ("t4", "t1", "t3")
    else:
        assert counterfactual.entities == ("t3", "t1", "t4")


def test_right_on_both_asks_each_question_once():
    runs = []

    def is_right(questions):
        runs.append(questions)
        return [question.entities[0] != "gray" for question in questions]

    accept_batch = right_on_both(swap_pair, is_right)
    tuples = list(itertools.permutations(["red", "green", "gray"], 3))
    expected = ["gray" not in (each[0], each[2]) for each in tuples]
    assert accept_batch("left", tuples) == expected
    assert accept_batch("left", tuples) == expected
    # Six mirrored pairs over six layouts: twelve questions, half of them the same.
    assert [len(run) for run in runs] == [6]
    chosen = sample_tuples(["red", "green", "gray", "blue"], 3, 6, accept_batch=accept_batch)
    assert all("gray" not in (each[0], each[2]) for each in chosen["left"])


def test_a_question_knows_its_answer():
    question = Question(("red", "green", "blue"), "below")
    assert (question.target, question.reference, question.axis) == ("blue", "green", "vertical")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_tuples(COLORS, 7), "7 different entities from 6"),
        (lambda: sample_tuples(["red", "red", "blue"], 2), "different names; got 3"),
        (lambda: sample_tuples("red", 2), "names='red'; expected a sequence"),
        (lambda: sample_tuples(COLORS, 3, per_direction=0), "per_direction=0"),
        (
            lambda: sample_tuples(COLORS, 3, accept=lambda *_: True, accept_batch=lambda *_: []),
            "both accept and accept_batch",
        ),
        (
            lambda: sample_tuples(COLORS, 3, accept_batch=lambda *_: [True]),
            "50 tuples and returned 1",
        ),
        (lambda: swap_pair("lefft", ("a", "b", "c")), "Did you mean 'left'"),
        (lambda: swap_pair("left", ("a", "b")), "3 different names; got 2"),
        (lambda: final_token_pair("left", ("a", "b", "c", "d", "a")), "5 different names"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
