"""Loading models: shipped ones by name, folders and hub names by transformers.

Only safetensors are loaded, never pickles, and no remote code runs unless the user
passes `trust_remote_code=True`.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import is_accelerate_available

from hooked_vlm.errors import MissingExtraError, UnsupportedModelError, did_you_mean
from hooked_vlm.processors import load_processor
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
    """Returns a model and its processor, by the name of a shipped model, a folder or a hub name.

    Raises `UnsupportedModelError` when nothing of that name can be loaded, and
    `MissingExtraError` for a `device_map` without accelerate.
    """
    if name in available() and not Path(name).exists():
        chosen: Any = torch.float32 if dtype == "auto" else dtype
        if device_map is not None:
            raise UnsupportedModelError(f"{name} is small: give device=…, not device_map.")
        return load(name, dtype=chosen, device=device or "cpu", **kwargs)
    if device_map is not None and not is_accelerate_available():
        raise MissingExtraError(
            f"device_map={device_map!r} needs accelerate, which is not installed: "
            "pip install 'hooked-vlm[gpu]', or give device='cuda'."
        )
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, device_map=device_map, use_safetensors=True, **kwargs
        )
        shared = {n: kwargs[n] for n in _FOR_BOTH if n in kwargs}
        processor = load_processor(name, **shared)
    except (OSError, ValueError) as error:
        shipped = ", ".join(available())
        raise UnsupportedModelError(
            f"Could not load {name!r}: it is none of the shipped models ({shipped}), and "
            f"transformers says: {str(error).strip().splitlines()[0]}"
            f"{did_you_mean(name, available())}"
        ) from error
    model.eval()
    return model if device is None else model.to(device), processor
