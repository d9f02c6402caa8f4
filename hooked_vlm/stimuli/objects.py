"""Objects: cut-outs of everyday objects in a row or in a column (paper, 4).

The package ships thirteen cut-outs (MIT licence, see `assets/NOTICE.md`), including the
paper's eight names.  A user's own folder of `<name>.png` files with an alpha channel can be
used instead.  The eight names give P(8,3) = 336 ordered triples and 1344 items.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.pictures import open_picture
from hooked_vlm.stimuli.prompts import OBJECTS, PREPOSITION
from hooked_vlm.stimuli.squares import canvas


NAMES = ("orange", "apple", "pot", "bell", "hat", "rose", "key", "bomb")
"""The paper's objects, in its order."""

_SHIPPED = Path(__file__).parent / "assets" / "cutouts"

Cutouts = Mapping[str, Image.Image]
"""Pictures with an alpha channel, by name."""


@checked(DataError)
def prompt(question: Question) -> str:
    """Returns the question for the object in a direction from the middle object.

    >>> prompt(Question(("orange", "apple", "pot"), "above"))
    'The object above the apple is a(n) '
    """
    return OBJECTS.format(preposition=PREPOSITION[question.direction], reference=question.reference)


@cache
def shipped() -> Cutouts:
    """Returns the shipped cut-outs, the paper's eight first."""
    return load_cutouts(_SHIPPED)


@checked(DataError)
def load_cutouts(folder: Path) -> Cutouts:
    """Returns the cut-outs of a folder of `<name>.png`, the paper's names first, then by name.

    Raises `DataError` for a missing folder or one without PNG files, for a file that is no
    picture, and for a picture without transparent pixels, which would paint a box.
    """
    files = {path.stem: path for path in files_in(folder)}
    order = [*(n for n in NAMES if n in files), *(n for n in files if n not in NAMES)]
    return {name: _load(files[name]) for name in order}


def files_in(folder: Path) -> list[Path]:
    """Returns the files of the cut-outs of a folder; raises `DataError` without any."""
    files = sorted(Path(folder).glob("*.png"))
    if not files:
        raise DataError(
            f"There are no <name>.png files in '{folder}'. Give a folder with three or more."
        )
    return files


def _load(path: Path) -> Image.Image:
    image = open_picture(path, "RGBA")
    lowest, _ = image.getchannel("A").getextrema()
    if lowest == 255:
        raise DataError(
            f"'{path}' has no transparent pixel, so it would be pasted as a box with its own "
            "background. Give a cut-out with an alpha channel."
        )
    return image


@checked(DataError)
def draw(
    entities: Sequence[str | None],
    axis: str,
    geometry: Layout,
    background: Image.Image | None = None,
    cutouts: Cutouts | None = None,
) -> Image.Image:
    """Returns a canvas with each object in its place; None leaves a place empty.

    Raises `DataError` for an unknown object or other than three places.
    """
    cutouts = shipped() if cutouts is None else cutouts
    image = canvas(entities, geometry, background)
    for place, name in enumerate(entities):
        if name is not None:
            paste(image, name, geometry.place_box(axis, place), cutouts)
    return image


def paste(image: Image.Image, name: str, box: tuple[int, int, int, int], cutouts: Cutouts) -> None:
    """Pastes a cut-out, scaled to fill a pixel box; raises `DataError` for an unknown name."""
    if name not in cutouts:
        raise DataError(
            f"No object {name!r} among {', '.join(cutouts)}.{did_you_mean(name, cutouts)}"
        )
    x0, y0, x1, y1 = box
    scaled = cutouts[name].resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    image.paste(scaled, (x0, y0), scaled)
