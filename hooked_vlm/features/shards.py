"""Files of stored features: a manifest, one safetensors file for each batch, and an end mark.

A reader sees all of a file or nothing: see `disk.files`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.disk.files import remove_leftovers, replaced_file, write_file
from hooked_vlm.errors import DataError, counted
from hooked_vlm.features.items import plain_label


FORMAT = 1
"""The version of the layout of these files."""
MANIFEST, END = "manifest.json", "complete.json"
LENGTHS = "#lengths"


@dataclass(frozen=True, eq=False)
class Shard:
    """The features of one batch, and what is known of its items."""

    indices: list[int]
    labels: list[Any]
    texts: list[str]
    features: list[dict[str, Tensor]]
    problems: dict[int, str] = field(default_factory=dict)
    first: str = ""
    """A digest of the batch's first item; empty where it cannot be read."""
    n_items: int = 0


def shard_path(folder: Path, number: int) -> Path:
    """Returns the file of a batch."""
    return folder / f"shard-{number:06}.safetensors"


def open_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder with its manifest; raises `DataError` for one of anything else."""
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"'{folder}' is not empty, and holds no features. Give another folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(manifest, indent=1))
        except OSError as error:
            raise DataError(
                f"Cannot write to the folder '{folder}': {error.strerror or error}. Name a folder "
                "with write permission."
            ) from None
        return
    found = read_manifest(folder)
    if found != manifest and not any(folder.glob("shard-*.safetensors")):
        write_file(path, json.dumps(manifest, indent=1))  # nothing was computed yet
        return
    other = [name for name, value in manifest.items() if found.get(name) != value]
    if other:
        name = other[0]
        raise DataError(
            f"'{folder}' holds features with another {name}: {str(found.get(name))[:70]}, not "
            f"{str(manifest[name])[:70]}"
            + (f" (and another {', '.join(other[1:4])})" if other[1:] else "")
            + ". Give another folder, or the same arguments to resume."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns what a folder's features are of; raises `DataError` for a folder of none."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        if found["format"] == FORMAT:
            return found
        said = f"it has format {found['format']}, and this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{MANIFEST}: {str(error)[:100]}"
    raise DataError(f"'{folder}' is no folder of extract: {said}.")


def write_shard(folder: Path, number: int, shard: Shard) -> None:
    """Writes a batch completely, or not at all."""
    tensors: dict[str, Tensor] = {}
    for name in shard.features[0] if shard.features else ():
        rows = [features[name] for features in shard.features]
        pooled_alike = len({x.shape for x in rows}) == 1
        tensors[name] = torch.stack(rows) if pooled_alike else torch.cat(rows)
        if not pooled_alike:
            tensors[f"{name}{LENGTHS}"] = torch.tensor([len(x) for x in rows])
    about = {
        "indices": shard.indices,
        "labels": [plain_label(label) for label in shard.labels],
        "texts": shard.texts,
        "problems": shard.problems,
        "first": shard.first,
        "n_items": shard.n_items,
    }
    path = shard_path(folder, number)
    whole = {n: x.contiguous() for n, x in tensors.items()}
    try:
        with replaced_file(path) as building:
            save_file(whole, building, {"about": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"'{path}' cannot be written: {str(error)[:150]}. Earlier batches are kept; run the "
            "same call again to resume."
        ) from None


def read_header(path: Path) -> dict[str, Any] | None:
    """Returns what is known of a batch's items; None for a damaged file, to be made again."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            names = list(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return {**about, "names": names} if "first" in about else None


def read_site(path: Path, name: str) -> Tensor | list[Tensor]:
    """Returns a site's features of a batch: `[item, …]`, or a list where items differ in size."""
    with safe_open(path, framework="pt") as file:
        value = file.get_tensor(name)
        if f"{name}{LENGTHS}" not in file.keys():  # noqa: SIM118 (not a dict: it has no iterator)
            return value
        lengths = file.get_tensor(f"{name}{LENGTHS}").tolist()
    return list(value.split(lengths))


def finish(folder: Path) -> None:
    """Marks the features as complete."""
    numbers = sorted(folder.glob("shard-*.safetensors"))
    write_file(folder / END, json.dumps({"shards": len(numbers)}))


def require_complete(folder: Path) -> list[Path]:
    """Returns the files of all batches; raises `DataError` where some are missing."""
    paths = sorted(folder.glob("shard-*.safetensors"))
    try:
        expected = json.loads((folder / END).read_text())["shards"]
    except (OSError, ValueError, KeyError):
        raise DataError(
            f"'{folder}' is not complete: it holds {counted(len(paths), 'batch', 'batches')}. Run "
            "extract again with the same arguments to resume, or read it with partial=True."
        ) from None
    if expected != len(paths):
        raise DataError(
            f"'{folder}' holds {counted(len(paths), 'batch', 'batches')} of {expected}. Run "
            "extract again with the same arguments."
        )
    return paths


def reopen(folder: Path) -> None:
    """Removes the end mark, which holds again at the end, and files of killed processes."""
    (folder / END).unlink(missing_ok=True)
    remove_leftovers(folder)
