"""Loads models: shipped models by name, folders and hub names with transformers.

Only safetensors are loaded, never pickles.  Remote code runs only when the user passes
`trust_remote_code=True`.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText
from transformers.utils import cached_file, is_accelerate_available

from hooked_vlm.anatomy.vision import find_tower, read_tower
from hooked_vlm.errors import (
    HookedVLMWarning,
    MissingExtraError,
    MissingWeightsError,
    UnsupportedModelError,
    callers_level,
    did_you_mean,
)
from hooked_vlm.inputs.processor import STRICT
from hooked_vlm.inputs.without_torchvision import load_processor
from hooked_vlm.zoo import available, folder, load


# The exceptions with which transformers refuses a checkpoint's files.
_REFUSED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    RecursionError,
    STRICT,
)
_FOR_BOTH = ("revision", "trust_remote_code", "local_files_only", "cache_dir", "token")


def load_pretrained(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    allow_missing_weights: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Returns a model and its processor; `name` is a shipped model, a folder or a hub name.

    Raises `UnsupportedModelError` when no model of that name can be loaded,
    `MissingWeightsError` when its checkpoint lacks weights (unless `allow_missing_weights`, which
    leaves them random and warns), and `MissingExtraError` for a `device_map` without accelerate.
    """
    _check(name, dtype, device)
    if _is_shipped(name):
        chosen: Any = torch.float32 if dtype == "auto" else dtype
        if device_map is not None:
            raise UnsupportedModelError(
                f"device_map={device_map!r} was given for {name}, which is small enough for one "
                "device: give device=…, not device_map."
            )
        try:
            return load(name, dtype=chosen, device=device or "cpu", **kwargs)
        except _REFUSED as error:
            if "out of memory" in str(error).lower():
                raise
            raise _not_loaded(name, error) from error
    options = {**kwargs, "dtype": dtype, "device_map": device_map}
    model, missing = _from_pretrained(AutoModelForImageTextToText, name, options)
    _report_missing(name, missing, allow_missing_weights)
    try:
        processor = load_processor(name, **_shared(kwargs))
    except _REFUSED as error:
        raise _not_loaded(name, error) from error
    return model if device is None else model.to(device), processor


def load_image_model(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    allow_missing_weights: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Returns the model that `AutoModel` loads and its image processor.

    Names, options and errors are those of `load_pretrained`; a dual encoder is loaded whole.
    Weights that only read the encoder's output, such as a pooler's, may be missing: this warns.
    Without an image processor, warns and returns None in its place.
    """
    _check(name, dtype, device)
    if _is_shipped(name):
        options = {"dtype": dtype, "device": device, "device_map": device_map, **kwargs}
        model, processor = load_pretrained(name, **options)
        return model, processor.image_processor
    options = {**kwargs, "dtype": dtype, "device_map": device_map}
    model, missing = _from_pretrained(AutoModel, name, options)
    read = [key for key in missing if _is_read(model, key)]
    _report_missing(name, read, allow_missing_weights)
    _report_missing(name, [key for key in missing if key not in read], allowed=True)
    try:
        processor = AutoImageProcessor.from_pretrained(name, **_shared(kwargs))
    except (OSError, ValueError, ImportError) as error:  # some image processors need torchvision
        processor = None
        warnings.warn(
            f"No image processor was loaded for {name!r}, so prepare() will raise. transformers "
            f"reports: {str(error).strip().splitlines()[0]} Give run_with_cache and other methods "
            "the tensors that the encoder takes.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
    return model if device is None else model.to(device), processor


def local_folder(name: str) -> Path | None:
    """Returns the folder with the files of a model, or None where there is none on this machine.

    For a hub name it is the snapshot in the hub's cache.
    """
    if _is_shipped(name):
        return folder(name)
    if Path(name).is_dir():
        return Path(name)
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _is_shipped(name: str) -> bool:
    return name in available() and not Path(name).exists()


def _is_path(name: str) -> bool:
    """Returns whether a name can only be a folder's: a hub name has one slash at most."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name


def _short(name: str) -> str:
    """Returns a name in 80 characters: of a path, the end says more."""
    return name if len(name) <= 80 else "…" + name[-79:]


def _check(name: str, dtype: torch.dtype | str, device: str | torch.device | None) -> None:
    """Raises `UnsupportedModelError` for an empty name, an unknown dtype and an unknown device."""
    if not isinstance(name, str) or not name.strip():
        raise UnsupportedModelError(
            f"The model's name is {name!r}. Give a shipped model, a local folder or a hub name."
        )
    if _is_path(name) and not Path(name).exists():
        raise UnsupportedModelError(
            f"There is no folder {_short(name)!r}. Give the folder of a checkpoint (config.json, "
            f"*.safetensors), a hub name or one of {', '.join(available())}."
        )
    # Only the hub's first models have no owner before a slash, so such a name that resembles a
    # shipped model's is a slip.  Without a network, asking the hub takes long.
    is_meant = did_you_mean(name, available()) if "/" not in name else ""
    if is_meant and not Path(name).exists() and not _is_shipped(name):
        folder(name)
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        usual = ("auto", "float32", "bfloat16", "float16", "float64")
        raise UnsupportedModelError(
            f"dtype={dtype!r} was given; expected one of {', '.join(usual)} or a torch dtype of "
            f"floating point.{did_you_mean(str(dtype), usual)}"
        )
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise UnsupportedModelError(
            f"device={device!r} was given; expected cpu, cuda, cuda:1, mps or a torch device."
        ) from None


def _from_pretrained(auto: Any, name: str, options: Any) -> tuple[Any, list[str]]:
    """Returns the loaded model, and the names of weights that its checkpoint lacks."""
    device_map = options["device_map"]
    if device_map is not None and not is_accelerate_available():
        raise MissingExtraError(
            f"device_map={device_map!r} needs accelerate, which is not installed. Run "
            "pip install 'hooked-vlm[gpu]', or give device='cuda'."
        )
    try:
        model, report = auto.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **options
        )
    except _REFUSED as error:
        if "out of memory" in str(error).lower():
            raise
        raise _not_loaded(name, error) from error
    return model.eval(), sorted(report["missing_keys"])


def _report_missing(name: str, missing: Sequence[str], allowed: bool) -> None:
    """Raises `MissingWeightsError` for missing weights, or warns where they are allowed."""
    if not missing:
        return
    shown = ", ".join(key[-50:] for key in missing[:3]) + (", …" if len(missing) > 3 else "")
    what = f"{len(missing)} weight{'s are' if len(missing) > 1 else ' is'}"
    if allowed:
        warnings.warn(
            f"{what} missing in the checkpoint {name[-60:]!r} and has random numbers: {shown}.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
        return
    raise MissingWeightsError(
        f"{what} missing in the checkpoint {name[-60:]!r}, which transformers fills with "
        f"random numbers: {shown}. Give a complete checkpoint of this architecture, or "
        "allow_missing_weights=True."
    )


def _is_read(model: nn.Module, key: str) -> bool:
    """Returns whether a weight is in the image encoder's blocks, before them, or in its last norm.

    What is registered after the blocks, such as a pooler, only reads the encoder's output.
    """
    tower = find_tower(model)
    prefix = next(f"{path}." if path else "" for path, m in model.named_modules() if m is tower)
    vision = read_tower(tower).vision
    names = [name for name, _ in [*tower.named_buffers(), *tower.named_parameters()]]
    last = max(i for i, n in enumerate(names) if n.startswith(f"{vision.blocks[-1].path}."))
    norm = [n for n in names if vision.final_norm and n.startswith(f"{vision.final_norm}.")]
    return key.startswith(prefix) and key.removeprefix(prefix) in {*names[: last + 1], *norm}


def _shared(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {n: kwargs[n] for n in _FOR_BOTH if n in kwargs}


def _not_loaded(name: str, error: Exception) -> UnsupportedModelError:
    shipped = ", ".join(available())
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0] if len(lines[0]) <= 150 else lines[0][:149] + "…"
    if _is_shipped(name):
        return UnsupportedModelError(f"Could not load {name!r}: transformers reports: {said}")
    return UnsupportedModelError(
        f"Could not load {_short(name)!r}: it is none of the shipped models ({shipped}), and "
        f"transformers reports: {said}{did_you_mean(name, available())}"
    )
