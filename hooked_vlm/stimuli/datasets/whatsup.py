"""What'sUp: photographs of two objects, one left of, right of, on or under the other (Kamath 2023).

The paper joins the left half of one photograph and the right half of another with the same
reference in the middle to a picture of three objects (protocol 2.2).  A user's copy of the
data is read in its original layout (`docs/reference/data.md`).  Problems are collected in
`.problems`; it is an error only if no item is usable.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hooked_vlm.analysis.statistics import Interval, wilson
from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, counted, did_you_mean
from hooked_vlm.stimuli.datasets.whatsup_layout import layout_of
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.pictures import is_inside, open_picture, read_list
from hooked_vlm.stimuli.prompts import PREPOSITION, WHATSUP
from hooked_vlm.stimuli.sets import StimulusSet


REFERENCES = ("chair", "table", "armchair")
SETTINGS = tuple(f"whatsup-{reference}" for reference in REFERENCES)
PUBLISHED_IMAGES = 1074
"""The number of composites in the paper, over the three references."""
PARTS = {"A": "controlled_images", "B": "controlled_clevr"}
"""The two sets, and the folders of their pictures."""
PREPOSITIONS = {
    "A": ("left_of", "right_of", "on", "under"),
    "B": ("left_of", "right_of", "in-front_of", "behind"),
}
ENDING = ".jpeg"


@dataclass(frozen=True)
class Item:
    """One photograph and its four captions; the first caption is correct."""

    path: Path
    satellite: str
    preposition: str
    reference: str
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class WhatsUp:
    """The usable items of one set, and its problems."""

    part: str
    items: tuple[Item, ...]
    problems: tuple[str, ...] = field(default=(), compare=False)

    def photograph(self, satellite: str, preposition: str, reference: str) -> Item | None:
        """Returns the item of a name, or None where there is none."""
        wanted = (satellite, preposition, reference)
        return next(
            (i for i in self.items if (i.satellite, i.preposition, i.reference) == wanted), None
        )

    def satellites(self, reference: str) -> tuple[str, ...]:
        """Returns the objects with photographs both left and right of a reference, in order."""
        sides = defaultdict(set)
        for item in self.items:
            if item.reference == reference:
                sides[item.satellite].add(item.preposition)
        return tuple(name for name, found in sides.items() if {"left_of", "right_of"} <= found)


@checked(DataError)
def load(root: Path, part: str = "A") -> WhatsUp:
    """Returns a set of What'sUp from the folder that contains it, or from its `data` folder.

    Missing files, extra files, files with other names, and entries without captions are listed
    in `problems`.  Raises `DataError` when the list is missing, or when no entry is usable.
    """
    # 1. Find and read the list.
    root = Path(root)
    listing = listing_of(root, part)
    entries = read_list(listing)
    # 2. Read each entry; an unusable or duplicate entry is a problem, not an error.
    items, problems, seen = [], [], {}
    for number, entry in enumerate(entries):
        found = _entry(root, entry, part)
        if isinstance(found, str):
            problems.append(f"entry {number}: {found}")
        elif found.path in seen:
            problems.append(f"entry {number}: '{found.path.name}' is entry {seen[found.path]} too")
        else:
            items.append(found)
            seen[found.path] = number
            problems += [f"entry {number}: {what}" for what in _captions_apart(found)]
    if entries and not items:
        raise DataError(
            f"No entry of '{listing}' can be used (of {len(entries)}); the first: "
            f"{problems[0]}. Pictures are looked for in data/{PARTS[part]}/ of '{root}'."
        )
    # 3. Report pictures that no entry names.
    folder = next(
        (p for p in (root / "data" / PARTS[part], root / PARTS[part]) if p.is_dir()), None
    )
    if folder is not None:
        names = {path.name for path in seen}
        extra = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in names)
        problems += [f"'{name}' is in the folder and not in the list" for name in extra]
    return WhatsUp(part, tuple(items), tuple(problems))


def listing_of(root: Path, part: str = "A") -> Path:
    """Returns the path of a set's list; raises `DataError` when the file is missing."""
    if part not in PARTS:
        raise DataError(
            f"There is no set {part!r}; What'sUp has A and B.{did_you_mean(part, PARTS)}"
        )
    name = f"{PARTS[part]}_dataset.json"
    listing = next((p for p in (root / "data" / name, root / name) if p.is_file()), None)
    if listing is None:
        raise DataError(
            f"There is no 'data/{name}' in '{root}'. Expected is the layout of the What'sUp "
            f"repository: data/{name} and data/{PARTS[part]}/*{ENDING}. Give the folder that "
            "contains 'data', or 'data' itself."
        )
    return listing


def _captions_apart(item: Item) -> list[str]:
    """Returns differences between an item's correct caption and its name; the item is kept."""
    right, *parts = (
        words.lower().replace("_", " ").replace("-", " ")
        for words in (item.captions[0], item.satellite, item.preposition, item.reference)
    )
    if any(part not in right for part in parts):
        return [f"'{item.path.name}' has the correct caption {item.captions[0]!r}"]
    return []


def _entry(root: Path, entry: object, part: str) -> Item | str:
    """Returns an entry of the list as an item, or its problem as text."""
    if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
        return "no image_path"
    path = find(root, entry["image_path"], PARTS[part])
    if path is None:
        return f"'{entry['image_path'][:120]}' is missing"
    try:
        satellite, preposition, reference = parse_name(path.stem, part)
    except DataError as error:
        return str(error)
    captions = entry.get("caption_options")
    if not isinstance(captions, list) or len(captions) != 4:
        return f"'{path.name}' has no four captions"
    return Item(path, satellite, preposition, reference, tuple(map(str, captions)))


def find(root: Path, given: str, folder: str) -> Path | None:
    """Returns a picture's path: the given path, without `data/`, or the file's name alone.

    A path that leads out of `root` finds nothing.
    """
    if not is_inside(given):
        return None
    name = Path(given).name
    bare = given.removeprefix("data/")
    for candidate in (
        given,
        bare,
        f"data/{bare}",
        f"data/{folder}/{name}",
        f"{folder}/{name}",
        name,
    ):
        if (root / candidate).is_file():
            return root / candidate
    return None


def parse_name(stem: str, part: str = "A") -> tuple[str, str, str]:
    """Returns satellite, preposition and reference of a file's name.

    Raises `DataError` for a name of another form.

    >>> parse_name("coffee-cup_left_of_armchair")
    ('coffee-cup', 'left_of', 'armchair')
    """
    pieces = stem.split("_")
    preposition = "_".join(pieces[1:-1])
    if len(pieces) < 3 or preposition not in PREPOSITIONS[part]:
        raise DataError(
            f"'{stem}' is not <satellite>_<preposition>_<reference> with a preposition among "
            f"{', '.join(PREPOSITIONS[part])}"
        )
    return pieces[0], preposition, pieces[-1]


def accuracies(data: WhatsUp, right: Sequence[bool]) -> dict[str, Interval]:
    """Returns What'sUp's three accuracies from one verdict per item, with Wilson intervals.

    `single` counts photographs; `pair` counts left and right together, or the other two
    prepositions; `set` counts all four.  Incomplete pairs and sets are left out.
    """
    if len(right) != len(data.items):
        raise DataError(
            f"Got {counted(len(right), 'verdict')} for {counted(len(data.items), 'item')}. Give "
            "one per item."
        )
    found: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for item, verdict in zip(data.items, right, strict=True):
        found[item.satellite, item.reference][item.preposition] = bool(verdict)
    prepositions = PREPOSITIONS[data.part]
    groups = {"pair": (prepositions[:2], prepositions[2:]), "set": (prepositions,)}
    counts = {"single": [bool(verdict) for verdict in right]}
    for name, wanted in groups.items():
        counts[name] = [
            all(verdicts[p] for p in group)
            for verdicts in found.values()
            for group in wanted
            if all(p in verdicts for p in group)
        ]
    return {name: wilson(float(sum(v)), len(v)) for name, v in counts.items() if v}


def joined(
    left: Image.Image, right: Image.Image, side: int, *, shift: int = 0, blend: int = 0
) -> Image.Image:
    """Returns the left half of one picture joined with the right half of another.

    Both are first resized bilinearly to the canvas.  `shift` moves the seam to the right, in
    pixels; `blend` is the width of the transition.
    """
    a, b = (np.asarray(_fitted(picture, side), dtype=np.float32) for picture in (left, right))
    columns = np.arange(side) + 0.5 - (side / 2 + shift)
    share = (columns > 0).astype(np.float32)
    if blend:
        share = np.clip(columns / blend + 0.5, 0, 1).astype(np.float32)
    share = share[None, :, None]
    return Image.fromarray(np.round(a * (1 - share) + b * share).astype(np.uint8))


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)


def composite(data: WhatsUp, left: str, reference: str, right: str, side: int) -> Image.Image:
    """Returns the picture of three objects; raises `DataError` when a photograph is missing."""
    return joined(
        opened(data, left, "left_of", reference), opened(data, right, "right_of", reference), side
    )


def opened(data: WhatsUp, satellite: str, preposition: str, reference: str) -> Image.Image:
    """Returns a photograph by its name; raises `DataError` when it is missing or unreadable."""
    item = data.photograph(satellite, preposition, reference)
    if item is None:
        raise DataError(
            f"There is no photograph {satellite}_{preposition}_{reference}{ENDING}. See the "
            "problems of this copy of What'sUp."
        )
    return open_picture(item.path)


def count_difference(data: WhatsUp) -> str:
    """Returns in words how many composites this copy has, unless it has the published number.

    >>> count_difference(WhatsUp("A", ())).partition(" gives ")[2][:36]
    '0 composites (chair 0, table 0, armc'
    """
    sizes = {reference: len(data.satellites(reference)) for reference in REFERENCES}
    counts = {reference: n * (n - 1) for reference, n in sizes.items()}
    if sum(counts.values()) == PUBLISHED_IMAGES:
        return ""
    listed = ", ".join(f"{reference} {count}" for reference, count in counts.items())
    return (
        f"This copy of What'sUp gives {sum(counts.values())} composites ({listed}); the paper has "
        f"{PUBLISHED_IMAGES}. The copy has {counted(len(data.problems), 'problem')}."
    )


def composite_set(data: WhatsUp, reference: str) -> StimulusSet:
    """Returns the setting of all composites around one reference: left and right only.

    Raises `DataError` for a reference with fewer than three objects photographed on both sides.
    """
    names = data.satellites(reference)
    if len(names) < 3:
        raise DataError(
            f"This copy of What'sUp has photographs both left and right of {reference!r} for "
            f"{counted(len(names), 'object')}; composites need at least 3 "
            f"({counted(len(data.problems), 'problem')}, the first: "
            f"{data.problems[0] if data.problems else 'none'})."
        )

    def draw(
        entities: Sequence[str | None],
        axis: str,
        layout: Layout,
        _background: Image.Image | None = None,
    ) -> Image.Image:
        left, middle, right = entities
        if left is None or right is None or axis != "horizontal":
            raise DataError(
                f"What'sUp has composites of three objects in a row; {list(entities)}, {axis}, is "
                "not one. Experiments that show one object alone need another setting."
            )
        return composite(data, left, str(middle), right, layout.canvas)

    return StimulusSet(
        name=f"whatsup-{reference}",
        title=f"What'sUp around the {reference}",
        names=names,
        draw=draw,
        prompt=_prompt,
        directions=("left", "right"),
        middle=reference,
        layout=partial(layout_of, reference),
    )


def _prompt(question: Question) -> str:
    return WHATSUP.format(preposition=PREPOSITION[question.direction], reference=question.reference)
