"""A vision encoder by itself: which module it is, and where its output leaves it.

A dual encoder or a vision-language model is asked for its image encoder; whatever takes
pixels and nothing else is one already.  Its anatomy is read as it is inside a
vision-language model (`anatomy.read_vision`), so that both have the same sites.  There is
no projector to say what is read, so the output is what the last block or the norm behind
it makes of every row, and no block is behind that.

Assumed is one residual stream: one list of blocks that see all patches.  Convolutional
networks, stages of different widths and attention in windows are refused.
"""

import ast
from dataclasses import dataclass
from typing import Any

from torch import nn

from hooked_vlm.anatomy import Vision, read_vision
from hooked_vlm.blocks import block_lists
from hooked_vlm.calls import forward_parameters, forward_source
from hooked_vlm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Tower:
    """A vision encoder's parts, and the module whose output is the encoder's."""

    vision: Vision
    out: str | None
    """None where a norm runs twice, on all rows and on pooled ones, and cannot be told apart."""


def find_tower(model: Any) -> Any:
    """Returns the image encoder of a model that takes text as well, and any other model itself.

    Raises `UnsupportedModelError` where there is text and no image encoder to be found.
    """
    if "input_ids" not in forward_parameters(model):
        return model
    ask = getattr(model, "get_encoder", None)
    found = ask(modality="image") if ask is not None else None
    if found in (None, model, getattr(model, "base_model", None)):
        found = getattr(model, "vision_model", None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes text and names no image encoder of its own "
            '(get_encoder(modality="image"), vision_model). Give HookedVisionEncoder the module '
            "that encodes images."
        )
    return found


def read_tower(model: nn.Module) -> Tower:
    """Reads a vision encoder's anatomy; paths are relative to `model`, heads stand outside.

    Raises `UnsupportedModelError` for an encoder without one residual stream of patches.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    encoder = _without_heads(model)
    name = type(encoder).__name__
    stages = [path for path, _ in block_lists(encoder)]
    if not stages:
        raise UnsupportedModelError(
            f"{name} has no list of transformer blocks with attention, so it has no residual "
            "stream to hook: it is convolutional, or mixes patches by other means."
        )
    if len(stages) > 1:
        raise UnsupportedModelError(
            f"{name} keeps its blocks in {len(stages)} lists ({', '.join(stages[:3])}, …), so it "
            "has several residual streams, of other widths or of merged patches; only encoders "
            "with one are supported."
        )
    vision = read_vision(encoder, paths, None)
    if any(_in_windows(model.get_submodule(block.path)) for block in vision.blocks):
        raise UnsupportedModelError(
            f"{name} cuts its patches into windows inside its blocks, so they are not in raster "
            "order there; such encoders are not supported."
        )
    return Tower(vision, _out(model, vision))


def _without_heads(model: nn.Module) -> nn.Module:
    """Returns the part of a model that makes patches into rows: its base, if that takes pixels."""
    base = getattr(model, "base_model", model)
    pixels = getattr(model, "main_input_name", "pixel_values")
    return base if pixels in forward_parameters(base) else model


def _in_windows(block: nn.Module) -> bool:
    return "window_partition" in forward_source(type(block).forward)


def _out(model: nn.Module, vision: Vision) -> str | None:
    """Returns the path of the module whose output is all rows of the encoder's output."""
    last = vision.blocks[-1].path
    if vision.final_norm is None:
        return last
    owner, _, name = vision.final_norm.rpartition(".")
    pooled = _calls_on_pooled(type(model.get_submodule(owner)).forward, name)
    if not any(pooled):
        return vision.final_norm
    return last if all(pooled) else None


def _calls_on_pooled(function: Any, name: str) -> list[bool]:
    """Returns, call by call of `self.name`, whether it is given pooled rows (`x[:, 0]`)."""
    assigned: dict[str, ast.expr] = {}
    pooled = []
    tree = ast.parse(forward_source(function))
    for node in sorted(
        (n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.Call)),
        # An assignment's own call comes first: `x = self.norm(x)` is given the earlier x.
        key=lambda n: (n.end_lineno or 0, isinstance(n, ast.Assign)),
    ):
        if isinstance(node, ast.Assign):
            assigned |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
        elif node.args and ast.unparse(node.func) == f"self.{name}":
            given = node.args[0]
            given = assigned.get(given.id, given) if isinstance(given, ast.Name) else given
            pooled.append(isinstance(given, ast.Subscript) and isinstance(given.slice, ast.Tuple))
    return pooled
