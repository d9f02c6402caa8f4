"""The paper's prompts, word for word (its section 4 and appendix)."""

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


def squares_prompt(direction: str, reference: str) -> str:
    """Returns the question of the Squares setting, its trailing space included.

    >>> squares_prompt("left", "red")
    'The color of the square to the left of the red square is '
    """
    return SQUARES.format(preposition=PREPOSITION[direction], reference=reference)
