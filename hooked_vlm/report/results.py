"""Saves results of experiments, and loads them for runs that would repeat them.

Each finished experiment is written to its own folder, with a key that hashes everything its
numbers depend on (see `basis`).  The next run reads the results with the same key and computes
the others.  Nothing is pickled: tables are CSV, arrays safetensors, pictures PNG, and the rest
JSON.  A folder can therefore be read without this package, and opened safely when it comes
from others.

`result.json` has the checksum of every file in the folder and of itself.  A result that fails
a checksum is damaged: `load_result` warns and the experiment is computed again.
"""

import dataclasses
import hashlib
import io
import json
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image
from safetensors.numpy import load, save

from hooked_vlm.disk.files import (
    replaced_folder,
    restore,
    sha256_of,
    synchronise,
    write_synced,
)
from hooked_vlm.errors import DataError, HookedVLMWarning, callers_level
from hooked_vlm.experiments.result import Cases, Result


FORMAT = 5  # increase it when the files below change, so that old results are computed again
RESULTS = "results"
"""The folder, inside the output folder, that holds finished experiments."""
ABOUT, TABLE, ARRAYS = "result.json", "table.csv", "arrays.safetensors"
CASES = "cases.csv"
CONFIG = "config.json"
"""The arguments that compute a result again: `hooked-vlm run --config FILE`."""
_PICTURE = re.compile(r"images/\d+\.png")
_ATTEMPTS, _PAUSE_S = 5, 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """A result that was loaded from disk."""

    result: Result
    seconds: float
    """Seconds that its computation took."""


def save_result(
    result: Result,
    folder: Path,
    key: str,
    seconds: float = 0.0,
    *,
    made: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a result to `folder/<its key>`, replacing an older one; returns that folder.

    `made` says which run computed it, and `arguments` are those of the command line.
    """
    target = folder / result.key
    with replaced_folder(target) as building:
        _write(result, building, {"key": key, "seconds": seconds, "made": made})
        if arguments is not None:
            text = json.dumps(arguments, indent=2, default=str) + "\n"
            write_synced(building / CONFIG, text)
    return target


def load_result(folder: Path, name: str, key: str) -> Saved | None:
    """Returns the result saved under `name` (its `Result.key`) with this hash, or `None`.

    Warns about a damaged result, for which it returns `None` as well.
    """
    source = folder / name
    for attempt in range(_ATTEMPTS):
        restore(source)
        if not source.is_dir():
            return None
        try:
            about = _about(source)
            if about["key"] != key:
                return None
            return Saved(_read(source, about), float(about["seconds"]))
        except DataError as error:
            # Another process may be replacing the folder, so its files are read again.
            if attempt < _ATTEMPTS - 1:
                time.sleep(_PAUSE_S)
                continue
            warnings.warn(
                f"{error} It is computed again.", HookedVLMWarning, stacklevel=callers_level()
            )
    return None


def read_result(folder: Path) -> Result:
    """Returns the result in one folder, whatever run or version it is of.

    Raises `DataError` where there is none, and for a damaged one.
    """
    if not (folder / ABOUT).is_file():
        raise DataError(f"There is no result in '{folder}'. Give a folder inside a run's results/.")
    return _read(folder, _about(folder))


def made_by(folder: Path) -> dict[str, Any]:
    """Returns which run computed the result in a folder; empty where that was not noted.

    Raises `DataError` for a damaged result.
    """
    made = _about(folder).get("made")
    return made if isinstance(made, dict) else {}


def _write(result: Result, folder: Path, stamp: dict[str, Any]) -> None:
    # 1. Arrays, the table and pictures.
    arrays, labels = {}, {}
    for name, array in result.arrays.items():
        # safetensors writes raw memory, so a transposed array must be made contiguous first.
        arrays[name] = np.ascontiguousarray(array.values)
        labels[name] = {
            "dims": list(array.dims),
            "coords": {
                str(label): {"dims": list(values.dims), "values": values.values.tolist()}
                for label, values in array.coords.items()
            },
        }
    content = {ARRAYS: save(arrays), TABLE: result.table.to_csv(index=False).encode()}
    if result.cases is not None:
        content[CASES] = result.cases.table.to_csv(index=False).encode()
    files = {name: f"images/{index:03}.png" for index, name in enumerate(result.images)}
    for name, file in files.items():
        buffer = io.BytesIO()
        result.images[name].save(buffer, format="PNG")
        content[file] = buffer.getvalue()
    (folder / "images").mkdir()
    for file, data in content.items():
        write_synced(folder / file, data)
    synchronise(folder / "images")
    # 2. The rest, with the checksum of each file.
    words = ("id", "name", "title", "claim", "section", "setting", "verdict", "config", "notes")
    about = {
        **stamp,
        **{word: getattr(result, word) for word in words},
        **_shape(result.table),
        "cases": None
        if result.cases is None
        else {"failed": result.cases.failed, **_shape(result.cases.table)},
        "arrays": labels,
        "images": files,
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in content.items()},
    }
    about = json.loads(json.dumps(about, default=str))  # as it will be read
    text = json.dumps({**about, "sha256": _own_sha256(about)}, indent=2)
    write_synced(folder / ABOUT, text + "\n")


def _shape(table: pd.DataFrame) -> dict[str, Any]:
    """Returns what a table's CSV does not say: the types of its columns, and its length."""
    columns = {str(name): str(dtype) for name, dtype in table.dtypes.items()}
    return {"columns": columns, "rows": len(table)}


def _own_sha256(about: Mapping[str, Any]) -> str:
    """Returns the checksum of `result.json`, without the checksum in it."""
    rest = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _about(folder: Path) -> dict[str, Any]:
    """Returns `result.json`, after verifying its checksum and those of the other files.

    Raises `DataError` for a damaged result, and for a name of a file outside the folder.
    """
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{ABOUT} cannot be read ({type(error).__name__})") from None
    if not isinstance(about, dict) or about.get("sha256") != _own_sha256(about):
        raise _damaged(folder, f"{ABOUT} does not have the checksum that it states")
    images, files = about.get("images"), about.get("files")
    if not isinstance(images, dict) or not isinstance(files, dict):
        raise _damaged(folder, f"{ABOUT} does not list its files")
    for file in [*images.values(), *files]:
        _require_inside(folder, file)
    cases = [CASES] if about.get("cases") is not None else []
    for file in (TABLE, ARRAYS, *cases, *images.values()):
        try:
            found = sha256_of(folder / file)
        except OSError:
            raise _damaged(folder, f"{file} is missing") from None
        if found != files.get(file):
            raise _damaged(folder, f"{file} differs from its checksum")
    return about


def _require_inside(folder: Path, file: object) -> None:
    """Raises `DataError` unless `file` is one that `_write` writes, and no link out of `folder`."""
    known = isinstance(file, str) and (file in (TABLE, ARRAYS, CASES) or _PICTURE.fullmatch(file))
    if known and (folder / str(file)).resolve().is_relative_to(folder.resolve()):
        return
    shown = repr(file)[:80]
    raise _damaged(folder, f"{ABOUT} names {shown}, which is no file of a result")


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"The result in '{folder}' is damaged: {what}.")


def _read(folder: Path, about: Mapping[str, Any]) -> Result:
    """Returns a result whose files have been verified."""
    try:
        return _parsed(folder, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{ABOUT} does not describe its files ({type(error).__name__}: {error})"[:200]
        raise _damaged(folder, what) from None


def _parsed(folder: Path, about: Mapping[str, Any]) -> Result:
    arrays = load((folder / ARRAYS).read_bytes())
    cases = about.get("cases")
    words = {field.name for field in dataclasses.fields(Result)} & about.keys()
    return Result(
        **{
            **{word: about[word] for word in words},
            "notes": tuple(about["notes"]),
            "table": _table(folder / TABLE, about),
            "cases": cases and Cases(failed=cases["failed"], table=_table(folder / CASES, cases)),
            "arrays": {
                name: xr.DataArray(
                    arrays[name],
                    dims=label["dims"],
                    coords={k: (c["dims"], c["values"]) for k, c in label["coords"].items()},
                )
                for name, label in about["arrays"].items()
            },
            "images": {name: _picture(folder / file) for name, file in about["images"].items()},
        }
    )


def _table(path: Path, shape: Mapping[str, Any]) -> pd.DataFrame:
    columns = shape["columns"]  # empty for an experiment that could not run
    # Read as text and then converted, which is exact; read_csv's own parsing rounds.
    table = pd.DataFrame()
    if columns:
        text = pd.read_csv(path, dtype=str)
        truths = {name: text[name] == "True" for name, of in columns.items() if of == "bool"}
        table = text.assign(**truths).astype(columns)  # any text but an empty one is true
    if len(table) != shape["rows"] or list(table.columns) != list(columns):
        raise ValueError(f"{len(table)} rows in {path.name}, {shape['rows']} expected")
    return table


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()  # open() is lazy, and the folder may be replaced later
