"""COCO-spatial and similar sets: photographs with a correct and a wrong caption (Kamath 2023).

The lists of the What'sUp repository have `[image id, correct caption, wrong caption]`.  A
caption of two objects becomes a question about the side of one relative to the other, asked in
both orders of its options (protocol 2.3).  Unusable entries are collected in `.problems`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.pictures import is_inside, read_list
from hooked_vlm.stimuli.prompts import side_prompt


LISTS = {
    "coco_qa_two_obj": "val2017",
    "coco_qa_one_obj": "val2017",
    "vg_qa_two_obj": "vg_images",
    "vg_qa_one_obj": "vg_images",
}
"""The lists, and the folders of their pictures."""
TWO = re.compile(
    r"^A photo of an? (.+?) (to the left of|to the right of|above|below) an? (.+?)\.?$"
)
ONE = re.compile(r"^A photo of an? (.+?) (?:on|at) the (left|right|top|bottom)\.?$")
SIDE = {"to the left of": "left", "to the right of": "right"}


@dataclass(frozen=True)
class SpatialItem:
    """One photograph, its subject, and the subject's side of the reference."""

    path: Path
    image_id: str
    subject: str
    side: str
    """left, right, above or below (for a single object: left, right, top or bottom)."""
    reference: str | None
    correct: str
    distractor: str

    @property
    def axis(self) -> str:
        """`"horizontal"` or `"vertical"`."""
        return "horizontal" if self.side in ("left", "right") else "vertical"

    def questions(self, style: str = "reference") -> tuple[str, str]:
        """Returns the question in both orders of its options.

        Raises `DataError` for an item with one object.
        """
        if self.reference is None:
            raise DataError(
                f"{self.correct!r} names one object; side questions need two. Use a list whose "
                "name contains two_obj."
            )
        first, second = (
            side_prompt(self.subject, self.reference, self.axis, style, swapped)
            for swapped in (False, True)
        )
        return first, second

    def is_right(self, answers: Sequence[str]) -> bool:
        """Returns whether the answers to both orders are correct."""
        return all(normalise(answer) == self.side for answer in answers)


@dataclass(frozen=True)
class Spatial:
    """The usable items of one list, and its problems."""

    name: str
    items: tuple[SpatialItem, ...]
    problems: tuple[str, ...] = field(default=(), compare=False)


@checked(DataError)
def load(root: Path, name: str = "coco_qa_two_obj") -> Spatial:
    """Returns a list and its pictures from the folder that contains them, or its `data` folder.

    Missing pictures and captions of another form are listed in `problems`.  Raises `DataError`
    for an unknown list, and when the list's file is missing.
    """
    if name not in LISTS:
        raise DataError(
            f"There is no list {name!r} among {', '.join(LISTS)}.{did_you_mean(name, LISTS)}"
        )
    root, folder = Path(root), LISTS[name]
    items, problems = [], []
    for number, entry in enumerate(read_list(listing_of(root, name))):
        found = _entry(root, folder, entry)
        if isinstance(found, str):
            problems.append(f"entry {number}: {found}")
        else:
            items.append(found)
    return Spatial(name, tuple(items), tuple(problems))


def listing_of(root: Path, name: str) -> Path:
    """Returns the path of a list's file; raises `DataError` when the file is missing."""
    file = f"{name}.json"
    listing = next((p for p in (root / "data" / file, root / file) if p.is_file()), None)
    if listing is None:
        raise DataError(
            f"There is no 'data/{file}' in '{root}'. Expected is the layout of the What'sUp "
            f"repository: data/{file} and data/{LISTS[name]}/. Give the folder that contains "
            "'data', or 'data' itself."
        )
    return listing


def _entry(root: Path, folder: str, entry: object) -> SpatialItem | str:
    if not isinstance(entry, list) or len(entry) != 3:
        return f"not [image id, correct caption, wrong caption]: {repr(entry)[:80]}"
    image_id, correct, distractor = (str(part) for part in entry)
    parsed = parse_caption(correct)
    if parsed is None:
        return f"the caption {correct!r} cannot be read"
    path = find(root, folder, image_id)
    if path is None:
        return f"picture {image_id} is not in {folder}/"
    subject, side, reference = parsed
    return SpatialItem(path, image_id, subject, side, reference, correct, distractor)


def find(root: Path, folder: str, image_id: str) -> Path | None:
    """Returns a picture's path: twelve digits in COCO, the id itself in Visual Genome.

    An id that leads out of the folder finds nothing.
    """
    if not is_inside(f"{folder}/{image_id}.jpg") or not is_inside(image_id):
        return None
    names = [f"{image_id.zfill(12)}.jpg", f"{image_id}.jpg"]
    places = (root / "data" / folder, root / folder)
    return next((p / n for p in places for n in names if (p / n).is_file()), None)


def parse_caption(caption: str) -> tuple[str, str, str | None] | None:
    """Returns subject, side and reference of a caption (no reference: None), or None.

    >>> parse_caption("A photo of a teddy bear to the left of an oven")
    ('teddy bear', 'left', 'oven')
    >>> parse_caption("A photo of a cat on the right")
    ('cat', 'right', None)
    """
    two = TWO.match(caption.strip())
    if two:
        return two[1], SIDE.get(two[2], two[2]), two[3]
    one = ONE.match(caption.strip())
    return (one[1], one[2], None) if one else None
