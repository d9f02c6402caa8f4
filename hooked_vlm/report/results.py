"""Saves results of experiments, and loads them for runs that would repeat them.

Each finished experiment is written to its own folder, with a key that hashes everything its
numbers depend on: the experiment, its configuration, the model's weights and this package's
source.  The next run reads the results with the same key and computes the others.  Nothing is
pickled: tables are CSV, arrays safetensors, pictures PNG, and the rest JSON.  A folder can
therefore be read without this package, and opened safely when it comes from others.

Each file is written under a temporary name and then renamed, so no reader sees a partial file.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image
from safetensors.numpy import load_file, save_file

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.result import Result


FORMAT = 3  # increase it when the files below change, so that old results are computed again


def run_key(experiment: str, config: Mapping[str, Any], model_sha256: str, version: str) -> str:
    """Returns the hash of everything that an experiment's numbers and sentences depend on.

    Unreleased versions can share a number and differ in source, so the source counts too.
    """
    everything = [FORMAT, experiment, dict(config), model_sha256, version, _source_sha256()]
    text = json.dumps(everything, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _source_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def writable_folder(path: Path) -> Path:
    """Creates the folder `path` if needed and returns it; raises `DataError` if not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise DataError(
            f"Cannot write to the output folder '{path}': {error.strerror or error}. "
            "Name a folder with write permission."
        ) from None
    return path


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file completely, or leaves the existing file unchanged."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """A result that was loaded from disk."""

    result: Result
    seconds: float
    """Seconds that its computation took."""


def save_result(result: Result, folder: Path, key: str, seconds: float = 0.0) -> Path:
    """Writes a result to `folder/<its key>`, replacing an older one; returns that folder."""
    target = folder / result.key
    folder.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{result.key}-", dir=folder))
    try:
        _write(result, building, {"key": key, "seconds": seconds})
        if target.exists():
            shutil.rmtree(target)
        building.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def load_result(folder: Path, name: str, key: str) -> Saved | None:
    """Returns the result saved under `name` (its `Result.key`) with this hash, or `None`."""
    source = folder / name
    try:
        about = json.loads((source / "result.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if about.get("key") != key:
        return None
    return Saved(_read(source, about), about["seconds"])


def read_result(folder: Path) -> Result:
    """Returns the result in one folder, whatever run or version it is of.

    Raises `DataError` where there is none.
    """
    try:
        about = json.loads((folder / "result.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise DataError(
            f"There is no result in '{folder}'. Give a folder inside a run's results/."
        ) from None
    return _read(folder, about)


def _write(result: Result, folder: Path, stamp: dict[str, Any]) -> None:
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
    save_file(arrays, folder / "arrays.safetensors")
    result.table.to_csv(folder / "table.csv", index=False)
    (folder / "images").mkdir()
    files = {name: f"images/{index:03}.png" for index, name in enumerate(result.images)}
    for name, file in files.items():
        result.images[name].save(folder / file)
    words = ("id", "name", "title", "claim", "section", "setting", "verdict", "config", "notes")
    about = {
        **stamp,
        **{word: getattr(result, word) for word in words},
        "columns": {str(name): str(dtype) for name, dtype in result.table.dtypes.items()},
        "arrays": labels,
        "images": files,
    }
    (folder / "result.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def _read(folder: Path, about: dict[str, Any]) -> Result:
    arrays = load_file(folder / "arrays.safetensors")
    # Read as text and then converted, which is exact; read_csv's own parsing rounds.
    columns = about["columns"]  # empty for an experiment that could not run
    table = pd.read_csv(folder / "table.csv", dtype=str).astype(columns) if columns else None
    fields = {field.name for field in dataclasses.fields(Result)}
    words = {word: value for word, value in about.items() if word in fields}
    return Result(
        **{
            **words,
            "notes": tuple(about["notes"]),
            "table": pd.DataFrame() if table is None else table,
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


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()  # open() is lazy, and the folder may be replaced later
