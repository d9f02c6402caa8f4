"""A setting draws pairs of which statistics can be made, and says what a model cannot do."""

import types

import pytest

from hooked_vlm.errors import CannotRunError, HookedVLMWarning
from hooked_vlm.experiments.options import Config
from hooked_vlm.experiments.setting import Setting, system_of
from hooked_vlm.stimuli.pairs import swap_pair
from hooked_vlm.stimuli.settings import stimulus_set


def setting() -> Setting:
    made = object.__new__(Setting)  # without a model, which drawing does not need
    made.stimuli = stimulus_set("squares")
    made.names = made.stimuli.names
    return made


def test_i1_a_direction_with_one_pair_is_left_out_before_anything_is_computed() -> None:
    kept: list[str] = []

    def accept(direction: str, drawn: list) -> list[bool]:
        verdicts = []
        for _ in drawn:
            verdicts.append(direction != "left" or direction not in kept)
            kept.append(direction)
        return verdicts

    with pytest.warns(HookedVLMWarning, match="left"):
        pairs = setting().pairs_accepted(swap_pair, 3, Config(pairs=2), accept)
    assert {direction: len(found) for direction, found in pairs.items()} == {
        "right": 2,
        "above": 2,
        "below": 2,
    }


@pytest.mark.filterwarnings("ignore::hooked_vlm.errors.HookedVLMWarning")
def test_i1_a_model_that_answers_nothing_cannot_run() -> None:
    with pytest.raises(CannotRunError, match="In no direction does the model answer two pairs"):
        setting().pairs_accepted(
            swap_pair, 3, Config(pairs=2), lambda _, drawn: [False] * len(drawn)
        )


def test_g8_a_system_message_is_given_only_where_a_chat_template_holds_it() -> None:
    with_template = types.SimpleNamespace(processor=types.SimpleNamespace(chat_template="{{ x }}"))
    without = types.SimpleNamespace(processor=types.SimpleNamespace())
    assert system_of(with_template, "brief") == "brief"
    assert system_of(without, "brief") is None
