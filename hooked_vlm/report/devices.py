"""The devices and dtypes of runs, by their names on the command line."""

from typing import Any

import torch

from hooked_vlm.errors import DataError, did_you_mean


DTYPES = ("auto", "float32", "bfloat16", "float16")


def device_of(name: str) -> str:
    """Returns an available device (`"auto"`: the GPU if there is one), or raises `DataError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DataError(
            f"There is no device {name!r}. Give 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise DataError(
            f"Device {name!r} was given, and experiments run on cpu, cuda or mps. Use one of them."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DataError(f"Device {name!r} was given, and torch finds none. Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"Device {name!r} was given, and torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA devices. Use --device cpu, or install a torch "
            "build and driver with CUDA."
        )
    return name


def dtype_of(name: str) -> Any:
    """Returns the torch dtype of a name; `"auto"` is returned unchanged, for transformers.

    Raises `DataError` for another name than those in `DTYPES`.
    """
    if name not in DTYPES:
        raise DataError(
            f"There is no dtype {name!r} here.{did_you_mean(name, DTYPES)} "
            f"Use one of: {', '.join(DTYPES)}."
        )
    return name if name == "auto" else getattr(torch, name)
