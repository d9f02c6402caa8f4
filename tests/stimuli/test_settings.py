"""Shapes, Objects, photographs, and the settings made of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from hooked_vlm.errors import DataError
from hooked_vlm.stimuli import objects, photographs, shapes, squares
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.pairs import Question, final_token_pair, swap_pair
from hooked_vlm.stimuli.settings import SETTINGS, stimulus_set


GEOMETRY = geometry_for(12, 28)
WHITE = np.array([255, 255, 255])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def painted(image: Image.Image) -> np.ndarray:
    return (pixels(image) != WHITE).any(-1)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("direction", ["right", "above"])
def test_entities_stand_inside_their_places_and_nowhere_else(name, direction):
    stimuli = stimulus_set(name)
    first, middle, last = stimuli.names[:3]
    question = Question((first, middle, last), direction)
    axis = question.axis
    empty = stimuli.scene((None, None, None), axis, GEOMETRY, stimuli.ground_of(question))
    changed = (pixels(stimuli.picture(question, GEOMETRY)) != pixels(empty)).any(-1)
    for place in range(3):
        x0, y0, x1, y1 = GEOMETRY.place_box(axis, place)
        assert changed[y0:y1, x0:x1].mean() > 0.25
        changed[y0:y1, x0:x1] = False
    assert not changed.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_items_are_all_ordered_triples_in_every_direction(name):
    stimuli = stimulus_set(name)
    n = len(stimuli.names)
    items = stimuli.items()
    assert len(items) == len(set(items)) == 4 * n * (n - 1) * (n - 2)
    assert {"squares": 480, "shapes": 480, "objects": 1344}[name.split("-")[0]] == len(items)


@pytest.mark.parametrize("name", ["squares-photos", "objects-photos"])
def test_a_picture_and_its_counterfactual_stand_on_one_photograph(name):
    stimuli = stimulus_set(name)
    grounds = set()
    for k, make in ((3, swap_pair), (5, final_token_pair)):
        for start in range(len(stimuli.names)):
            names = [stimuli.names[(start + i) % len(stimuli.names)] for i in range(k)]
            pair = make("left", names)
            used = {stimuli.ground_of(question) for question in pair.questions}
            assert len(used) == 1
            grounds |= used
    assert len(grounds) > 1 and grounds <= set(photographs.SCENES)


def drawn(shape: str, side: int, drawing: str, offset: int = 0) -> np.ndarray:
    """The painted pixels of a shape in a box at (offset, 3)."""
    image = Image.new("RGB", (180, 180), "white")
    box = (offset, 3, offset + side, 3 + side)
    shapes.paint(ImageDraw.Draw(image), shape, box, (0, 0, 0), drawing)
    return painted(image)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the painted pixels."""
    rows, cols = np.nonzero(mask)
    left, top = int(cols.min()), int(rows.min())
    return left, top, int(cols.max()) - left + 1, int(rows.max()) - top + 1


@pytest.mark.parametrize("drawing", shapes.DRAWINGS)
@given(st.sampled_from(sorted(shapes.PAINT)), st.integers(12, 120), st.integers(0, 40))
def test_a_shape_stays_in_its_box_and_has_the_size_of_its_drawing(drawing, shape, side, offset):
    left, top, wide, tall = extent(drawn(shape, side, drawing, offset))
    assert left >= offset and left + wide <= offset + side
    assert top >= 3 and top + tall <= 3 + side
    share = {"square": 0.8, "circle": 0.9}.get(shape, 1.0 if drawing == "published" else 0.9)
    if (shape, drawing) != ("star", "inset"):  # a star's arms end before its circle does
        assert abs(wide - share * side) <= 2.5


def test_b4_shapes_have_the_published_sizes_in_a_box_of_56_px():
    found = {shape: extent(drawn(shape, 56, "published")) for shape in shapes.PAINT}
    assert found["triangle"] == (0, 3, 56, 48)  # from the top of the box
    assert found["cross"] == found["heart"] == (0, 3, 56, 56)
    assert found["star"][0] == 0 and found["star"][2] == 56
    assert abs(found["square"][2] - 0.8 * 56) < 1 and abs(found["circle"][2] - 0.9 * 56) < 1
    cross = drawn("cross", 56, "published")
    assert cross[3].sum() == 56 // 3 and cross[3 + 28].sum() == 56


def test_b4_published_shapes_are_the_default_and_inset_ones_a_setting_of_their_own():
    question = Question(("blue", "black", "brown"), "left")
    for name, drawing in (("shapes", "published"), ("shapes-inset", "inset")):
        picture = painted(stimulus_set(name).picture(question, GEOMETRY))
        x0, y0, x1, y1 = GEOMETRY.place_box("horizontal", 0)
        assert extent(picture[y0:y1, x0:x1])[2:] == extent(drawn("triangle", 56, drawing))[2:]
    assert stimulus_set("shapes-inset").title == "Shapes, drawn inset"
    with pytest.raises(DataError, match="'inset'"):
        shapes.draw(question.entities, "horizontal", GEOMETRY, drawing="insett")


def test_b1_a_spare_colour_has_the_shape_of_the_one_it_replaces():
    question = Question(("red", "orange", "gray"), "left")
    assert stimulus_set("shapes").prompt(question).endswith("of the orange cross is ")
    assert stimulus_set("shapes").spares == stimulus_set("squares").spares == {"brown": "orange"}
    picture = pixels(stimulus_set("squares").picture(question, GEOMETRY))
    assert tuple(picture[168, 168]) == (255, 165, 0)


def test_shapes_differ_in_form_and_not_in_colour_alone():
    image = {}
    for shape in shapes.PAINT:
        canvas = Image.new("RGB", (84, 84), "white")
        shapes.paint(ImageDraw.Draw(canvas), shape, (0, 0, 84, 84), (0, 0, 0), "inset")
        image[shape] = painted(canvas)
    area = {shape: mask.mean() for shape, mask in image.items()}
    assert area["square"] == pytest.approx(0.64, abs=0.03)
    assert area["circle"] == pytest.approx(0.81 * np.pi / 4, abs=0.02)
    assert area["triangle"] == pytest.approx(0.81 * 3**0.5 / 4, abs=0.02)
    assert area["cross"] == pytest.approx(2 * 0.9 / 3 - 1 / 9, abs=0.03)
    tip = np.nonzero(image["triangle"])
    assert tip[0].min() < 10 and len(np.unique(tip[1][tip[0] == tip[0].min()])) <= 3  # apex up
    assert all((image[a] != image[b]).mean() > 0.05 for a in image for b in image if a < b)


def test_prompts_are_the_papers():
    question = Question(("red", "black", "gray"), "below")
    assert stimulus_set("squares").prompt(question) == (
        "The color of the square below the black square is "
    )
    assert stimulus_set("shapes").prompt(question) == (
        "The color of the shape below the black star is "
    )
    question = Question(("hat", "key", "rose"), "right")
    assert stimulus_set("objects").prompt(question) == (
        "The object to the right of the key is a(n) "
    )
    assert (
        stimulus_set("shapes", other_words=True).prompt(Question(("red", "black", "gray"), "left"))
        == "What color is the shape to the left of the black star?"
    )


def test_objects_are_the_papers_eight_and_have_no_box():
    assert tuple(objects.shipped())[:8] == objects.NAMES
    for cutout in objects.shipped().values():
        alpha = np.asarray(cutout.getchannel("A"))
        assert alpha[0, 0] == 0 and alpha.max() == 255


def save_cutouts(folder: Path, names: list[str], opaque: bool = False) -> None:
    for name in names:
        image = Image.new("RGBA", (20, 20), (200, 0, 0, 255 if opaque else 0))
        image.paste((0, 0, 200, 255), (4, 4, 16, 16))
        image.save(folder / f"{name}.png")


def test_a_folder_of_ones_own_cutouts(tmp_path):
    save_cutouts(tmp_path, ["zebra", "kettle", "apple", "truck", "drum"])
    stimuli = stimulus_set("objects", cutouts=tmp_path)
    assert stimuli.names == ("apple", "drum", "kettle", "truck", "zebra")
    assert painted(stimuli.picture(Question(("zebra", "drum", "truck"), "left"), GEOMETRY)).any()
    (tmp_path / "truck.png").unlink()
    with pytest.raises(DataError, match="4 cut-outs"):
        stimulus_set("objects", cutouts=tmp_path)


def test_cutouts_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(DataError, match=r"no <name>\.png files"):
        objects.load_cutouts(tmp_path / "nowhere")
    save_cutouts(tmp_path, ["drum"], opaque=True)
    with pytest.raises(DataError, match=r"drum\.png.*no transparent pixel"):
        objects.load_cutouts(tmp_path)
    (tmp_path / "drum.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"drum\.png.*cannot be read"):
        objects.load_cutouts(tmp_path)


def test_a_folder_of_ones_own_photographs(tmp_path):
    Image.new("RGB", (90, 60), (10, 200, 30)).save(tmp_path / "meadow.png")
    stimuli = stimulus_set("squares-photos", backgrounds=tmp_path)
    question = Question(("red", "green", "blue"), "left")
    assert stimuli.ground_of(question) == "meadow"
    assert tuple(pixels(stimuli.picture(question, GEOMETRY))[0, 0]) == (10, 200, 30)
    with pytest.raises(DataError, match="no pictures"):
        stimulus_set("squares-photos", backgrounds=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "advice"),
    [("shape", "'shapes'"), ("squares-photo", "'squares-photos'"), ("objects-white", "Use one of")],
)
def test_an_unknown_setting_is_refused_with_the_nearest(name, advice):
    with pytest.raises(DataError, match=advice):
        stimulus_set(name)


def test_unknown_entities_are_refused_with_the_nearest():
    with pytest.raises(DataError, match="'hat'"):
        objects.draw(("hta", "key", "rose"), "horizontal", GEOMETRY)
    with pytest.raises(DataError, match="'green'"):
        shapes.draw(("gren", "red", "blue"), "horizontal", GEOMETRY)
    with pytest.raises(DataError, match="'star'"):
        shapes.paint(ImageDraw.Draw(Image.new("RGB", (9, 9))), "starr", (0, 0, 9, 9), (0, 0, 0))
    with pytest.raises(DataError, match="'coffee'"):
        photographs.shipped("cofee")
    with pytest.raises(DataError, match="got 2: "):
        squares.draw(("red", "blue"), "horizontal", GEOMETRY)
