"""The paper's prompts, word for word (its section 4 and appendix)."""

from typing import Annotated, TypeAlias

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Name, one_of
from hooked_vlm.errors import DataError


SYSTEM_PROMPT = "You are a helpful assistant. You respond in one token."

DIRECTIONS = ("left", "right", "above", "below")
AXIS_OF = {"left": "horizontal", "right": "horizontal", "above": "vertical", "below": "vertical"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PREPOSITION = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}

SQUARES = "The color of the square {preposition} the {reference} square is "
SHAPES = "The color of the shape {preposition} the {reference} is "
OBJECTS = "The object {preposition} the {reference} is a(n) "

Direction: TypeAlias = Annotated[str, one_of(DIRECTIONS)]
Axis: TypeAlias = Annotated[str, one_of(("horizontal", "vertical"))]

WHATSUP = "The object on the floor {preposition} the {reference} is a(n) "
SIDES = {
    "reference": {
        "horizontal": "Using the {reference} as the reference point, which side is the {subject} "
        "on? Answer with one word: {first} or {second}.",
        "vertical": "Using the {reference} as the reference point, where is the {subject} located? "
        "Answer with one word: {first} or {second}.",
    },
    "choice": {
        "horizontal": "Is the {subject} to the {first} or to the {second} of the {reference}? "
        "Answer with one word.",
        "vertical": "Is the {subject} {first} or {second} the {reference}? Answer with one word.",
    },
}
"""The questions of COCO-spatial, without a system message: "reference" for Qwen2-VL, "choice"
for Gemma 3; each item is asked twice, with the options in both orders."""

Style: TypeAlias = Annotated[str, one_of(SIDES)]

OPTIONS = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
OTHER_WORDS = {
    "squares": "What color is the square {preposition} the {reference} square?",
    "shapes": "What color is the shape {preposition} the {reference}?",
    "objects": "Which object is {preposition} the {reference}?",
}
"""A second phrasing of each setting's question (ours), to check that results do not depend on
the wording."""


@checked(DataError)
def side_prompt(
    subject: Name, reference: Name, axis: Axis, style: Style = "reference", swapped: bool = False
) -> str:
    """Returns the question on which side of a reference a subject is (COCO-spatial).

    `swapped` names the second option first.

    >>> side_prompt("cat", "dog", "horizontal", "choice")
    'Is the cat to the left or to the right of the dog? Answer with one word.'
    """
    first, second = OPTIONS[axis][::-1] if swapped else OPTIONS[axis]
    return SIDES[style][axis].format(
        subject=subject, reference=reference, first=first, second=second
    )


@checked(DataError)
def squares_prompt(direction: Direction, reference: Name) -> str:
    """Returns the question of the Squares setting, its trailing space included.

    >>> squares_prompt("left", "red")
    'The color of the square to the left of the red square is '
    """
    return SQUARES.format(preposition=PREPOSITION[direction], reference=reference)
