"""The boxes of the two objects of a COCO-spatial item, from COCO's own annotations.

The lists of What'sUp name objects without boxes; COCO's `instances_val2017.json` has them.
An object of a caption is a category of COCO; of several boxes of a category, the largest is
used.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hooked_vlm.errors import DataError
from hooked_vlm.stimuli.datasets.coco import SpatialItem
from hooked_vlm.stimuli.pictures import read_json


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


def with_boxes(items: Sequence[SpatialItem], root: Path) -> Boxed:
    """Returns the items with boxes; items without boxes are listed in `problems`.

    Raises `DataError` when the annotations are missing or are not COCO's.
    """
    path = find(root)
    content = read_json(path)
    try:
        names = {int(entry["id"]): str(entry["name"]).lower() for entry in content["categories"]}
        boxes: dict[tuple[int, str], list[Box]] = defaultdict(list)
        for entry in content["annotations"]:
            x, y, width, height = (float(side) for side in entry["bbox"])
            if not math.isfinite(x + y + width + height):
                raise ValueError(f"bbox {entry['bbox']}")
            found = boxes[int(entry["image_id"]), names[int(entry["category_id"])]]
            found.append((x, y, x + width, y + height))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"'{path}' is not COCO's: expected are 'categories' with id and name, and "
            "'annotations' with image_id, category_id and bbox "
            f"({type(error).__name__}: {str(error)[:80]})."
        ) from None
    kept, problems = [], []
    for item in items:
        pair = []
        if not item.image_id.isdecimal():
            problems.append(f"picture {item.image_id}: the id is not a number of COCO")
            continue
        for name in (item.subject, str(item.reference)):
            own = boxes.get((int(item.image_id), name.lower()), [])
            if not own:
                problems.append(f"picture {item.image_id}: no box of {name!r}")
            elif len(own) > 1:
                problems.append(
                    f"picture {item.image_id}: {len(own)} boxes of {name!r}; the largest is used"
                )
            pair += sorted(own, key=_area)[-1:]
        if len(pair) == 2:
            kept.append(BoxedItem(item, pair[0], pair[1]))
    return Boxed(tuple(kept), tuple(problems))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
