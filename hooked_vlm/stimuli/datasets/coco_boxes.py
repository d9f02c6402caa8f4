"""The boxes of the two objects of a COCO-spatial item, from COCO's own annotations.

The lists of What'sUp name objects without boxes; COCO's `instances_val2017.json` has them.
An object of a caption is a category of COCO; of several boxes of a category, the largest is
used, if there are boxes on the captioned side.  A user's file of detected boxes can be used
where COCO has none.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vlm.errors import DataError
from hooked_vlm.stimuli.datasets.coco import SpatialItem
from hooked_vlm.stimuli.pictures import read_json, read_list


FILE = "instances_val2017.json"
PLACES = ("annotations", "data/annotations", "data", ".", "../annotations")
Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the photograph."""


@dataclass(frozen=True)
class BoxedItem:
    """An item with the boxes of its two objects."""

    item: SpatialItem
    subject: Box
    reference: Box

    @property
    def is_as_captioned(self) -> bool:
        """Whether the subject's centre lies on the captioned side of the reference's."""
        return _is_on_side(self.item.side, self.subject, self.reference)

    @property
    def by_class(self) -> tuple[Box, Box]:
        """The boxes of the left and the right object, or of the upper and the lower one."""
        first = self.item.side in ("left", "above")
        return (self.subject, self.reference) if first else (self.reference, self.subject)


@dataclass(frozen=True)
class Boxed:
    """The items with boxes, and the problems of the others."""

    items: tuple[BoxedItem, ...]
    problems: tuple[str, ...] = ()


def find(root: Path) -> Path:
    """Returns the annotations' path; raises `DataError` when the file is missing."""
    for place in PLACES:
        if (root / place / FILE).is_file():
            return root / place / FILE
    raise DataError(
        f"There is no '{FILE}', which has the boxes of COCO's objects, in "
        f"{', '.join(repr(place) for place in PLACES)} of '{root}'. It is part of COCO's "
        "annotations_trainval2017.zip. Put it into DATA/annotations/."
    )


def with_boxes(items: Sequence[SpatialItem], root: Path, detected: Path | None = None) -> Boxed:
    """Returns the items with boxes; items without boxes are listed in `problems`.

    `detected` is a file of detected boxes (`read_detected`), used for objects of which COCO has
    no box.  Items whose boxes contradict their caption are listed in `problems` too.

    Raises `DataError` when the annotations are missing or are not COCO's, or the detected boxes
    cannot be read.
    """
    boxes = _annotated(find(root))
    more = read_detected(detected) if detected is not None else {}
    kept, problems = [], []
    for item in items:
        if not item.image_id.isdecimal():
            problems.append(f"picture {item.image_id}: the id is not a number of COCO")
            continue
        pair = []
        for name in (item.subject, str(item.reference)):
            key = int(item.image_id), name.lower()
            own = boxes.get(key) or more.get(key, [])
            if not own:
                problems.append(f"picture {item.image_id}: no box of {name!r}")
            elif len(own) > 1:
                problems.append(
                    f"picture {item.image_id}: {len(own)} boxes of {name!r}; the largest that "
                    "fits the caption is used"
                )
            elif key not in boxes:
                problems.append(f"picture {item.image_id}: the box of {name!r} is a detected one")
            pair.append(sorted(own, key=_area, reverse=True))
        if all(pair):
            found = BoxedItem(item, *_chosen(item.side, pair[0], pair[1]))
            kept.append(found)
            if not found.is_as_captioned:
                problems.append(
                    f"picture {item.image_id}: the boxes of {item.subject!r} and "
                    f"{item.reference!r} contradict the caption ({item.side}), so no probe is "
                    "fitted to them"
                )
    return Boxed(tuple(kept), tuple(problems))


def read_detected(path: Path) -> dict[tuple[int, str], list[Box]]:
    """Returns detected boxes by image id and name, from a JSON list such as a detector's output.

    Each entry is `{"image_id": 42, "name": "dog", "bbox": [x, y, width, height]}`, in pixels of
    the photograph.  Raises `DataError` for another file.
    """
    found: dict[tuple[int, str], list[Box]] = defaultdict(list)
    for number, entry in enumerate(read_list(path)):
        try:
            box = _box(entry["bbox"])
            found[int(entry["image_id"]), str(entry["name"]).lower()].append(box)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"Entry {number} of '{path}' is {repr(entry)[:80]}; expected is "
                '{"image_id": 42, "name": "dog", "bbox": [x, y, width, height]} '
                f"({type(error).__name__}: {str(error)[:60]})."
            ) from None
    return found


def _chosen(side: str, subjects: Sequence[Box], references: Sequence[Box]) -> tuple[Box, Box]:
    """Returns the largest boxes on the captioned side; the largest of all where there are none."""
    pairs = [(a, b) for a in subjects for b in references]
    fitting = [pair for pair in pairs if _is_on_side(side, *pair)]
    return max(fitting or pairs, key=lambda pair: _area(pair[0]) + _area(pair[1]))


def _is_on_side(side: str, subject: Box, reference: Box) -> bool:
    axis = 0 if side in ("left", "right") else 1
    ours, other = (box[axis] + box[axis + 2] for box in (subject, reference))
    return ours < other if side in ("left", "above") else ours > other


def _annotated(path: Path) -> dict[tuple[int, str], list[Box]]:
    """Returns COCO's boxes by image id and name of the category."""
    content = read_json(path)
    try:
        names = {int(entry["id"]): str(entry["name"]).lower() for entry in content["categories"]}
        boxes: dict[tuple[int, str], list[Box]] = defaultdict(list)
        for entry in content["annotations"]:
            found = boxes[int(entry["image_id"]), names[int(entry["category_id"])]]
            found.append(_box(entry["bbox"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"'{path}' is not COCO's: expected are 'categories' with id and name, and "
            "'annotations' with image_id, category_id and bbox "
            f"({type(error).__name__}: {str(error)[:80]})."
        ) from None
    return boxes


def _box(given: Any) -> Box:
    """Returns the edges of a box given as x, y, width and height; raises `ValueError`."""
    x, y, width, height = (float(side) for side in given)
    if not math.isfinite(x + y + width + height):
        raise ValueError(f"bbox {given}")
    return x, y, x + width, y + height


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
