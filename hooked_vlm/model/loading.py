"""Loads models: shipped models by name, folders and hub names with transformers.

Only safetensors are loaded, never pickles.  Remote code runs only when the user passes
`trust_remote_code=True`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText
from transformers.utils import is_accelerate_available

from hooked_vlm.errors import (
    HookedVLMWarning,
    MissingExtraError,
    UnsupportedModelError,
    did_you_mean,
)
from hooked_vlm.inputs.without_torchvision import load_processor
from hooked_vlm.zoo import available, load


_FOR_BOTH = ("revision", "trust_remote_code", "local_files_only", "cache_dir", "token")


def load_pretrained(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Returns a model and its processor; `name` is a shipped model, a folder or a hub name.

    Raises `UnsupportedModelError` when no model of that name can be loaded, and
    `MissingExtraError` for a `device_map` without accelerate.
    """
    if _is_shipped(name):
        chosen: Any = torch.float32 if dtype == "auto" else dtype
        if device_map is not None:
            raise UnsupportedModelError(
                f"device_map={device_map!r} was given for {name}, which is small enough for one "
                "device: give device=…, not device_map."
            )
        return load(name, dtype=chosen, device=device or "cpu", **kwargs)
    model = _from_pretrained(AutoModelForImageTextToText, name, dtype, device_map, kwargs)
    try:
        processor = load_processor(name, **_shared(kwargs))
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error
    return model if device is None else model.to(device), processor


def load_image_model(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Returns the model that `AutoModel` loads and its image processor.

    Names, options and errors are those of `load_pretrained`; a dual encoder is loaded whole.
    Without an image processor, warns and returns None in its place.
    """
    if _is_shipped(name):
        options = {"dtype": dtype, "device": device, "device_map": device_map, **kwargs}
        model, processor = load_pretrained(name, **options)
        return model, processor.image_processor
    model = _from_pretrained(AutoModel, name, dtype, device_map, kwargs)
    try:
        processor = AutoImageProcessor.from_pretrained(name, **_shared(kwargs))
    except (OSError, ValueError, ImportError) as error:  # some image processors need torchvision
        processor = None
        warnings.warn(
            f"No image processor was loaded for {name!r}, so prepare() will raise. transformers "
            f"reports: {str(error).strip().splitlines()[0]} Give run_with_cache and other methods "
            "the tensors that the encoder takes.",
            HookedVLMWarning,
            stacklevel=3,
        )
    return model if device is None else model.to(device), processor


def _is_shipped(name: str) -> bool:
    return name in available() and not Path(name).exists()


def _from_pretrained(auto: Any, name: str, dtype: Any, device_map: Any, kwargs: Any) -> Any:
    if device_map is not None and not is_accelerate_available():
        raise MissingExtraError(
            f"device_map={device_map!r} needs accelerate, which is not installed. Run "
            "pip install 'hooked-vlm[gpu]', or give device='cuda'."
        )
    try:
        model = auto.from_pretrained(
            name, dtype=dtype, device_map=device_map, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error
    return model.eval()


def _shared(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {n: kwargs[n] for n in _FOR_BOTH if n in kwargs}


def _not_loaded(name: str, error: Exception) -> UnsupportedModelError:
    shipped = ", ".join(available())
    return UnsupportedModelError(
        f"Could not load {name!r}: it is none of the shipped models ({shipped}), and "
        f"transformers reports: {str(error).strip().splitlines()[0]}"
        f"{did_you_mean(name, available())}"
    )
