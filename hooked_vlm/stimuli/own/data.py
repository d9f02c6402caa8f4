"""A user's data as a whole: read, checked before a model is loaded, and listed with its problems.

All problems are listed at once, each with its file and line; data with a problem are not used at
all, so that no experiment runs on half of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.analysis.scoring import is_single_token
from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.errors import DataError, DataProblemsError, counted
from hooked_vlm.stimuli.own.items import OwnItem, Picture
from hooked_vlm.stimuli.own.reading import RowReader, Size, normalise, unknown_columns
from hooked_vlm.stimuli.own.tables import Table, read_table
from hooked_vlm.stimuli.pictures import UNREADABLE, size_of


DECODED = 2000
"""Pictures that are decoded while they are checked; of more, the headers alone are read."""


@dataclass(frozen=True, eq=False, repr=False)
class OwnData(OneLine):
    """Items without a problem, in the order of their table.

    >>> from PIL import Image
    >>> row = {"image": Image.new("RGB", (96, 96)), "question": "Its color is ", "answer": "black"}
    >>> data = OwnData.read([row, {**row, "question": "The picture is "}])
    >>> len(data), data.items[0].answer, data.has("counterfactual")
    (2, 'black', 0)
    """

    items: tuple[OwnItem, ...]
    name: str = "own data"
    """What it was read from: `"items.csv"`."""
    path: Path | None = None
    """The table's file, or the folder of a saved data set; None: data in memory."""
    left_out: tuple[str, ...] = field(default=())
    """The ids of items that were left out at the user's wish."""

    @classmethod
    def read(cls, source: Any, *, columns: Mapping[str, str] | None = None) -> "OwnData":
        """Returns the data of a folder, a table, a data set or a list of mappings.

        A folder has `items.csv` or `items.jsonl` and the pictures that it names, or is a data set
        that was saved to disk.  Columns: image, question, answer; id, counterfactual,
        counterfactual_answer, other_answers, boxes, masks, split, direction, label.  `columns` maps
        these names to those of the table where they differ.

        Raises `DataProblemsError`, which lists every problem with its file and line, and
        `DataError` where there is no table.

        >>> OwnData.read([{"image": "cat.png", "question": "", "anwser": "cat"}])
        Traceback (most recent call last):
        hooked_vlm.errors.DataProblemsError: 2 problems in the list; nothing was run.
          column 'anwser' is unknown. Did you mean 'answer'?
          column 'answer' is missing
        """
        table = _renamed(read_table(source), columns or {})
        problems = unknown_columns(table.columns) if table.rows or table.columns else []
        _refuse(table, problems)
        reader = RowReader(table.folder, _sizes(len(table.rows)))
        items = []
        for number, (where, row) in enumerate(table.rows, start=1):
            item = reader.read(where, row, number)
            if item is not None:
                items.append(item)
        order = {where: number for number, (where, _) in enumerate(table.rows)}
        problems = sorted(
            [*table.problems, *reader.problems, *_across(items)],
            key=lambda said: order.get(said.partition(": ")[0], -1),
        )
        if not problems and not items:
            problems = ["no row: the table has a header at most"]
        _refuse(table, problems)
        return cls(tuple(items), table.name, table.path)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def directions(self) -> tuple[str, ...]:
        """The groups of questions, in the order in which they first appear."""
        return tuple(dict.fromkeys(item.direction for item in self.items))

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer that a row names, once."""
        return tuple(dict.fromkeys(a for item in self.items for a in item.answers))

    def has(self, column: str) -> int:
        """Returns the number of items that have something in an optional column.

        Masks count as boxes.  Raises `DataError` for an unknown column.
        """
        if column == "boxes":
            return sum(bool(item.names) for item in self.items)
        if column not in OwnItem.__dataclass_fields__:
            raise DataError(f"There is no column {shown(column)}.")
        return sum(bool(getattr(item, column)) for item in self.items)

    def files(self) -> dict[str, Path]:
        """Returns the files of the data by a name that is free of folders; none of data in memory.

        >>> OwnData(()).files()
        {}
        """
        if self.path is None:
            return {}
        if self.path.is_dir():
            return {f"data/{file.name}": file for file in self.path.iterdir() if file.is_file()}
        found = {"data": self.path}
        for item in self.items:
            for picture in (item.image, item.counterfactual, *item.masks.values()):
                if picture is not None and isinstance(picture.source, Path):
                    name = picture.source.relative_to(self.path.parent).as_posix()
                    found[f"data/{name}"] = picture.source
        return found

    def for_tokenizer(self, tokenizer: Any, *, leave_out: bool = False) -> "OwnData":
        """Returns the data, whose answers must all be one token of a model.

        `leave_out` leaves out the others; their ids are in `left_out`.  Raises
        `DataProblemsError`, which lists them, or if none is left.
        """
        known = {answer: is_single_token(tokenizer, answer) for answer in self.answers}
        long = {
            item.id: [answer for answer in item.answers if not known[answer]]
            for item in self.items
            if not all(known[answer] for answer in item.answers)
        }
        if not long:
            return self
        if leave_out and len(long) < len(self.items):
            kept = tuple(item for item in self.items if item.id not in long)
            return replace(self, items=kept, left_out=(*self.left_out, *long))
        raise DataProblemsError(
            f"{len(long)} of {counted(len(self.items), 'item')} have an answer that is several "
            "tokens for this model; expected one token, at the start of a text and after a space. "
            "Use other words, or --set leave-out-long-answers=true.",
            [
                f"{item.where}: id {item.id[:40]!r}: {', '.join(map(repr, long[item.id]))[:120]}"
                for item in self.items
                if item.id in long
            ],
        )


def _renamed(table: Table, columns: Mapping[str, str]) -> Table:
    """Returns a table with this package's names of columns instead of the user's."""
    own = {theirs: name for name, theirs in columns.items()}
    for theirs in own:
        if theirs not in table.columns:
            raise DataError(
                f"columns={shown(dict(columns))} was given, and {table.name} has no column "
                f"{theirs!r}; it has {', '.join(map(str, table.columns))[:120]}."
            )
    if not own:
        return table
    rows = [(w, {own.get(name, name): v for name, v in row.items()}) for w, row in table.rows]
    return replace(table, columns=[own.get(c, c) for c in table.columns], rows=rows)


def _refuse(table: Table, problems: Sequence[str]) -> None:
    if problems:
        said = f"{counted(len(problems), 'problem')} in {table.name}; nothing was run."
        raise DataProblemsError(said, problems)


def _sizes(n: int) -> Callable[[Picture], Size]:
    """Returns a function that opens every picture once and remembers its size or its fault."""
    known: dict[str, Size | str] = {}

    def size(picture: Picture) -> Size:
        if picture.key not in known:
            try:
                known[picture.key] = _size(picture, whole=n <= DECODED)
            except DataError as error:
                known[picture.key] = str(error)
        found = known[picture.key]
        if isinstance(found, str):
            raise DataError(found)
        return found

    return size


def _size(picture: Picture, whole: bool) -> Size:
    if not isinstance(picture.source, Path):
        try:
            source = picture.source
            opened = source if isinstance(source, Image.Image) else source()
            if whole:
                opened.load()
            return opened.size
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise DataError(f"cannot be read as a picture: {str(error)[:120]}") from None
    if not picture.source.is_file():
        raise DataError("is missing" if not picture.source.exists() else "is no file")
    return size_of(picture.source, whole)


def _across(items: Sequence[OwnItem]) -> list[str]:
    """Returns in words what is wrong between rows: ids that repeat, answers that contradict."""
    problems = []
    first: dict[str, OwnItem] = {}
    asked: dict[tuple[str, str], OwnItem] = {}
    for item in items:
        before = first.setdefault(item.id, item)
        if before is not item:
            problems.append(f"{item.where}: id {item.id[:40]!r} is that of {before.where} too")
        same = asked.setdefault((item.image.key, " ".join(item.question.split())), item)
        if normalise(same.answer) != normalise(item.answer):
            problems.append(
                f"{item.where}: answer {item.answer[:40]!r}, and {same.where} has "
                f"{same.answer[:40]!r} for the same image and question"
            )
    return problems
