"""Where the parts of a vision-language model are: read from its module tree.

`read_anatomy` walks any transformers image-text-to-text model (or a module that
follows its `get_encoder(modality="image")` / `get_decoder()` interface) and returns a
frozen description made of module paths and sizes.  Nothing here asks which family a
model belongs to: a part is recognised by what it is (a list of blocks, a linear map),
by when its parent's `forward` calls it (see `calls`), and by the handful of names that
transformers uses throughout (`q_proj`, `qkv`, `position_embedding`).  The description
holds no weights and no modules, so it can be read off a model on the `meta` device.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hooked_vlm.calls import called_children, forward_parameters, forward_source, self_calls
from hooked_vlm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Attention:
    """One attention module: its projections, its head counts, and how it computes."""

    path: str
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    """Path of a fused projection whose output is `(3 head d_head)`; then q, k, v are None."""
    out: str
    n_heads: int
    n_key_value_heads: int
    d_head: int
    dispatched: bool
    """Whether it goes through transformers' attention interface (else no scores, pattern)."""
    rotary: bool
    packed: bool
    """Whether all images' patches come as one sequence, delimited by `cu_seqlens`."""


@dataclass(frozen=True)
class Mlp:
    """One feed-forward module; `linear` is the ungated half of a gated one."""

    path: str
    pre: str
    linear: str | None
    down: str
    d_mlp: int


@dataclass(frozen=True)
class Block:
    """One transformer block; `attn_out` and `mlp_out` are what is added to the residual."""

    path: str
    ln1: str | None
    attn: Attention
    attn_out: str
    ln2: str | None
    mlp: Mlp | None
    mlp_out: str


@dataclass(frozen=True)
class Stack:
    """A run of blocks that share one residual stream."""

    path: str
    blocks: tuple[Block, ...]
    d_model: int
    final_norm: str | None


@dataclass(frozen=True)
class Vision(Stack):
    """The vision encoder, and what the projector reads of it."""

    patch_embed: str
    pos_embed: str | None
    merge: int
    """Side of the square of patches that become one visual token inside the encoder (1: none)."""
    read_layers: tuple[int, ...] | None
    """Residual slots that the projector reads; None when it reads the encoder's final output."""
    n_prefix: int
    patch_size: int
    image_size: int | None
    """Side in pixels of the only image size accepted; None when any size is."""

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
    embed, unembed = _ask(model, "get_input_embeddings"), _ask(model, "get_output_embeddings")
    if embed is None or unembed is None:
        missing = "get_input_embeddings()" if embed is None else "get_output_embeddings()"
        raise UnsupportedModelError(
            f"{type(model).__name__}.{missing} returned nothing; HookedVLM needs a model with a "
            "language-modelling head, such as an AutoModelForImageTextToText."
        )
    encoder = _ask(model, "get_encoder", modality="image")
    # Where there is none, transformers answers with the model itself, or with its base.
    if encoder is None or id(encoder) not in paths or encoder in (model, decoder, _base(model)):
        encoder = None
    config = getattr(model, "config", None)
    return Anatomy(
        lm=_read_stack(decoder, paths),
        embed=paths[id(embed)],
        unembed=paths[id(unembed)],
        vision=_read_vision(encoder, paths, config) if encoder is not None else None,
        projector=_find_projector(model, encoder, paths) if encoder is not None else None,
        image_token_id=_first(config, "image_token_id", "image_token_index"),
    )


def _ask(model: nn.Module, method: str, **kwargs: Any) -> nn.Module | None:
    """Returns what a model answers to one of transformers' `get_…` methods, if it has it."""
    found: Any = getattr(model, method, None)
    return None if found is None else found(**kwargs)


def _base(model: nn.Module) -> nn.Module:
    return getattr(model, "base_model", model)


def _first(owner: Any, *names: str) -> Any:
    """Returns the first of these attributes that is set, else None."""
    return next((v for n in names if (v := getattr(owner, n, None)) is not None), None)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, quantised or not: it says its in and out sizes."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _linears(module: nn.Module) -> dict[str, Any]:
    """Returns the linear children of a module in the order they are called."""
    children = dict(module.named_children())
    return {n: children[n] for n in called_children(module) if is_linear(children[n])}


def _is_attention(name: str, module: nn.Module) -> bool:
    """Whether a block's child is self-attention: so named, and with projections of its own."""
    named = re.search(r"attn|attention", name, re.I) or "Attention" in type(module).__name__
    return bool(named) and bool(_linears(module))


def _block_lists(stack: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for path, module in stack.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(_is_attention(*child) for child in module[0].named_children()):
            yield path, module


def _read_stack(stack: nn.Module, paths: dict[int, str]) -> Stack:
    lists = sorted(_block_lists(stack), key=lambda item: -len(item[1]))
    if not lists:
        raise UnsupportedModelError(
            f"{type(stack).__name__} has no list of blocks with attention in it, so there is no "
            "residual stream to hook."
        )
    blocks = tuple(_read_block(block, paths[id(block)], stack) for block in lists[0][1])
    config = getattr(stack, "config", None)
    d_model = blocks[0].attn.n_heads * blocks[0].attn.d_head
    if config is not None:
        d_model = _first(config, "embed_dim", "hidden_size", "d_model") or d_model
    return Stack(paths[id(stack)], blocks, d_model, _final_norm(stack, paths))


def _final_norm(stack: nn.Module, paths: dict[int, str]) -> str | None:
    """Returns the path of the last norm that the stack itself calls."""
    children = dict(stack.named_children())
    norms = [n for n in called_children(stack) if re.search("norm", type(children[n]).__name__)]
    norms = norms or [n for n in called_children(stack) if "norm" in n]
    return paths[id(children[norms[-1]])] if norms else None


def _read_block(block: nn.Module, path: str, stack: nn.Module) -> Block:
    children = dict(block.named_children())
    order = called_children(block)
    attn = next(name for name in order if _is_attention(name, children[name]))
    rest = [name for name in order if name != attn]
    mlps = [name for name in rest if _linear_count(children[name]) and not _is_norm(name)]
    mlp = next((n for n in mlps if re.search("mlp|feed_forward|ffn", n)), None)
    mlp = mlp or (mlps[-1] if mlps else None)
    before, between, after = _norms_around(order, attn, mlp)
    # One norm between the two belongs to the MLP; of two, the first still belongs to attention.
    # With none in front of attention the block is post-norm, and neither reads the residual.
    pre_norm = bool(before)
    ln2 = between[-1] if between and pre_norm else None
    attn_out = between[0] if len(between) > 1 or (between and not pre_norm) else attn
    return Block(
        path=path,
        ln1=f"{path}.{before[-1]}" if before else None,
        attn=_read_attention(children[attn], f"{path}.{attn}", stack),
        attn_out=f"{path}.{attn_out}",
        ln2=f"{path}.{ln2}" if ln2 else None,
        mlp=_read_mlp(children[mlp], f"{path}.{mlp}") if mlp else None,
        mlp_out=f"{path}.{after[0] if after else mlp}",
    )


def _is_norm(name: str) -> bool:
    return re.search(r"norm|ln", name) is not None


def _linear_count(module: nn.Module) -> int:
    return sum(is_linear(m) for m in module.modules())


def _norms_around(order: list[str], attn: str, mlp: str | None) -> tuple[list[str], ...]:
    """Returns the norms called before attention, between it and the MLP, and after the MLP."""
    norms = [name for name in order if _is_norm(name)]
    start, end = order.index(attn), order.index(mlp) if mlp else len(order)
    before = [n for n in norms if order.index(n) < start]
    between = [n for n in norms if start < order.index(n) < end]
    return before, between, [n for n in norms if order.index(n) > end]


def _read_attention(attn: nn.Module, path: str, stack: nn.Module) -> Attention:
    linears = _linears(attn)
    fused = next((name for name in linears if "qkv" in name), None)
    q, k, v = (_projection(linears, letter) for letter in "qkv") if not fused else (None,) * 3
    out = list(linears)[-1]
    config = getattr(attn, "config", None) or getattr(stack, "config", None)
    n_heads = _first(config, "num_attention_heads", "num_heads") or _first(attn, "num_heads")
    if n_heads is None:
        raise UnsupportedModelError(f"{path} ({type(attn).__name__}) does not say how many heads.")
    inner = linears[fused].out_features // 3 if fused else linears[out].in_features
    d_head = inner // n_heads
    n_kv = linears[k].out_features // d_head if k else n_heads
    source = forward_source(type(attn).forward)
    parameters = forward_parameters(attn)

    def full(name: str | None) -> str | None:
        return f"{path}.{name}" if name else None

    return Attention(
        path=path,
        q=full(q),
        k=full(k),
        v=full(v),
        qkv=full(fused),
        out=f"{path}.{out}",
        n_heads=n_heads,
        n_key_value_heads=n_kv,
        d_head=d_head,
        dispatched="_attn_implementation" in source,
        rotary="position_embeddings" in parameters,
        packed="cu_seqlens" in parameters,
    )


def _projection(linears: dict[str, nn.Module], letter: str) -> str | None:
    """Returns the name of the q, k or v projection: `q_proj`, `query`, `wq` or `q`."""
    words = {"q": "query", "k": "key", "v": "value"}
    pattern = rf"^({letter}_proj|{letter}|w{letter}|{words[letter]}.*|{letter}_.*)$"
    return next((name for name in linears if re.match(pattern, name)), None)


def _read_mlp(mlp: nn.Module, path: str) -> Mlp | None:
    """Returns the MLP's maps, or None where its linear maps are not direct children (experts)."""
    linears = _linears(mlp)
    if len(linears) < 2:
        return None
    *ups, down = linears
    gate = next((name for name in ups if "gate" in name), ups[0])
    linear = next((name for name in ups if name != gate), None)
    return Mlp(
        path=path,
        pre=f"{path}.{gate}",
        linear=f"{path}.{linear}" if linear else None,
        down=f"{path}.{down}",
        d_mlp=linears[gate].out_features,
    )


def _read_vision(encoder: nn.Module, paths: dict[int, str], config: Any) -> Vision:
    stack = _read_stack(encoder, paths)
    convs = [(p, m) for p, m in encoder.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    if not convs:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} has no convolution that cuts the image into patches."
        )
    embedding = next(
        (
            m
            for p, m in encoder.named_modules()
            if re.search(r"pos\w*_embed\w*$", p) and _learned(m)
        ),
        None,
    )
    own = getattr(encoder, "config", None)
    patch_size = convs[0][1].kernel_size[-1]
    packed = stack.blocks[0].attn.packed
    side = _first(own, "image_size")
    side = None if packed or not isinstance(side, int) else side
    n_prefix = 0
    if side is not None and isinstance(embedding, nn.Embedding):
        n_prefix = embedding.num_embeddings - (side // patch_size) ** 2
    return Vision(
        path=stack.path,
        blocks=stack.blocks,
        d_model=stack.d_model,
        final_norm=stack.final_norm,
        patch_embed=paths[id(convs[0][1])],
        pos_embed=paths[id(embedding)] if embedding is not None else None,
        merge=int(_first(encoder, "spatial_merge_size") or 1),
        read_layers=_read_layers(config, len(stack.blocks)),
        n_prefix=n_prefix,
        patch_size=patch_size,
        image_size=side,
    )


def _learned(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _read_layers(config: Any, n_blocks: int) -> tuple[int, ...] | None:
    """Returns the residual slots named by `vision_feature_layer`, counted from the front."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None:
        return None
    layers = [layers] if isinstance(layers, int) else list(layers)
    return tuple(layer % (n_blocks + 1) for layer in layers)


def _find_projector(model: nn.Module, encoder: nn.Module, paths: dict[int, str]) -> str | None:
    """Returns the path of the module that maps encoder features into the language model.

    That is the last child that `get_image_features` calls after the encoder; where it
    calls none (the Qwen-VL layout), the last child that the encoder calls after its blocks.
    """
    base = _base(model)
    children = dict(base.named_children())
    calls = self_calls(getattr(type(base), "get_image_features", None) or type(base).forward)
    after = [
        n for n in calls if n in children and children[n] is not encoder and _maps(children[n])
    ]
    if after:
        return paths[id(children[after[-1]])]
    inner = dict(encoder.named_children())
    last = [n for n in self_calls(type(encoder).forward) if n in inner and not _is_norm(n)]
    last = [n for n in last if _linear_count(inner[n])]
    return paths[id(inner[last[-1]])] if last else None


def _maps(module: nn.Module) -> bool:
    """Whether a module has weights of its own and is no stack of blocks."""
    return _learned(module) and not any(True for _ in _block_lists(module))
