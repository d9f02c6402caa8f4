"""From the values of one row to an `OwnItem`, or to its problems in words."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hooked_vlm.analysis import scoring
from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.own.items import EVERY, Box, OwnItem, Picture
from hooked_vlm.stimuli.pictures import UNREADABLE, is_inside


NEEDED = ("image", "question", "answer")
COLUMNS = (
    "id",
    *NEEDED,
    "counterfactual",
    "counterfactual_answer",
    "other_answers",
    "boxes",
    "masks",
    "split",
    "direction",
    "label",
)
SPLITS = ("train", "test")
normalise = lru_cache(maxsize=10_000)(scoring.normalise)
"""Answers repeat in a table of many rows."""
Size = tuple[int, int]
SizeOf = Callable[[Picture], Size]
"""Returns the size of a picture; raises `DataError`, in words without its name."""


class RowReader:
    """Reads rows one by one, and collects what is wrong with each."""

    def __init__(self, folder: Path | None, size_of: SizeOf) -> None:
        self.folder, self.size_of = folder, size_of
        self.known: dict[str, Picture] = {}
        self.problems: list[str] = []

    def read(self, where: str, row: Mapping[str, Any], number: int) -> OwnItem | None:
        """Returns a row's item, or None after its problems were added to `problems`."""
        before = len(self.problems)
        own = {name: _plain(row[name]) for name in COLUMNS if name in row}
        values = {name: value for name, value in own.items() if not _is_blank(value)}
        found: dict[str, Any] = {"where": where}

        def take(name: str, read: Callable[[Any], Any], otherwise: Any) -> Any:
            found[name] = otherwise
            if name in values:
                try:
                    found[name] = read(values[name])
                except DataError as error:
                    self.problems.append(f"{where}: {name} {error}")
            elif name in NEEDED or (name == "id" and name in row):
                self.problems.append(f"{where}: {name} is empty")
            return found[name]

        take("id", _text, str(number))
        image = take("image", self._picture, None)
        take("question", _words, "")
        answer = take("answer", _answer, "")
        other = take("counterfactual", self._picture, None)
        take("other_answers", _answers, ())
        take("counterfactual_answer", _answer, None)
        take("boxes", _boxes, {})
        take("masks", self._masks, {})
        take("split", _split, None)
        take("direction", _text, EVERY)
        take("label", _text, None)
        self.problems += [f"{where}: {said}" for said in _contradictions(found, answer)]
        if image is not None:
            size = self._size(where, "image", image)
            if size is not None:
                self._check_places(where, found, size, other)
        if len(self.problems) > before:
            return None
        if other is not None and found["counterfactual_answer"] is None and found["other_answers"]:
            found["counterfactual_answer"] = found["other_answers"][0]
        return OwnItem(**found)

    def _size(self, where: str, name: str, picture: Picture) -> Size | None:
        try:
            return self.size_of(picture)
        except DataError as error:
            self.problems.append(f"{where}: {name} {_named(picture)} {error}")
            return None

    def _check_places(
        self, where: str, found: Mapping[str, Any], size: Size, other: Picture | None
    ) -> None:
        width, height = size
        for name, (x0, y0, x1, y1) in found["boxes"].items():
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                self.problems.append(
                    f"{where}: box {name[:40]!r} is ({x0:g}, {y0:g}, {x1:g}, {y1:g}); expected "
                    f"(x0, y0, x1, y1) with x0 < x1 and y0 < y1 inside the picture of "
                    f"{width}x{height} px"
                )
        same = [*found["masks"].items(), *([("counterfactual", other)] if other else [])]
        for name, picture in same:
            own = self._size(where, name, picture)
            if own is not None and own != size:
                self.problems.append(
                    f"{where}: {name} {_named(picture)} has {own[0]}x{own[1]} px and the picture "
                    f"{width}x{height}; expected one size"
                )
            elif own is not None and picture is not other and (fault := _fault_of(picture)):
                self.problems.append(f"{where}: mask {name[:40]!r} {fault}")
        for name in sorted(set(found["boxes"]) & set(found["masks"])):
            self.problems.append(f"{where}: {name[:40]!r} is the name of a box and of a mask")

    def _masks(self, value: Any) -> dict[str, Picture]:
        return {name: self._picture(given) for name, given in _mapping(value).items()}

    def _picture(self, value: Any) -> Picture:
        if isinstance(value, Picture):
            return value
        if isinstance(value, Image.Image):
            return self._in_memory(value)
        if isinstance(value, str) and value.strip():
            if value not in self.known:
                self.known[value] = self._file(value.strip())
            return self.known[value]
        if isinstance(value, Path):
            return Picture(str(value), value)
        raise DataError(f"is {shown(value)}; expected the path of a picture, or a picture")

    def _in_memory(self, picture: Image.Image) -> Picture:
        try:
            content = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
        except UNREADABLE as error:
            raise DataError(f"cannot be read as a picture: {str(error)[:120]}") from None
        return Picture(hashlib.blake2b(content, digest_size=16).hexdigest(), picture)

    def _file(self, name: str) -> Picture:
        path = Path(name)
        if self.folder is not None:
            if not is_inside(name):
                raise DataError(f"{shown(name)} leads out of the table's folder")
            if "\\" in name and not (self.folder / path).exists():  # as Windows writes paths
                path = Path(name.replace("\\", "/"))
            # Known by its place in the data, wherever these are.
            return Picture(path.as_posix(), self.folder / path)
        return Picture(str(path), path)


def unknown_columns(columns: Any) -> list[str]:
    """Returns what is wrong with the names of a table's columns, in words.

    >>> unknown_columns(["image", "question", "anwser"])
    ["column 'anwser' is unknown. Did you mean 'answer'?", "column 'answer' is missing"]
    """
    known = [str(column) for column in columns if not str(column).startswith("_")]
    problems = []
    for column in dict.fromkeys(known):
        if column not in COLUMNS:
            hint = did_you_mean(column, COLUMNS) or (
                f" Use one of {', '.join(COLUMNS)}, or begin its name with _ to have it ignored."
            )
            problems.append(f"column {column[:40]!r} is unknown.{hint}")
        if known.count(column) > 1:
            problems.append(f"column {column[:40]!r} is there {known.count(column)} times")
    return [*problems, *(f"column {name!r} is missing" for name in NEEDED if name not in known)]


def _contradictions(found: Mapping[str, Any], answer: str) -> list[str]:
    """Returns in words which of a row's answers contradict each other."""
    said = []
    if answer and normalise(answer) in [normalise(other) for other in found["other_answers"]]:
        said.append(f"answer {answer[:40]!r} is among other_answers too")
    counterfactual = found["counterfactual_answer"]
    if counterfactual is not None:
        if found["counterfactual"] is None:
            said.append("counterfactual_answer is given without a counterfactual")
        if answer and normalise(counterfactual) == normalise(answer):
            said.append(f"counterfactual_answer is the answer itself, {answer[:40]!r}")
    return said


def _plain(value: Any) -> Any:
    """Returns a number or an array of numpy as Python's own."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _is_blank(value: Any) -> bool:
    """Returns whether a cell is empty; a NaN is one in tables of pandas."""
    if isinstance(value, float) and math.isnan(value):
        return True
    if isinstance(value, str | list | tuple | dict):
        return not (value.strip() if isinstance(value, str) else value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # of pandas


def _fault_of(mask: Picture) -> str:
    """Returns in words what is wrong with a mask; an empty text where nothing is."""
    try:
        return "" if mask.pixels().any() else "is black throughout"
    except DataError as error:  # whose header alone was read
        return f"cannot be used: {error}"


def _named(picture: Picture) -> str:
    return f"'{picture.source}'" if isinstance(picture.source, Path) else ""


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"is {shown(value)}; expected a text")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool | int | float | str):
        return str(value).strip()
    raise DataError(f"is {shown(value)}; expected a text or a number")


def _answer(value: Any) -> str:
    text = _text(value)
    if not normalise(text):
        raise DataError(f"is {shown(value)}, which has no letter and no digit")
    return text


def _answers(value: Any) -> tuple[str, ...]:
    """Returns a list of answers; as text, a JSON list or answers with ; between them."""
    if isinstance(value, str):
        text = value.strip()
        value = _json(text) if text.startswith("[") else [x for x in text.split(";") if x.strip()]
    if not isinstance(value, list | tuple):
        raise DataError(f"is {shown(value)}; expected a list, or answers with ; between them")
    return tuple(dict.fromkeys(map(_answer, value)))


def _split(value: Any) -> str:
    text = _text(value).lower()
    if text not in SPLITS:
        raise DataError(
            f"is {shown(value)}; expected {' or '.join(SPLITS)}.{did_you_mean(text, SPLITS)}"
        )
    return text


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json(value)
    if not isinstance(value, Mapping):
        raise DataError(f"is {shown(value)}; expected values by name, as in {{'cup': …}}")
    if not all(isinstance(name, str) and name.strip() for name in value):
        raise DataError("has an empty name")
    names = [name.strip() for name in value]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"has {twice[:40]!r} twice")
    # A data set has every name in every row, with None where a row lacks it.
    return {name.strip(): given for name, given in value.items() if given is not None}


def _boxes(value: Any) -> dict[str, Box]:
    found = {}
    for name, box in _mapping(value).items():
        numbers = list(_plain(box)) if isinstance(box, list | tuple | np.ndarray) else []
        numbers = [_plain(number) for number in numbers]
        if len(numbers) != 4 or not all(_is_number(x) for x in numbers):
            raise DataError(
                f"has {name[:40]!r}: {shown(box)}; expected four numbers [x0, y0, x1, y1], in "
                "pixels"
            )
        found[name] = tuple(numbers)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object as a dict; raises `ValueError` for a name that repeats."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is there twice")
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is {shown(text)}, which is no JSON ({str(error)[:80]})") from None
