"""Writes the value of a unit of work to one safetensors file, and reads it with the same bits.

A value is made of dicts, lists and tuples of texts, numbers, arrays, labelled arrays and tensors.
Arrays are the tensors of the file; the rest is JSON in its header, with a checksum of both.
Nothing is pickled.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_vlm.disk.files import write_file
from hooked_vlm.errors import DataError


ABOUT = "about"
"""The key of the JSON in the file's header."""
_ATTEMPTS = 5


def packed(value: Any, unit: str, content: str, seconds: float = 0.0) -> bytes:
    """Returns a value as the bytes of a file; `unit` and `content` say what it is the value of.

    `seconds` is the time that its computation took; see `seconds_of`.  Raises `DataError` for a
    value of another kind than the module's text lists.

    >>> unpacked(packed({"rows": [1, 0.5], "x": np.zeros(2)}, "rows 0", ""), "rows 0", "")["rows"]
    [1, 0.5]
    """
    tensors: dict[str, Tensor] = {}
    tree = _tree(value, tensors)
    about = {"unit": unit, "content": content, "seconds": round(seconds, 3), "value": tree}
    about["sha256"] = _sha256(about, tensors)
    return save(tensors, {ABOUT: json.dumps(about)})


def unpacked(data: bytes, unit: str, content: str) -> Any:
    """Returns the value that `packed` wrote.

    Raises `DataError` for a damaged file, and for the value of another unit or content.
    """
    try:
        about = _about(data)
        tensors = load(data)
        if about.pop("sha256") != _sha256(about, tensors):
            raise ValueError("it differs from its checksum")
        if (about["unit"], about["content"]) != (unit, content):
            raise ValueError(f"it is of {about['unit']!r}, on other items than {unit!r}")
        return _value(about["value"], tensors)
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError, RecursionError) as error:
        raise DataError(f"The file of {unit!r} cannot be used: {str(error)[:120]}.") from None


def seconds_of(data: bytes) -> float:
    """Returns the seconds that the computation of a value took, from bytes that `unpacked` takes.

    >>> seconds_of(packed(1, "rows 0", "", seconds=2.5))
    2.5
    """
    return float(_about(data)["seconds"])


def _about(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"][ABOUT])


def write_value(path: Path, data: bytes) -> None:
    """Writes the bytes of `packed` as a whole or not at all.

    Another process may finish and remove the folder at any moment, so it may be made anew.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            write_file(path, data)
            return
    write_file(path, data)


def _sha256(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON, with its arrays moved to `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        pairs = [[_tree(k, tensors), _tree(v, tensors)] for k, v in value.items()]
        return {"kind": "dict", "of": pairs}
    if type(value) in (list, tuple):
        return {"kind": type(value).__name__, "of": [_tree(each, tensors) for each in value]}
    if isinstance(value, Tensor):
        return {"kind": "tensor", "of": _kept(value.detach().cpu(), tensors)}
    if isinstance(value, xr.DataArray):
        coords = {
            str(name): [list(own.dims), _tree(own.values, tensors)]
            for name, own in value.coords.items()
        }
        whole = _tree(value.values, tensors)
        return {"kind": "labelled", "of": whole, "dims": list(value.dims), "coords": coords}
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "number"
        array = np.asarray(value)
        if array.dtype.kind in "US" or array.dtype == object:
            return {"kind": kind, "of": array.tolist(), "dtype": str(array.dtype)}
        kept = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).copy())
        return {"kind": kind, "of": _kept(kept, tensors), "dtype": None}
    raise DataError(
        f"A unit of work returned {type(value).__name__}; expected dicts, lists and tuples of "
        "texts, numbers, arrays and tensors. Return these alone."
    )


def _kept(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = f"{len(tensors):05}"
    tensors[name] = tensor.contiguous().clone()  # no memory shared with another one
    return name


def _value(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    kind, of = tree["kind"], tree["of"]
    if kind == "dict":
        return {_value(k, tensors): _value(v, tensors) for k, v in of}
    if kind in ("list", "tuple"):
        found = [_value(each, tensors) for each in of]
        return found if kind == "list" else tuple(found)
    if kind == "tensor":
        return tensors[of]
    if kind == "labelled":
        coords = {
            name: (dims, _value(own, tensors)) for name, (dims, own) in tree["coords"].items()
        }
        return xr.DataArray(_value(of, tensors), dims=tree["dims"], coords=coords)
    array = tensors[of].numpy() if tree["dtype"] is None else np.array(of, dtype=tree["dtype"])
    return array if kind == "array" else array[()]
