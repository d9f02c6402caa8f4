"""Detects the module that maps an image encoder's features into the language model.

It is read from the source of the functions that call it, like the rest of the anatomy.
"""

import re

from torch import nn

from hooked_vlm.anatomy.parts import block_lists, has_weights, is_linear, is_norm
from hooked_vlm.anatomy.source import called_children, self_calls
from hooked_vlm.anatomy.wrappers import bare


def base_of(model: nn.Module) -> nn.Module:
    """Returns the model without its head (transformers' `base_model`)."""
    return getattr(model, "base_model", model)


def find_projector(
    model: nn.Module, encoder: nn.Module, decoder: nn.Module, paths: dict[int, str]
) -> str | None:
    """Returns the path of the module that maps encoder features into the language model.

    It is the last child that `get_image_features` calls after the encoder.  Where there is
    none (the Qwen-VL layout), it is the last child that the encoder calls after its blocks.
    """
    # Outside the encoder: a child of the model, called after the encoder.
    for owner in dict.fromkeys((base_of(model), model)):
        function = getattr(type(owner), "get_image_features", None)
        calls = self_calls(function or type(owner).forward)
        children = {n: owner.get_submodule(n) for n in calls if _has_submodule(owner, n)}
        names = [n for n in calls if n in children]
        if function is None:
            names = _between(names, children, encoder, decoder)
            names = [n for n in names if not any(block_lists(children[n]))]
        after = [
            n
            for n in names
            if children[n] not in (encoder, decoder)
            and not isinstance(children[n], nn.ModuleList)
            and has_weights(children[n])
            and not is_norm(n, children[n])
            and "router" not in n
            and not (encoder in children[n].modules() or children[n] in encoder.modules())
        ]
        if after:
            return paths[id(children[after[-1]])]
    # Inside the encoder: its last child with linear maps that is neither a norm nor a block.
    inner = dict(encoder.named_children())
    last = [n for n in self_calls(type(encoder).forward) if n in inner and not is_norm(n, inner[n])]
    last = [n for n in last if not isinstance(inner[n], nn.ModuleList)]
    last = [n for n in last if _linear_count(inner[n]) and not any(block_lists(inner[n]))]
    return paths[id(inner[last[-1]])] if last else None


def takes_maps(projector: nn.Module) -> bool:
    """Whether a projector's first operation is a convolution."""
    children = dict(projector.named_children())
    first = next(iter(called_children(projector)), None)
    return isinstance(bare(children[first] if first else projector), nn.Conv2d)


def _between(
    names: list[str], children: dict[str, nn.Module], encoder: nn.Module, decoder: nn.Module
) -> list[str]:
    """Returns the names that a `forward` calls between the encoder and the decoder.

    Used for models without `get_image_features`, whose `forward` encodes images itself.
    """
    start = next((i for i, n in enumerate(names) if children[n] is encoder), None)
    if start is None:
        return []
    stop = next((i for i, n in enumerate(names) if children[n] is decoder), len(names))
    return [n for n in names[start + 1 : stop] if not re.search("embed_tokens|head", n)]


def _has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _linear_count(module: nn.Module) -> int:
    return sum(is_linear(m) for m in module.modules())
