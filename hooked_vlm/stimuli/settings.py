"""The settings by name: Squares, Shapes, Objects, each on white or on photographs; What'sUp.

A setting defines the stimuli; every experiment runs on any of them.  Settings of other
distributions are found here too (`register_setting`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.extensions.found import Extensions
from hooked_vlm.stimuli import objects, photographs, shapes, squares
from hooked_vlm.stimuli.datasets import whatsup
from hooked_vlm.stimuli.extension import AddedSetting, setting_of
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.own.data import OwnData
from hooked_vlm.stimuli.own.tables import NAMES, table_in
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.pictures import stamp_of
from hooked_vlm.stimuli.prompts import OTHER_WORDS, PREPOSITION
from hooked_vlm.stimuli.scattered import scattered_layout
from hooked_vlm.stimuli.sets import Draw
from hooked_vlm.stimuli.sets import StimulusSet as StimulusSet


@checked(DataError, but=("name",))
def stimulus_set(
    name: str,
    *,
    cutouts: Path | None = None,
    backgrounds: Path | None = None,
    data: Path | None = None,
    other_words: bool = False,
) -> StimulusSet:
    """Returns a setting: `squares`, `shapes`, `objects`, `whatsup-…`, or a variant.

    With `-photos` the first three have photographs as backgrounds.  With `-scattered` their objects
    stand anywhere, in their order along the asked axis; experiments that read cells of objects or
    strips refuse them.
    `shapes-inset` has the shapes as two shipped models saw them in training: smaller.

    `cutouts` and `backgrounds` are folders of a user's own pictures, used instead of the
    shipped ones; `data` is the folder of What'sUp; `other_words` selects a second phrasing.

    Raises `DataError` for an unknown name or an unusable folder.
    """
    require_known(name)
    if (own := added_setting(name)) is not None:
        return own.stimuli(
            cutouts=cutouts, backgrounds=backgrounds, data=data, other_words=other_words
        )
    if name == OWN:
        raise DataError(
            "The setting 'own' is not drawn: OwnData.read(FOLDER) returns your own pictures."
        )
    if name in whatsup.SETTINGS:
        return whatsup.composite_set(
            whatsup.load(_folder(name, data)), name.removeprefix("whatsup-")
        )
    plain, _, variant = name.partition("-")
    names, draw, prompt = _MAKE[plain](cutouts)
    grounds, title, layout = {}, plain.capitalize(), geometry_for
    if name == INSET:
        draw, title = partial(draw, drawing="inset"), f"{title}, drawn inset"
    elif name in SCATTERED:
        title, layout = f"{title}, scattered", scattered_layout
    elif variant:
        title = f"{title} on photographs"
        grounds = (
            photographs.load_photographs(backgrounds) if backgrounds is not None else _scenes()
        )
    return StimulusSet(
        name=name,
        title=title,
        names=names,
        draw=draw,
        prompt=partial(_other_prompt, plain) if other_words else prompt,
        grounds=grounds,
        spares={} if plain == "objects" else squares.SPARES,
        layout=layout,
    )


def require_known(name: str, known: Sequence[str] = ()) -> None:
    """Raises `DataError` unless `name` is among `known` settings (default: all settings)."""
    known = known or (*_built_in(), *EXTENSIONS.names())
    if not isinstance(name, str) or name not in known:
        raise DataError(
            f"There is no setting {name!r} here.{did_you_mean(name, known)} Use one of: "
            f"{', '.join(known)}."
        )


def files_of(
    name: str,
    *,
    cutouts: Path | None = None,
    backgrounds: Path | None = None,
    data: Path | None = None,
) -> dict[str, Path]:
    """Returns the files of a user that a setting reads, by a name that is free of folders.

    Raises `DataError` as `stimulus_set` does.
    """
    require_known(name)
    if (own := added_setting(name)) is not None:
        return own.files(cutouts=cutouts, backgrounds=backgrounds, data=data)
    if name == OWN:
        return own_data(data).files()
    if name in whatsup.SETTINGS:
        folder = _folder(name, data)
        items = whatsup.load(folder).items
        pictures = {f"data/{item.path.relative_to(folder)}": item.path for item in items}
        return {"data": whatsup.listing_of(folder), **pictures}
    found = {}
    if name.startswith("objects") and cutouts is not None:
        found |= {f"cutouts/{path.name}": path for path in objects.files_in(cutouts)}
    if name.endswith("-photos") and backgrounds is not None:
        found |= {f"backgrounds/{path.name}": path for path in photographs.files_in(backgrounds)}
    return found


@checked(DataError)
def register_setting(name: str, make: Callable[..., StimulusSet], *, replace: bool = False) -> None:
    """Adds a setting under a name, for the rest of this process.

    `make` returns its `StimulusSet`.  It is called with those of the keyword arguments `cutouts`,
    `backgrounds`, `data` (folders, or None) and `other_words` that its signature names.  All files
    of a folder that it names count as data of a result.

    A distribution makes a setting known for good by an entry point `name = "module:make"` in the
    group `hooked_vlm.settings`.

    Raises `DataError` for a name that is taken (unless `replace`, and it is none of this
    package's), and for a function with other arguments.

    >>> from dataclasses import replace
    >>> register_setting(
    ...     "two-colours",
    ...     lambda: replace(
    ...         stimulus_set("squares"), name="two-colours", names=("red", "green", "blue")
    ...     ),
    ... )
    >>> len(stimulus_set("two-colours").items())
    24
    """
    EXTENSIONS.register(name, make, replace=replace)


def _built_in() -> tuple[str, ...]:
    return (*SETTINGS, *SCATTERED, *whatsup.SETTINGS, OWN)


def added_setting(name: str) -> AddedSetting | None:
    """Returns the setting of another distribution; None for this package's settings.

    Raises `DataError` for one that cannot be used.
    """
    return None if name in _built_in() else EXTENSIONS.get(name)


def own_data(data: Path | None) -> OwnData:
    """Returns a user's own data from the folder that has them, read once as long as they are the
    same: the table, its pictures, and all files of a saved data set.

    Raises `DataError` without a folder, and `DataProblemsError` for data with problems.
    """
    if data is None:
        raise DataError(
            "The setting 'own' needs your data: give data=FOLDER (--data FOLDER) with items.csv or "
            "items.jsonl. docs/guide/own-data.md describes them."
        )
    place = data, table_in(data).resolve()
    if (last := _LAST.get(place)) is not None and _stamps(last[0]) == last[1]:
        return last[0]
    found = OwnData.read(data)
    _LAST.clear()
    _LAST[place] = found, _stamps(found)
    return found


_LAST: dict[tuple[Path, Path], tuple[OwnData, Any]] = {}
"""The data that were read last, with the stamps of their files."""


def _stamps(data: OwnData) -> dict[str, tuple[int, ...] | None]:
    found: dict[str, tuple[int, ...] | None] = {}
    for name, path in data.files().items():
        try:
            found[name] = stamp_of(path)
        except OSError:  # removed since
            found[name] = None
    return found


def is_own(data: Path | None) -> bool:
    """Returns whether a folder has a user's own data, by its table."""
    if data is None or not data.is_dir():
        return False
    if any((data / name).is_file() for name in NAMES):  # of both, `own_data` says what is wrong
        return True
    try:
        table_in(data)
    except DataError:
        return False
    return True


def _folder(name: str, data: Path | None) -> Path:
    if data is None:
        raise DataError(
            f"The setting {name!r} needs your copy of What'sUp: give data=FOLDER (--data "
            "FOLDER). docs/reference/data.md describes the folder's layout."
        )
    return data


def _other_prompt(plain: str, question: Question) -> str:
    reference = question.reference
    if plain == "shapes":
        reference = f"{reference} {shapes.FORMS[reference]}"
    preposition = PREPOSITION[question.direction]
    return OTHER_WORDS[plain].format(preposition=preposition, reference=reference)


def _scenes() -> dict[str, Image.Image]:
    return {name: photographs.shipped(name) for name in photographs.SCENES}


def _objects(cutouts: Path | None) -> tuple[tuple[str, ...], Draw, Callable[[Question], str]]:
    if cutouts is None:
        return objects.NAMES, objects.draw, objects.prompt
    loaded = objects.load_cutouts(cutouts)
    if len(loaded) < 5:
        raise DataError(
            f"'{cutouts}' has {len(loaded)} cut-outs; pairs need five different ones. Give a "
            "folder with five or more."
        )
    return tuple(loaded), partial(objects.draw, cutouts=loaded), objects.prompt


_MAKE: dict[str, Callable[[Path | None], Any]] = {
    "squares": lambda _: (tuple(squares.COLORS), squares.draw, squares.prompt),
    "shapes": lambda _: (tuple(shapes.SHAPE_OF), shapes.draw, shapes.prompt),
    "objects": _objects,
}
OWN = "own"
"""A user's own pictures and questions, from a folder with a table."""
INSET = "shapes-inset"
"""Shapes at 0.9 of the published size, as in the training of two shipped models."""
SETTINGS = (*_MAKE, *(f"{name}-photos" for name in _MAKE), INSET)
"""The settings that need only data of the package, with objects in rows and columns."""
SCATTERED = tuple(f"{name}-scattered" for name in _MAKE)
"""The same with objects anywhere: harder questions, for experiments that read no cells."""
EXTENSIONS = Extensions("hooked_vlm.settings", "setting", setting_of, taken=_built_in)
"""The settings of other distributions."""
