"""A setting: the squares in three colours, which is 24 questions."""

from dataclasses import replace

from hooked_vlm.stimuli.settings import StimulusSet, stimulus_set


def three_squares() -> StimulusSet:
    """Returns the stimuli; a parameter `data` would be the folder of `--data`."""
    return replace(
        stimulus_set("squares"),
        name="three-squares",
        title="Squares of three colours",
        names=("red", "green", "blue"),
    )
