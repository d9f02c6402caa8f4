"""Models as large ones are loaded: in folders, in pieces, with packed weights."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from helpers.prepared_models import prepared
from hooked_vlm.anatomy.parts import is_linear
from hooked_vlm.model.vlm import HookedVLM


@cache
def folder(family: str) -> str:
    """Returns a folder with a family's small random model and its processor."""
    path, model = mkdtemp(), prepared(family)
    hf_model: Any = model.hf_model
    hf_model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


def split(family: str, places: tuple[str, ...] = ("cpu", "disk")) -> dict[str, str]:
    """Returns a device map that deals out blocks, and everything between them, in turn.

    What shares its weights (embedding and head) stays together, as accelerate needs it.
    """
    hf_model: Any = prepared(family).hf_model
    whole = set(hf_model._no_split_modules or ())
    found: dict[str, str] = {}

    def deal(module: nn.Module, path: str) -> None:
        children = list(module.named_children())
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if type(module).__name__ in whole or not children or own:
            found[path] = places[len(found) % len(places)]
            return
        for name, child in children:
            deal(child, f"{path}.{name}" if path else name)

    deal(hf_model, "")
    anatomy = prepared(family).anatomy
    if hf_model.config.get_text_config().tie_word_embeddings:
        found[anatomy.unembed] = found[anatomy.embed]
    return found


def in_pieces(family: str, device_map: Any, offload: Path) -> HookedVLM:
    """Returns a family's model with its weights dealt out."""
    return HookedVLM.from_pretrained(
        folder(family), device_map=device_map, offload_folder=str(offload)
    )


class PackedLinear(nn.Module):
    """A linear map of one integer per weight, in the flat form that 4-bit kernels keep."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        scale = linear.weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        packed = (linear.weight / scale).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features) * self.get_buffer("scale")
        return nn.functional.linear(x, weight, self.bias)


class Opaque(nn.Module):
    """A linear map with no parameters at all, through which no gradient passes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = (linear.weight.detach().clone(), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._packed
        return nn.functional.linear(x.detach(), weight, None if bias is None else bias.detach())


def quantised(hf_model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Returns the model with every linear map replaced by its packed stand-in, in place."""
    for module in list(hf_model.modules()):
        for name, child in list(module.named_children()):
            if is_linear(child):
                setattr(module, name, kind(child))
    return hf_model
