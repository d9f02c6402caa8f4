from itertools import permutations

import numpy as np
import pytest

from hooked_vlm.errors import DataError
from hooked_vlm.stimuli.geometry import PAPER_GEOMETRY, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.squares import COLORS, draw, items, prompt


PROMPTS = {  # the paper's, word for word (2.3), trailing space included
    "left": "The color of the square to the left of the blue square is ",
    "right": "The color of the square to the right of the blue square is ",
    "above": "The color of the square above the blue square is ",
    "below": "The color of the square below the blue square is ",
}


def test_colours_are_the_paper_s_in_its_order():
    assert list(COLORS.items()) == [
        ("red", (255, 0, 0)),
        ("green", (0, 255, 0)),
        ("blue", (0, 0, 255)),
        ("black", (0, 0, 0)),
        ("brown", (150, 75, 0)),
        ("gray", (128, 128, 128)),
    ]


def test_there_are_480_different_items_in_order():
    every = items()
    assert len(set(every)) == len(every) == 480
    assert [item.direction for item in every[::120]] == ["left", "right", "above", "below"]
    assert every[0].entities == ("red", "green", "blue")
    assert {item.entities for item in every[:120]} == set(permutations(COLORS, 3))
    assert items(["above"]) == every[240:360]


@pytest.mark.parametrize(
    ("direction", "target", "axis"),
    [
        ("left", "red", "horizontal"),
        ("right", "gray", "horizontal"),
        ("above", "red", "vertical"),
        ("below", "gray", "vertical"),
    ],
)
def test_what_is_asked_and_its_answer(direction, target, axis):
    item = Question(("red", "blue", "gray"), direction)
    assert prompt(item) == PROMPTS[direction]
    assert (item.target, item.axis, item.reference) == (target, axis, "blue")


@pytest.mark.parametrize("family", PAPER_GEOMETRY)
@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_every_pixel_is_right(family, axis):
    geometry = PAPER_GEOMETRY[family]
    size = geometry.object_tokens * geometry.token_px
    step = size + geometry.gap_tokens * geometry.token_px
    n = geometry.n_tokens
    along = (n - 3 * geometry.object_tokens - 2 * geometry.gap_tokens) // 2 * geometry.token_px
    across = (n - geometry.object_tokens) // 2 * geometry.token_px
    expected = np.full((geometry.canvas, geometry.canvas, 3), 255, np.uint8)
    for place, name in enumerate(("brown", "green", "black")):
        start = along + place * step
        expected[across : across + size, start : start + size] = COLORS[name]
    if axis == "vertical":
        expected = expected.swapaxes(0, 1)
    image = draw(("brown", "green", "black"), axis, geometry)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)


def test_an_empty_place_stays_white():
    geometry = geometry_for(12, 16)
    alone = np.asarray(draw((None, "red", None), "horizontal", geometry))
    x0, y0, x1, y1 = geometry.place_box("horizontal", 1)
    assert (alone[y0:y1, x0:x1] == COLORS["red"]).all()
    assert (alone != 255).any(-1).sum() == (x1 - x0) * (y1 - y0)
    assert (np.asarray(draw((None, None, None), "vertical", geometry)) == 255).all()


def test_unknown_colours_and_other_counts_are_refused():
    geometry = geometry_for(12, 16)
    with pytest.raises(DataError, match=r"No colour 'grey'.*Did you mean 'gray'"):
        draw(("red", "grey", "blue"), "horizontal", geometry)
    with pytest.raises(DataError, match="Expected three entities, one per place; got 2"):
        draw(("red", "blue"), "horizontal", geometry)
