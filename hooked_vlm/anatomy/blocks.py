"""Detects the parts of transformer blocks: attention, feed-forward, norms and their outputs.

A part is detected by its type (a linear map, a list of blocks), by its place in the calls of
its parent's `forward` (see `source`), and by a few names that transformers uses throughout
(`q_proj`, `qkv`, `…norm…`).  A part that cannot be detected reliably is left out.  For
example, a block with an unknown kind of attention still has its residual stream, and a
mixture of experts still has its output.
"""

import re
from typing import Any

from torch import nn

from hooked_vlm.anatomy.parts import (
    Attention,
    Block,
    Mlp,
    Projection,
    attention_maps,
    first_of,
    has_weights,
    is_attention,
    is_linear,
    is_norm,
    is_scale,
    linears_of,
)
from hooked_vlm.anatomy.source import called_children, forward_parameters, forward_source


def _adds_inside(module: nn.Module) -> bool:
    """Whether a part adds the residual itself and normalises the sum (as in BERT)."""
    return "input_tensor" in forward_parameters(module) and bool(linears_of(module))


def read_block(block: nn.Module, path: str, config: Any) -> Block:
    """Returns the parts of one block; `config` is the config of its stack."""
    # 1. Sort the block's children into norms, scales, attentions and feed-forward parts.
    children = dict(block.named_children())
    order = called_children(block)
    norms = [name for name in order if is_norm(name, children[name])]
    # Modules that act on an addend only: a scale, or a short convolution after attention or MLP.
    scales = [n for n in order if n not in norms and (is_scale(children[n]) or "sconv" in n)]
    working = [n for n in order if n not in norms + scales and has_weights(children[n])]
    attentions = [n for n in working if is_attention(n, children[n])]
    attn, cross = _self_and_cross(attentions)
    mixer = attn or next((n for n in working if not _is_feed_forward(n, children[n])), None)
    rest = [n for n in working if n not in attentions and n != mixer]
    last = next((n for n in rest if re.search("mlp|feed_forward|ffn|moe", n)), None)
    last = last or (rest[-1] if rest else None)
    maps = [n for n in rest if is_linear(children[n])]
    direct = last in maps and len(maps) > 1  # fc1 and fc2 are children of the block

    def full(name: str | None) -> str | None:
        return f"{path}.{name}" if name else None

    def attention(name: str | None) -> Attention | None:
        return read_attention(children[name], f"{path}.{name}", config) if name else None

    # 2. Read the MLP: its maps may be inside one part, in two parts, or in the block itself.
    attn_out, ln2 = None, None
    post_norm = last is not None and _adds_inside(children[last])
    if last is None:
        mlp = None
    elif post_norm:
        both = [n for n in rest if linears_of(children[n])][-2:]
        named = {f"{n}.{m}": x for n in both for m, x in linears_of(children[n]).items()}
        mlp = _mlp(named, path)
    elif direct:
        mlp = _mlp({n: children[n] for n in maps}, path)
    else:
        mlp = _mlp(linears_of(children[last]), f"{path}.{last}")
    # 3. Assign the norms by their place in the order of calls.
    before, between, after = _norms_around(order, norms, mixer, maps[0] if direct else last)
    # A single norm between attention and MLP belongs to the MLP; of two, the first belongs to
    # attention.  Without a norm before attention the block is post-norm, and no norm reads the
    # residual stream.
    pre_norm = bool(before)
    ln2 = between[-1] if between and pre_norm else None
    attn_out = between[0] if len(between) > 1 or (between and not pre_norm) else mixer
    if cross is not None:  # with three parts, counting norms does not identify them
        attn_out, ln2, after = (mixer, None, after if pre_norm else [])
    if post_norm and attn is not None:
        attn_out, ln2, after = f"{attn}.output.dense", None, []
        last = f"{last}.{next(iter(linears_of(children[str(last)])))}"
    # 4. A layer scale after a part, if there is one, gives what the part adds to the residual.
    scaled = _scale_between(order, scales, mixer, maps[0] if direct else last)
    mlp_out = _scale_between(order, scales, last) or (after[0] if after and last else last)
    return Block(
        path=path,
        ln1=full(before[-1] if before else None),
        attn=attention(attn),
        attn_out=full(scaled or attn_out if mixer else None),
        ln2=full(ln2),
        mlp=mlp,
        mlp_out=full(mlp_out),
        per_layer_out=full(_added_last(order, children, mlp_out)),
        post_norm=post_norm,
        windowed="window_partition" in forward_source(type(block).forward)
        and bool(first_of(block, "window_size")),
        cross=attention(cross),
        cross_out=full(cross),
    )


def _added_last(
    order: list[str], children: dict[str, nn.Module], mlp_out: str | None
) -> str | None:
    """Returns the last child of a block, if linear maps are called after its MLP has ended."""
    later = order[order.index(mlp_out) + 1 :] if mlp_out in order else []
    return later[-1] if any(is_linear(children[name]) for name in later) else None


def _scale_between(
    order: list[str], scales: list[str], start: str | None, stop: str | None = None
) -> str | None:
    """Returns the layer scale that a block applies to the output of one of its parts, if any."""
    if start not in order:
        return None
    later = order[order.index(start) + 1 : order.index(stop) if stop in order else None]
    return next((name for name in later if name in scales), None)


def _self_and_cross(names: list[str]) -> tuple[str | None, str | None]:
    """Returns a block's self-attention, and its cross-attention to an encoder's output."""
    own = next((n for n in names if not _is_cross(n)), None)
    other = next((n for n in names if _is_cross(n)), None)
    return (own, other) if own else (other, None)


def _is_cross(name: str) -> bool:
    return re.search(r"cross|encoder_attn|enc_dec", name.lower()) is not None


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    words = r"mlp|feed_?forward|ffn|moe|^fc\d"
    return re.search(words, f"{name} {type(module).__name__}", re.I) is not None


def _norms_around(
    order: list[str], norms: list[str], attn: str | None, mlp: str | None
) -> tuple[list[str], list[str], list[str]]:
    """Returns the norms called before attention, between it and the MLP, and after the MLP."""
    start = order.index(attn) if attn else -1
    end = order.index(mlp) if mlp else len(order)
    before = [n for n in norms if order.index(n) < start]
    between = [n for n in norms if start < order.index(n) < end]
    if attn is None:
        before, between = between, []
    return before, between, [n for n in norms if order.index(n) > end]


def _mlp(linears: dict[str, Any], path: str) -> Mlp | None:
    """Returns the MLP's maps, or None where its linear maps are not direct children (experts)."""
    # The map back to the residual width is found by name, else it is the last one called.
    names = [n for n in linears if linears[n].out_features > 1 and "router" not in n]
    down = next((n for n in reversed(names) if re.search(r"down|fc2|w2|out|4h_to_h", n)), None)
    down = down or (names[-1] if names else None)
    ups = [n for n in names if n != down]
    if down is None or not ups or len(names) > 3:
        return None
    # Of the maps into the MLP, a gated MLP has two: separate, or fused into one output.
    d_mlp = linears[down].in_features
    gate = next((name for name in ups if "gate" in name), ups[0])
    linear = next((name for name in ups if name != gate), None)
    if linear is None and linears[gate].out_features == 2 * d_mlp:  # both halves in one map
        pre = Projection(f"{path}.{gate}", (0, d_mlp))
        other = Projection(f"{path}.{gate}", (d_mlp, 2 * d_mlp))
    else:
        pre = Projection(f"{path}.{gate}")
        other = Projection(f"{path}.{linear}") if linear else None
        if any(linears[n].out_features != d_mlp for n in ups):
            return None
    return Mlp(path=path, pre=pre, linear=other, down=f"{path}.{down}", d_mlp=d_mlp)


def read_attention(attn: nn.Module, path: str, config: Any) -> Attention | None:
    """Returns an attention's parts, or None for another kind (linear, recurrent)."""
    # 1. Number and width of heads, from the output map and the config.
    linears = attention_maps(attn)
    core, core_path = _core(attn, path)
    own = getattr(core, "config", None) or config
    source = forward_source(type(core).forward)
    out = next((n for n in reversed(list(linears)) if re.search(_OUT, n)), list(linears)[-1])
    n_heads, d_head = _heads(core, own, linears[out].in_features)
    if n_heads is None or linears[out].in_features % n_heads or "linear" in path.split(".")[-1]:
        return None
    d_out = linears[out].in_features // n_heads
    d_head = d_head or d_out
    # 2. The projections of queries, keys and values.
    found = {letter: _projection(core, linears, letter, n_heads, d_head) for letter in "qkv"}
    if found["v"] is not None and linears[found["v"].path].out_features % d_out:
        found["v"] = None
    key = found["k"]
    n_kv = first_of(core, "num_key_value_heads", "num_kv_heads") or first_of(
        own, "num_key_value_heads"
    )
    if key is not None and not key.layout:
        n_kv = linears[key.path].out_features // d_head
    parts = {
        letter: Projection(f"{path}.{p.path}", p.layout, p.index) if p else None
        for letter, p in found.items()
    }
    # 3. How it computes.  Some modules look up an implementation but not in the registry.
    parameters = forward_parameters(core)
    looked_up = re.search(r"ALL_ATTENTION_FUNCTIONS(\.get_interface|\[)", source)
    dispatched = bool(looked_up) and hasattr(core, "config")
    return Attention(
        path=core_path,
        **parts,
        out=f"{path}.{out}",
        n_heads=n_heads,
        n_key_value_heads=n_kv if isinstance(n_kv, int) else n_heads,
        d_head=d_head,
        dispatched=dispatched,
        rotary=re.search(r"rotary|rope|freqs_c|position_embeddings", source) is not None,
        packed="cu_seqlens" in parameters,
        cross=_is_cross(path.split(".")[-1]),
    )


def _core(attn: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module that computes attention: the given one, or its child with several maps.

    In BERT that child is called `self`, in DINOv2 (up to transformers 5.17) `attention`; the
    output map is in another child.
    """
    if not linears_of(attn):
        for name, part in attn.named_children():
            if name == "self" or len(linears_of(part)) > 1:
                return part, f"{path}.{name}"
    return attn, path


_OUT = r"(^|\.)(o|out|wo|proj|c_proj|dense|projection)$|(o|out|output)_proj|projection_layer"


def _heads(attn: nn.Module, config: Any, width: int) -> tuple[int | None, int | None]:
    """Returns the number and the width of heads; None where neither module nor config has it."""
    d_value = first_of(attn, "v_head_dim", "head_dim", "attention_head_size")
    d_head = first_of(attn, "qk_head_dim", "head_dim", "attention_head_size")
    n_heads = first_of(attn, "num_heads", "num_attention_heads", "n_heads")
    if not isinstance(n_heads, int):
        fits = isinstance(d_value, int) and width % d_value == 0
        told = first_of(config, "num_attention_heads", "num_heads", "n_heads")
        n_heads = width // d_value if fits else told
    return (n_heads if isinstance(n_heads, int) else None), (
        d_head if isinstance(d_head, int) else None
    )


def _projection(
    attn: nn.Module, linears: dict[str, Any], letter: str, n_heads: int, d_head: int
) -> Projection | None:
    """Returns the map that computes q, k or v: `q_proj`, `query`, `wq`, or a fused map."""
    # A map of its own, by name.
    words = {"q": "query", "k": "key", "v": "value"}
    names = (f"{letter}_proj", letter, f"w{letter}", words[letter], f"{letter}_linear")
    pattern = rf"^(self\.|attention\.)?({'|'.join(names)})$"
    name = next((name for name in linears if re.match(pattern, name)), None)
    if name is not None:
        size = linears[name].out_features
        gated = letter == "q" and size == 2 * n_heads * d_head
        if size % d_head:
            return None
        return Projection(name, "h2d" if gated else "")
    # A fused map: all three with equally many heads, or fewer heads of keys and values.
    fused = next((n for n in linears if re.search(r"qkv|query_key_value|att_proj", n)), None)
    if fused is None:
        return None
    index, size = "qkv".index(letter), linears[fused].out_features
    if size == 3 * n_heads * d_head:
        split = getattr(attn, "_split_heads", None)
        source = forward_source(type(attn).forward) + (forward_source(split) if split else "")
        heads_first = re.search(r"heads, 3", source) is not None
        return Projection(fused, "h3d" if heads_first else "3hd", index)
    n_kv, rest = divmod(size - n_heads * d_head, 2 * d_head)
    if rest or n_kv < 1:
        return None
    edges = [0, n_heads * d_head, (n_heads + n_kv) * d_head, size]
    return Projection(fused, (edges[index], edges[index + 1]), index)
