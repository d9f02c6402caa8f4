"""The sites of a model: where each named activation is, and how users see it.

A `Site` is data: a name, its axes, the module whose input or output carries it, and
the view that turns what flows there (fused projections, packed patches, heads folded
into one axis) into the documented shape and back.  `read` and `write` are exact
inverses, so writing back what was read changes nothing, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy import Anatomy, Attention, Block, Mlp, Vision
from hooked_vlm.layout import Images, PackedLayout, PackedOrder, from_images, to_images
from hooked_vlm.naming import PROJECTOR, VISION


@dataclass(frozen=True)
class Site:
    """One named activation.

    `tap` says how the module carries it: its `"output"`, its `"input"`, the `"residual"`
    that it reads and a skip connection carries on (written in place so that both see a
    change), the decoder's `"inputs_embeds"`, or a quantity inside its `"attention"`.
    """

    name: str
    axes: str
    module: str
    tap: str
    part: str = ""
    """Which of q, k, v of a fused projection, or which quantity of the attention."""
    heads: int = 0
    """Number of heads to split the last axis into; 0 leaves it."""
    order: str = ""
    """`"patches"`, `"blocks"` or `"tokens"` (see `PackedLayout`) where rows are packed."""
    conv: bool = False
    """Whether the output is a convolution's, with the grid as its last axes."""
    read_only: str = ""
    """Why a write here is refused; empty when it is allowed."""


def list_sites(anatomy: Anatomy) -> dict[str, Site]:
    """Returns every site of a model by name, in the order in which a forward pass meets them."""
    sites = [Site("hook_embed", "batch pos d_model", anatomy.embed, "output")]
    if anatomy.vision is not None:
        sites += _vision_sites(anatomy.vision, anatomy.projector)
        # A language model alone makes its embeddings inside: hook_embed is all there is.
        merged = ("hook_merged_embed", "batch pos d_model", anatomy.lm.path, "inputs_embeds")
        sites.append(Site(*merged))
    lm = anatomy.lm
    for layer, block in enumerate(lm.blocks):
        sites += _block_sites(block, f"blocks.{layer}.", "batch pos", "", "", "d_model")
    if lm.final_norm:
        sites.append(Site("ln_final.hook_in", "batch pos d_model", lm.final_norm, "input"))
        sites.append(Site("ln_final.hook_normalized", "batch pos d_model", lm.final_norm, "output"))
    sites.append(Site("hook_logits", "batch pos d_vocab", anatomy.unembed, "output"))
    return {site.name: site for site in sites}


def _vision_sites(vision: Vision, projector: str | None) -> Iterator[Site]:
    packed = vision.blocks[0].attn.packed
    inside = "blocks" if packed else ""
    axes = "image patch d_vision"
    yield Site(
        f"{VISION}.hook_patch_embed",
        axes,
        vision.patch_embed,
        "output",
        order="patches" if packed else "",
        conv=True,
    )
    if vision.pos_embed:
        yield Site(f"{VISION}.hook_pos_embed", "1 patch d_vision", vision.pos_embed, "output")
    for layer, block in enumerate(vision.blocks):
        reason = ""
        if layer > vision.last_read:
            reason = (
                f"the projector reads the output of vision block {vision.last_read} "
                f"(vision_feature_layer), so nothing downstream sees block {layer}"
            )
        yield from _block_sites(
            block, f"{VISION}.blocks.{layer}.", "image patch", inside, reason, "d_vision"
        )
    if projector:
        tokens = "tokens" if packed else ""
        features = "image patch d_features"
        yield Site(f"{VISION}.hook_out", features, projector, "input", order=inside)
        yield Site(f"{PROJECTOR}.hook_in", features, projector, "input", order=inside)
        yield Site(
            f"{PROJECTOR}.hook_out", "image token d_model", projector, "output", order=tokens
        )


def _block_sites(
    block: Block, prefix: str, rows: str, order: str, read_only: str, width: str
) -> Iterator[Site]:
    common: dict[str, Any] = {"order": order, "read_only": read_only}
    axes = f"{rows} {width}"
    yield Site(f"{prefix}hook_resid_pre", axes, block.path, "input", **common)
    if block.ln1:
        yield Site(f"{prefix}ln1.hook_normalized", axes, block.ln1, "output", **common)
    yield from _attention_sites(block.attn, f"{prefix}attn.", rows, common)
    yield Site(f"{prefix}hook_attn_out", axes, block.attn_out, "output", **common)
    if block.ln2:
        yield Site(f"{prefix}hook_resid_mid", axes, block.ln2, "residual", **common)
        yield Site(f"{prefix}ln2.hook_normalized", axes, block.ln2, "output", **common)
    if block.mlp:
        yield from _mlp_sites(block.mlp, f"{prefix}mlp.", f"{rows} d_mlp", common)
    yield Site(f"{prefix}hook_mlp_out", axes, block.mlp_out, "output", **common)
    yield Site(f"{prefix}hook_resid_post", axes, block.path, "output", **common)


def _attention_sites(attn: Attention, prefix: str, rows: str, common: dict) -> Iterator[Site]:
    q_axes = f"{rows} head d_head"
    kv_axes = q_axes if attn.n_key_value_heads == attn.n_heads else f"{rows} kv_head d_head"
    for letter, axes in (("q", q_axes), ("k", kv_axes), ("v", kv_axes)):
        heads = attn.n_heads if letter == "q" else attn.n_key_value_heads
        path, part = (attn.qkv, letter) if attn.qkv else (getattr(attn, letter), "")
        if path:
            yield Site(
                f"{prefix}hook_{letter}", axes, path, "output", part=part, heads=heads, **common
            )
    if attn.dispatched:
        if attn.rotary:
            yield Site(f"{prefix}hook_rot_q", q_axes, attn.path, "attention", "rot_q", **common)
            yield Site(f"{prefix}hook_rot_k", kv_axes, attn.path, "attention", "rot_k", **common)
        square = f"{rows.split()[0]} head query key"
        for part in ("attn_scores", "pattern"):
            yield Site(f"{prefix}hook_{part}", square, attn.path, "attention", part, **common)
    yield Site(f"{prefix}hook_z", q_axes, attn.out, "input", heads=attn.n_heads, **common)


def _mlp_sites(mlp: Mlp, prefix: str, axes: str, common: dict) -> Iterator[Site]:
    yield Site(f"{prefix}hook_pre", axes, mlp.pre, "output", **common)
    if mlp.linear:
        yield Site(f"{prefix}hook_pre_linear", axes, mlp.linear, "output", **common)
    yield Site(f"{prefix}hook_post", axes, mlp.down, "input", **common)


_FUSED = {"q": 0, "k": 1, "v": 2}


def read(site: Site, raw: Tensor, layout: PackedLayout | None) -> Images:
    """Returns what flows at a site in the shape users see; a view where that is possible."""
    x = raw
    if site.conv:
        x = x.flatten(1) if site.order else x.flatten(2).transpose(1, 2)
    if site.tap == "attention":
        x = x.transpose(1, 2)[0] if site.order else x.transpose(1, 2)
    elif site.part:
        x = x.unflatten(-1, (3, site.heads, -1)).select(-3, _FUSED[site.part])
    elif site.heads:
        x = x.unflatten(-1, (site.heads, -1))
    return x if not site.order else to_images(_rows(x, site), _order(site, layout))


def write(site: Site, value: Images, raw: Tensor, layout: PackedLayout | None) -> Tensor:
    """Returns a value in the users' shape as it must flow at a site: the inverse of `read`."""
    if site.order:
        x = from_images(value, _order(site, layout))
    else:
        assert isinstance(value, Tensor), "only packed encoders have lists by image"
        x = value
    if site.tap == "attention":
        x = x[None] if site.order else x
        return x.transpose(1, 2)
    if site.part:
        parts = list(raw.unflatten(-1, (3, site.heads, -1)).unbind(-3))
        parts[_FUSED[site.part]] = x.reshape(parts[0].shape)
        return torch.stack(parts, dim=-3).flatten(-3)
    if site.heads:
        x = x.flatten(-2)
    if site.conv:
        x = x if site.order else x.transpose(1, 2)
    return x.reshape(raw.shape)


def _rows(x: Tensor, site: Site) -> Tensor:
    """Drops the leading axis of one that some packed encoders keep."""
    inner = 2 if site.heads or site.tap == "attention" else 1
    return x.flatten(0, x.ndim - inner - 1)


def _order(site: Site, layout: PackedLayout | None) -> PackedOrder:
    assert layout is not None, "a packed encoder ran without its layout having been noted"
    return getattr(layout, site.order)
