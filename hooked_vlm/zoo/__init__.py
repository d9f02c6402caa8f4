"""Small trained models that ship with the package, by name.

Real transformers classes with real processors, small enough (under 8 MB each) to train,
load and analyse on a laptop, and trained on the paper's synthetic task, so that every
analysis has something learned to look at.  Each folder holds a model card.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForImageTextToText

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Device
from hooked_vlm.errors import UnsupportedModelError, did_you_mean
from hooked_vlm.inputs.without_torchvision import load_processor


_FOLDER = Path(__file__).parent
_FIRST = ("tiny-qwen3-vl-strips",)
"""Models of the study of recipes, chosen for what they show of the paper."""


def available() -> list[str]:
    """Returns the names of the shipped models, those first that were chosen for what they show."""
    names = {path.parent.name for path in _FOLDER.glob("*/model.safetensors")}
    return [*(name for name in _FIRST if name in names), *sorted(names - {*_FIRST})]


@checked(UnsupportedModelError)
def folder(name: str) -> Path:
    """Returns a shipped model's folder; raises `UnsupportedModelError` for an unknown name."""
    if name not in available():
        raise UnsupportedModelError(
            f"No shipped model is called {name!r}; there are {', '.join(available())}."
            f"{did_you_mean(name, available())}"
        )
    return _FOLDER / name


@checked(UnsupportedModelError)
def summary(name: str) -> str:
    """Returns in a few words what a shipped model is, from its card.

    Raises `UnsupportedModelError` for an unknown name.

    >>> summary("tiny-gemma-3")
    'trained on squares, shapes and cut-outs, selected for accuracy alone'
    """
    return str((metadata_load(folder(name) / "README.md") or {}).get("summary", ""))


@checked(UnsupportedModelError)
def load(
    name: str, dtype: torch.dtype = torch.float32, device: Device = "cpu", **kwargs: Any
) -> tuple[Any, Any]:
    """Returns a shipped model, in eval mode, and its processor.

    Keyword arguments go to transformers' `from_pretrained` (`attn_implementation`, …).
    """
    path = str(folder(name))
    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, use_safetensors=True, local_files_only=True, **kwargs
    )
    return model.eval().to(device), load_processor(path, local_files_only=True)
