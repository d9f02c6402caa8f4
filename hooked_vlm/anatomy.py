"""Where the parts of a vision-language model are: read from its module tree.

`read_anatomy` walks any transformers image-text-to-text model (or a module that
follows its `get_encoder(modality="image")` / `get_decoder()` interface) and returns a
frozen description made of module paths and sizes.  Nothing here asks which family a
model belongs to (see `blocks` for how a part is recognised).  The description holds no
weights and no modules, so it can be read off a model on the `meta` device.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hooked_vlm.blocks import (
    Attention,
    Block,
    block_lists,
    first_of,
    has_weights,
    is_linear,
    is_norm,
    read_block,
)
from hooked_vlm.calls import (
    POSITIONAL,
    called_children,
    forward_parameters,
    forward_source,
    keywords_of,
    self_calls,
)
from hooked_vlm.errors import UnsupportedModelError
from hooked_vlm.projector import base_of, find_projector, takes_maps


@dataclass(frozen=True)
class Stack:
    """A run of blocks that share one residual stream."""

    path: str
    blocks: tuple[Block, ...]
    d_model: int
    final_norm: str | None

    @property
    def attention(self) -> Attention | None:
        """The first block's attention that has one; sizes of a stack are taken from it."""
        return next((block.attn for block in self.blocks if block.attn), None)


@dataclass(frozen=True)
class Vision(Stack):
    """The vision encoder, and what the projector reads of it."""

    patch_embed: str | None
    """The module whose output is the patches; a convolution's has the grid as its last axes."""
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
    """Whether the patches of all images come as one sequence, with their grids beside it."""
    feature_maps: bool = False
    """Whether the projector gets maps, channels first, rather than rows of features."""
    deepstack: tuple[str, ...] = ()
    """Further projectors, whose outputs are added to the language model's first layers."""

    @property
    def last_read(self) -> int:
        """Index of the last block whose output can reach the language model."""
        if self.read_layers is None:
            return len(self.blocks) - 1
        return max(self.read_layers) - 1


@dataclass(frozen=True)
class Anatomy:
    """Paths of all parts, relative to the wrapped model."""

    lm: Stack
    embed: str
    unembed: str
    merges: bool
    """Whether the decoder is given embeddings into which the image was merged."""
    vision: Vision | None
    projector: str | None
    image_token_id: int | None


def read_anatomy(model: nn.Module) -> Anatomy:
    """Reads the anatomy of a transformers model off its module tree.

    Raises `UnsupportedModelError` when there is no decoder with attention blocks, no
    embedding or no vocabulary projection.  A model with no vision encoder is described
    with `vision=None`; whoever needs images says so then.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = _ask(model, "get_decoder") or model
    if getattr(getattr(decoder, "config", None), "is_encoder_decoder", False):
        inner = _ask(decoder, "get_decoder")  # a whole text model: its own encoder apart
        decoder = inner if inner is not None and any(block_lists(inner)) else decoder
    embed = _ask(decoder, "get_input_embeddings") or _ask(model, "get_input_embeddings")
    unembed = _ask(model, "get_output_embeddings") or _ask(decoder, "get_output_embeddings")
    if embed is None or unembed is None:
        missing = "get_input_embeddings()" if embed is None else "get_output_embeddings()"
        raise UnsupportedModelError(
            f"{type(model).__name__}.{missing} returned nothing; HookedVLM needs a model with a "
            "language-modelling head, such as an AutoModelForImageTextToText."
        )
    encoder = image_encoder(model, decoder)
    config = getattr(model, "config", None)
    lm = read_stack(decoder, paths, without=encoder)
    if not lm.blocks:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has no list of blocks with attention in it, so there is no "
            "residual stream to hook."
        )
    projector, vision = None, None
    if encoder is not None:
        projector = find_projector(model, encoder, decoder, paths)
        maps = projector is not None and takes_maps(model.get_submodule(projector))
        vision = replace(read_vision(encoder, paths, config, model), feature_maps=maps)
    return Anatomy(
        lm=lm,
        embed=paths[id(embed)],
        unembed=paths[id(unembed)],
        merges=encoder is not None and _is_given_embeddings(model, encoder, decoder),
        vision=vision,
        projector=projector,
        image_token_id=first_of(config, "image_token_id", "image_token_index"),
    )


def image_encoder(model: nn.Module, decoder: nn.Module | None = None) -> nn.Module | None:
    """Returns a model's image encoder, or None where it has none of its own.

    Where transformers knows none by name it answers with the model itself, or with its base;
    then the encoder of a model whose main input are pixels is it, or a child that says so.
    """
    named = _ask(model, "get_encoder", modality="image")
    others = (model, decoder, base_of(model))
    if named is not None and not any(named is other for other in others):
        return named if any(named is module for module in model.modules()) else None
    asked = []
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        asked.append(_ask(model, "get_encoder"))
    children = base_of(model).named_children()
    asked += [child for name, child in children if re.match("(image|vision)_", name)]
    return next(
        (
            found
            for found in asked
            if found is not None
            and not any(found is other for other in others)
            and has_weights(found)
            and _patch_embed(found) is not None
        ),
        None,
    )


def _is_given_embeddings(model: nn.Module, encoder: nn.Module, decoder: nn.Module) -> bool:
    """Whether the decoder is called with embeddings, rather than with ids that it embeds itself."""
    if any(encoder is module for module in decoder.modules()):
        return False
    owners = [m for m in model.modules() if any(decoder is inner for inner in m.modules())]
    for owner in reversed([m for m in owners if m is not decoder]):
        name = next((n for n, child in owner.named_modules() if child is decoder), "")
        given = keywords_of(type(owner).forward, name)
        if given is not None:
            return "input_ids" not in given and bool(given & {"inputs_embeds", POSITIONAL})
    return True


def _ask(model: nn.Module, method: str, **kwargs: Any) -> nn.Module | None:
    """Returns what a model answers to one of transformers' `get_…` methods, if it has it."""
    found: Any = getattr(model, method, None)
    try:
        return None if found is None else found(**kwargs)
    except NotImplementedError:
        return None


def read_stack(stack: nn.Module, paths: dict[int, str], without: nn.Module | None = None) -> Stack:
    """Returns the longest run of blocks in a module; none where no block has attention.

    `without` is a part of it that does not count: an image encoder inside a decoder.
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
    """Returns the path of the norm behind the blocks, called by one of their owners."""
    parts = list_path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner, inner = stack.get_submodule(".".join(parts[:depth])), parts[depth]
        children = dict(owner.named_children())
        order = called_children(owner)
        behind = order[order.index(inner) + 1 :] if inner in order else []
        norms = [n for n in behind if is_norm(n, children[n])]
        if norms:
            return paths[id(children[norms[0]])]
    return None


# --- the vision encoder -------------------------------------------------------------------


def read_vision(
    encoder: nn.Module, paths: dict[int, str], config: Any, model: nn.Module | None = None
) -> Vision:
    """Returns the parts of a vision encoder; `config` is that of the whole model."""
    stack = read_stack(encoder, paths)
    embed = _patch_embed(encoder)
    if embed is None and stack.blocks:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} has no map that cuts the image into patches."
        )
    named = dict(encoder.named_modules())
    position = next(
        (m for p, m in named.items() if re.search(r"pos\w*_emb\w*$", p) and has_weights(m)), None
    )
    called = position is not None and _is_called(encoder, paths[id(position)], paths[id(encoder)])
    own = getattr(encoder, "config", None)
    conv = isinstance(embed, nn.Conv2d | nn.Conv3d)
    patch_size = embed.kernel_size[-1] if conv else _side(first_of(own, "patch_size"))
    packed = grid_argument(encoder) is not None
    side = _side(first_of(own, "image_size"))
    side = None if packed or not side else side
    n_prefix = 0
    if side and patch_size and isinstance(position, nn.Embedding):
        n_prefix = max(position.num_embeddings - (side // patch_size) ** 2, 0)
        n_prefix = n_prefix if n_prefix <= _MOST_PREFIX else 0
    elif heads := [n for n, _ in _parameters(encoder) if re.search(_LEADING, n)]:
        n_prefix = len(heads) + (first_of(own, "num_register_tokens") or 0)
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
_MOST_PREFIX = 16  # class and register tokens; more than that is a table for other image sizes


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters()


def _is_called(encoder: nn.Module, path: str, root: str) -> bool:
    """Whether a module's parent calls it (rather than reading its weight)."""
    inner = path.removeprefix(root).lstrip(".").rpartition(".")
    parent = encoder.get_submodule(inner[0])
    calls = self_calls(type(parent).forward)
    if "interpolate_pos_encoding=True" in forward_source(type(encoder).forward):
        return False  # it reads the table at other places instead
    return not forward_source(type(parent).forward) or inner[2] in calls


def _side(size: Any) -> int | None:
    """Returns an image or patch size as one number, where it is a square's."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def _patch_embed(encoder: nn.Module) -> Any:
    """Returns the first convolution that cuts patches, or the first linear map named for it."""
    modules = list(encoder.named_modules())
    convs = [m for _, m in modules if isinstance(m, nn.Conv2d | nn.Conv3d)]
    cutting = [m for m in convs if m.stride == m.kernel_size and m.kernel_size[-1] > 1]
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
    """Returns the parameter by which a packed encoder is told its images' sizes, if it is one."""
    names = forward_parameters(encoder)
    return next((name for name in names if re.search(_GRID_ARGUMENT, name)), None)


def _deepstack(model: nn.Module, paths: dict[int, str]) -> Iterator[str]:
    seen = set()
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if not isinstance(module, nn.ModuleList) or not re.search(_DEEPSTACK, leaf):
            continue
        if leaf not in seen:  # of the same name elsewhere: another route, taken on request only
            yield from (paths[id(child)] for child in module if id(child) in paths)
        seen.add(leaf)


_DEEPSTACK = "deepstack|^merger_list$|layerwise_projectors|spatial_projectors"


def _read_layers(config: Any, n_blocks: int) -> tuple[int, ...] | None:
    """Returns the residual slots named by `vision_feature_layer`, counted from the front."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None or not n_blocks:
        return None
    layers = [layers] if isinstance(layers, int) else list(layers)
    return tuple(layer % (n_blocks + 1) for layer in layers)
