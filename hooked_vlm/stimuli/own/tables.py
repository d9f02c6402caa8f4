"""The rows of a table, wherever it is: a CSV or JSON-lines file, a data set, a list of mappings.

A row is `(where, values by column)`.  What cannot be read as a row is a problem, in words.
"""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError, MissingExtraError, counted
from hooked_vlm.stimuli.own.items import Picture
from hooked_vlm.stimuli.own.reading import without_repeats


NAMES = ("items.csv", "items.jsonl")
"""The tables that are looked for in a folder."""
SEPARATORS = (",", ";", "\t")
CHUNK = 1000
LONGEST = 10**6
"""Characters of a field of a CSV file."""


@dataclass
class Table:
    """The rows of one source, and what could not be read as one."""

    name: str
    folder: Path | None
    """Where pictures are looked for; None: they are in the rows."""
    columns: Sequence[str]
    rows: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    path: Path | None = None
    """The file, or the folder of a saved data set."""


def read_table(source: Any) -> Table:
    """Returns the rows of a folder, a file, a data set or a list of mappings.

    Raises `DataError` for a source that is no table at all.
    """
    if isinstance(source, str):
        if not source.strip():
            raise DataError("An empty text was given as the data. Give a folder or a table.")
        source = Path(source)
    if isinstance(source, Path):
        found = table_in(source)
        if found.is_dir():
            table = _of_dataset(_from_disk(found), found.name)
        else:
            table = _of_csv(found) if found.suffix.lower() != ".jsonl" else _of_lines(found)
        table.path = found
        return table
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas table
        source = source.to_dict("records")
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        return _of_dataset(source, type(source).__name__)
    if isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        columns = dict.fromkeys(str(column) for row in source for column in row)
        rows = [(f"row {number}", row) for number, row in enumerate(source)]
        return Table("the list", None, tuple(columns), rows)
    raise DataError(
        f"{shown(source)} was given as the data; expected a folder with items.csv or items.jsonl, "
        "such a file, a datasets.Dataset, or a list of mappings with one for each row."
    )


def table_in(path: Path) -> Path:
    """Returns the table of a folder, or the folder of a saved data set; raises `DataError`."""
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
            raise DataError(f"'{path}' was given; expected a table: *.csv, *.tsv or *.jsonl.")
        return path
    if not path.is_dir():
        raise DataError(f"There is no folder or table '{path}'. Give one that exists.")
    found = [path / name for name in NAMES if (path / name).is_file()]
    if len(found) > 1:
        raise DataError(f"'{path}' has both {' and '.join(NAMES)}. Keep one of them.")
    if found:
        return found[0]
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return path
    others = sorted(p.name for p in path.iterdir() if p.suffix.lower() in (".csv", ".jsonl"))
    hint = f" It has {', '.join(others)[:100]}." if others else ""
    raise DataError(
        f"There is no table in '{path}'; expected {' or '.join(NAMES)}.{hint} Write one row for "
        "each question, with the columns image, question and answer (docs/guide/own-data.md)."
    )


def _text_of(path: Path) -> str:
    """Returns the text of a UTF-8 file without its byte-order mark; raises `DataError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"'{path}' is text in UTF-16. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"'{path}' is not UTF-8: byte {content[error.start]:#04x} in line {line}. Save the "
            "table as UTF-8."
        ) from None


def _of_csv(path: Path) -> Table:
    text = _text_of(path)
    header = text.lstrip("\r\n").splitlines()[0] if text.strip() else ""
    separator = max(SEPARATORS, key=header.count)
    limit = csv.field_size_limit(LONGEST)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return _rows_of_csv(path, reader)
    finally:
        csv.field_size_limit(limit)


def _rows_of_csv(path: Path, reader: Any) -> Table:
    columns: list[str] = []
    table = Table(path.name, path.parent, columns)
    while True:
        start = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            where = f"{path.name}:{start}"
            table.problems.append(f"{where}: no CSV ({error}); the rest of the file is not read")
            return table
        if values is None:
            return table
        if not any(value.strip() for value in values):
            continue
        if not columns:
            columns += _without_blank_end([value.strip() for value in values])
            continue
        values = [*values[: len(columns)], *_without_blank_end(values[len(columns) :])]
        where = f"{path.name}:{start}"
        if len(values) != len(columns):
            table.problems.append(
                f"{where}: {counted(len(values), 'field')}; the header has {len(columns)}. Quote a "
                "field that has a separator in it"
            )
            continue
        table.rows.append((where, dict(zip(columns, values, strict=True))))


def _without_blank_end(values: list[str]) -> list[str]:
    """Returns fields without the empty ones at the end, as spreadsheets write them."""
    while values and not values[-1].strip():
        values = values[:-1]
    return values


def _of_lines(path: Path) -> Table:
    columns: dict[str, None] = {}
    table = Table(path.name, path.parent, ())
    # Of all that `splitlines` takes for an end of line, JSON allows the others inside texts.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=without_repeats, parse_constant=_refuse)
        except RecursionError:
            table.problems.append(f"{where}: nested too deeply")
            continue
        except ValueError as error:
            table.problems.append(f"{where}: no JSON object ({error})")
            continue
        if not isinstance(row, dict):
            table.problems.append(f"{where}: {shown(row)}; expected an object, as in {{…}}")
            continue
        columns |= dict.fromkeys(row)
        table.rows.append((where, row))
    table.columns = tuple(columns)
    return table


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _from_disk(folder: Path) -> Any:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise MissingExtraError(
            f"'{folder}' is a saved data set, which the package datasets reads. Install it: pip "
            "install 'hooked-vlm[datasets]'."
        ) from None
    try:
        return datasets.load_from_disk(str(folder))  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{folder}' cannot be read as a saved data set: {str(error)[:120]}. Save it again."
        ) from None


def _of_dataset(dataset: Any, name: str) -> Table:
    """Returns the rows of a Hugging Face data set, whose pictures stay where they are."""
    if isinstance(dataset.column_names, Mapping):  # a DatasetDict
        parts = ", ".join(map(str, dataset))
        raise DataError(f"A data set of several parts was given ({parts}). Give one: data['…'].")
    table = Table(f"the {name}", None, tuple(dataset.column_names))
    kinds = sys.modules.get("datasets")
    names: dict[str, Callable[[Any], Any]] = {}
    if kinds is not None and getattr(dataset, "features", None):
        dataset = dataset.with_format(None)  # arrays of torch or numpy have no texts
        for column, feature in dataset.features.items():
            if isinstance(feature, kinds.Image):
                dataset = dataset.cast_column(column, kinds.Image(decode=False))
            own = getattr(feature, "feature", feature)  # of a list, that of its entries
            if isinstance(own, kinds.ClassLabel):  # numbers of names
                names[column] = own.int2str
    for start in range(0, len(dataset), CHUNK):
        chunk = dataset[start : start + CHUNK]
        for i in range(len(next(iter(chunk.values()), ()))):
            row = {
                column: _named(names[column], values[i])
                if column in names
                else _kept(values[i], dataset, start + i, column)
                for column, values in chunk.items()
            }
            table.rows.append((f"row {start + i}", row))
    return table


def _named(name_of: Callable[[Any], Any], value: Any) -> Any:
    """Returns the name, or the names, of a class label; None of none."""
    return None if value is None or value == -1 else name_of(value)


def _kept(value: Any, dataset: Any, index: int, column: str) -> Any:
    """Returns a value; of an encoded picture, where it is, so that not all are in memory."""
    if not isinstance(value, Mapping) or set(value) != {"bytes", "path"}:
        return value
    if value["bytes"] is None:
        return Path(value["path"])
    digest = hashlib.blake2b(value["bytes"], digest_size=16).hexdigest()

    def opened() -> Image.Image:
        return Image.open(io.BytesIO(dataset[index][column]["bytes"]))

    return Picture(digest, opened)
