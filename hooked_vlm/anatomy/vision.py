"""Detects the parts of a vision encoder: its blocks, the modules around them, and its output.

`read_vision` reads an encoder inside a vision-language model, and `read_tower` reads one
without a language model, so both have the same sites.  `find_tower` returns the image
encoder of a dual encoder or a vision-language model; a model that takes only pixels is its
own encoder.  Without a projector, the encoder's output is the output of the last block, or
of the norm after it, for every row.

The encoder must have one residual stream: one list of blocks that process all patches.
Convolutional networks, stages of different widths and attention in windows are rejected
with `UnsupportedModelError`.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hooked_vlm.anatomy.blocks import read_block
from hooked_vlm.anatomy.parts import (
    Attention,
    Block,
    block_lists,
    first_of,
    has_weights,
    is_linear,
    is_norm,
)
from hooked_vlm.anatomy.source import (
    called_children,
    forward_parameters,
    forward_source,
    self_calls,
)
from hooked_vlm.anatomy.wrappers import bare, through_wrappers
from hooked_vlm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Stack:
    """A list of blocks that share one residual stream."""

    path: str
    blocks: tuple[Block, ...]
    d_model: int
    final_norm: str | None

    @property
    def attention(self) -> Attention | None:
        """The attention of the first block that has one; it gives the sizes of the stack."""
        return next((block.attn for block in self.blocks if block.attn), None)


@dataclass(frozen=True)
class Vision(Stack):
    """The vision encoder, and the layers that the projector reads."""

    patch_embed: str | None
    """The module whose output is the patches; a convolution's output ends with the grid axes."""
    patch_conv: bool
    pos_embed: str | None
    merge: int
    """Side of the square of patches that become one visual token inside the encoder (1: none)."""
    read_layers: tuple[int, ...] | None
    """Residual slots that the projector reads; None when it reads the encoder's final output."""
    n_prefix: int
    patch_size: int
    image_size: int | None
    """Side in pixels of the only image size accepted; None when any size is."""
    packed: bool
    """Whether the patches of all images form one sequence, with the grids in another argument."""
    feature_maps: bool = False
    """Whether the projector takes feature maps, channels first, instead of rows of features."""
    deepstack: tuple[str, ...] = ()
    """Additional projectors, whose outputs are added to the language model's first layers."""

    @property
    def last_read(self) -> int:
        """Index of the last block whose output can reach the language model."""
        if self.read_layers is None:
            return len(self.blocks) - 1
        return max(self.read_layers) - 1


def read_stack(stack: nn.Module, paths: dict[int, str], without: nn.Module | None = None) -> Stack:
    """Returns the longest list of blocks in a module; an empty stack if no block has attention.

    `without` is a submodule to ignore, such as an image encoder inside a decoder.
    """
    config = getattr(stack, "config", None)
    other = set() if without is None else {id(module) for module in without.modules()}
    lists = [item for item in block_lists(stack) if id(item[1]) not in other]
    lists.sort(key=lambda item: -len(item[1]))
    blocks: tuple[Block, ...] = ()
    norm = None
    if lists:
        inner, found = lists[0]
        blocks = tuple(read_block(block, paths[id(block)], config) for block in found)
        norm = _final_norm(stack, inner, paths)
    attn = next((block.attn for block in blocks if block.attn), None)
    d_model = attn.n_heads * attn.d_head if attn else 0
    if config is not None:
        told = (first_of(config, name) for name in ("embed_dim", "hidden_size", "d_model"))
        d_model = next((size for size in told if isinstance(size, int)), d_model)
    return Stack(paths[id(stack)], blocks, d_model, norm)


def _final_norm(stack: nn.Module, list_path: str, paths: dict[int, str]) -> str | None:
    """Returns the path of the norm after the blocks, called by a module that contains them."""
    parts = list_path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner, inner = stack.get_submodule(".".join(parts[:depth])), parts[depth]
        children = dict(owner.named_children())
        order = called_children(owner)
        later = order[order.index(inner) + 1 :] if inner in order else []
        norms = [n for n in later if is_norm(n, children[n])]
        if norms:
            return paths[id(children[norms[0]])]
    return None


# --- the vision encoder -------------------------------------------------------------------


def read_vision(
    encoder: nn.Module, paths: dict[int, str], config: Any, model: nn.Module | None = None
) -> Vision:
    """Returns the parts of a vision encoder; `config` is the config of the whole model."""
    # 1. Blocks, patch embedding and position embedding.
    stack = read_stack(encoder, paths)
    embed = _patch_embed(encoder)
    if embed is None and stack.blocks:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} has no map that cuts the image into patches. Give one "
            "with a convolution or a linear map over patches."
        )
    named = dict(encoder.named_modules())
    position = next(
        (m for p, m in named.items() if re.search(r"pos\w*_emb\w*$", p) and has_weights(m)), None
    )
    called = position is not None and _is_called(encoder, paths[id(position)], paths[id(encoder)])
    # 2. Sizes of patches and images.  A packed encoder takes images of any size.
    own = getattr(encoder, "config", None)
    cut: Any = None if embed is None else bare(embed)
    conv = isinstance(cut, nn.Conv2d | nn.Conv3d)
    patch_size = cut.kernel_size[-1] if conv else _side(first_of(own, "patch_size"))
    packed = grid_argument(encoder) is not None
    side = _side(first_of(own, "image_size"))
    side = None if packed or not side else side
    # 3. Tokens before the patches: what the position table has beyond the patches, or parameters.
    n_prefix = 0
    table = None if position is None else bare(position)
    if side and patch_size and isinstance(table, nn.Embedding):
        n_prefix = max(table.num_embeddings - (side // patch_size) ** 2, 0)
        n_prefix = n_prefix if n_prefix <= _MOST_PREFIX else 0
    elif heads := [n for n, _ in _parameters(encoder) if re.search(_LEADING, n)]:
        n_prefix = len(heads) + (first_of(own, "num_register_tokens") or 0)
    # 4. Merging of patches inside the encoder.
    merge = first_of(encoder, "spatial_merge_size")
    if merge is None and "spatial_merge_size" in forward_source(type(encoder).forward):
        merge = first_of(own, "spatial_merge_size")
    return Vision(
        path=stack.path,
        blocks=stack.blocks,
        d_model=stack.d_model,
        final_norm=stack.final_norm,
        patch_embed=paths[id(embed)] if embed is not None else None,
        patch_conv=conv,
        pos_embed=paths[id(position)] if position is not None and called else None,
        merge=merge if isinstance(merge, int) else 1,
        read_layers=_read_layers(config, len(stack.blocks)),
        n_prefix=n_prefix,
        patch_size=patch_size or 0,
        image_size=side,
        packed=packed,
        deepstack=tuple(_deepstack(model or encoder, paths)),
    )


_LEADING = r"(^|\.)(cls_token|class_embedding|distillation_token)$"
_MOST_PREFIX = 16  # class and register tokens; a larger excess is a table for other image sizes


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters()


def _is_called(encoder: nn.Module, path: str, root: str) -> bool:
    """Whether a module's parent calls it, instead of reading its weight."""
    inner = path.removeprefix(root).lstrip(".").rpartition(".")
    parent = encoder.get_submodule(inner[0])
    calls = self_calls(type(parent).forward)
    if "interpolate_pos_encoding=True" in forward_source(type(encoder).forward):
        return False  # the encoder then interpolates the weight instead of calling the module
    return not forward_source(type(parent).forward) or inner[2] in calls


def _side(size: Any) -> int | None:
    """Returns an image or patch size as one number; None if it is not square."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def _patch_embed(encoder: nn.Module) -> Any:
    """Returns the convolution that cuts patches, or the first linear map with a matching name."""
    # An adapter's layer is found before the parts of it, which are convolutions themselves.
    modules = list(encoder.named_modules())
    convs = [m for _, m in modules if isinstance(bare(m), nn.Conv2d | nn.Conv3d)]
    cuts: list[tuple[nn.Module, Any]] = [(m, bare(m)) for m in convs]
    cutting = [m for m, c in cuts if c.stride == c.kernel_size and c.kernel_size[-1] > 1]
    if cutting:
        return cutting[0]
    maps = [
        m
        for p, m in modules
        if re.search(r"patch|embed", p) and is_linear(m) and not re.search(r"pos|block|layers\.", p)
    ]
    return maps[0] if maps else (convs[0] if convs else None)


_GRID_ARGUMENT = r"grid_t?hws?$|target_sizes$|image_sizes$"


def grid_argument(encoder: nn.Module) -> str | None:
    """Returns the parameter that takes the images' sizes in a packed encoder; None for others."""
    names = forward_parameters(encoder)
    return next((name for name in names if re.search(_GRID_ARGUMENT, name)), None)


def _deepstack(model: nn.Module, paths: dict[int, str]) -> Iterator[str]:
    seen = set()
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if not isinstance(module, nn.ModuleList) or not re.search(_DEEPSTACK, leaf):
            continue
        # A second list of the same name belongs to another, optional route.
        if leaf not in seen:
            yield from (paths[id(child)] for child in module if id(child) in paths)
        seen.add(leaf)


_DEEPSTACK = "deepstack|^merger_list$|layerwise_projectors|spatial_projectors"


def _read_layers(config: Any, n_blocks: int) -> tuple[int, ...] | None:
    """Returns the residual slots of `vision_feature_layer` as non-negative numbers."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None or not n_blocks:
        return None
    layers = [layers] if isinstance(layers, int) else list(layers)
    return tuple(layer % (n_blocks + 1) for layer in layers)


@dataclass(frozen=True)
class Tower:
    """A vision encoder's parts, and the module whose output is the encoder's output."""

    vision: Vision
    out: str | None
    """None where one norm runs on all rows and on pooled rows, so its calls are ambiguous."""


def find_tower(model: Any) -> Any:
    """Returns the image encoder of a model that also takes text; returns other models unchanged.

    Raises `UnsupportedModelError` for a model that takes text and has no image encoder.
    """
    if "input_ids" not in forward_parameters(model):
        return model
    ask = getattr(model, "get_encoder", None)
    found = ask(modality="image") if ask is not None else None
    if found in (None, model, getattr(model, "base_model", None)):
        found = getattr(model, "vision_model", None)
    if found is None:
        raise UnsupportedModelError(
            f'{type(model).__name__} takes text, and neither get_encoder(modality="image") nor '
            "vision_model gives an image encoder. Give HookedVisionEncoder the module that "
            "encodes images."
        )
    return found


@through_wrappers
def read_tower(model: nn.Module) -> Tower:
    """Returns a vision encoder's anatomy; paths are relative to `model`, heads are excluded.

    Raises `UnsupportedModelError` for an encoder without a single residual stream of patches.
    """
    # Verify that there is one list of blocks, then read it, then verify that none uses windows.
    paths = {id(module): path for path, module in model.named_modules()}
    encoder = _without_heads(model)
    name = type(encoder).__name__
    stages = [path for path, _ in block_lists(encoder)]
    if not stages:
        raise UnsupportedModelError(
            f"{name} has no list of transformer blocks with attention, so it has no residual "
            "stream to hook: it is convolutional, or mixes patches by other means. Give a vision "
            "transformer."
        )
    if len(stages) > 1:
        raise UnsupportedModelError(
            f"{name} keeps its blocks in {len(stages)} lists ({', '.join(stages[:3])}, …), so it "
            "has several residual streams of different widths or of merged patches. Give an "
            "encoder with one list of blocks."
        )
    vision = read_vision(encoder, paths, None)
    if any(_in_windows(model.get_submodule(block.path)) for block in vision.blocks):
        raise UnsupportedModelError(
            f"{name} cuts its patches into windows inside its blocks, so they are not in raster "
            "order there. Give an encoder without window attention."
        )
    return Tower(vision, _out(model, vision))


def _without_heads(model: nn.Module) -> nn.Module:
    """Returns the model without its heads: its base, if the base takes pixels."""
    base = getattr(model, "base_model", model)
    pixels = getattr(model, "main_input_name", "pixel_values")
    return base if pixels in forward_parameters(base) else model


def _in_windows(block: nn.Module) -> bool:
    return "window_partition" in forward_source(type(block).forward)


def _out(model: nn.Module, vision: Vision) -> str | None:
    """Returns the path of the module whose output has all rows of the encoder's output."""
    last = vision.blocks[-1].path
    if vision.final_norm is None:
        return last
    owner, _, name = vision.final_norm.rpartition(".")
    pooled = _calls_on_pooled(type(model.get_submodule(owner)).forward, name)
    if not any(pooled):
        return vision.final_norm
    return last if all(pooled) else None


def _calls_on_pooled(function: Any, name: str) -> list[bool]:
    """Returns for each call of `self.name` whether its argument is pooled rows (`x[:, 0]`)."""
    # A variable as argument is resolved to the expression last assigned to it.
    assigned: dict[str, ast.expr] = {}
    pooled = []
    tree = ast.parse(forward_source(function))
    for node in sorted(
        (n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.Call)),
        # In `x = self.norm(x)` the call sees the earlier x, so the call comes first.
        key=lambda n: (n.end_lineno or 0, isinstance(n, ast.Assign)),
    ):
        if isinstance(node, ast.Assign):
            assigned |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
        elif node.args and ast.unparse(node.func) == f"self.{name}":
            given = node.args[0]
            given = assigned.get(given.id, given) if isinstance(given, ast.Name) else given
            pooled.append(isinstance(given, ast.Subscript) and isinstance(given.slice, ast.Tuple))
    return pooled
