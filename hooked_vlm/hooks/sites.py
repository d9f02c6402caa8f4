"""The sites of a model: the module of each named activation, and its documented shape.

A `Site` is data: a name, its axes, the module whose input or output carries it, and the
conversion between the module's tensor (fused projections, packed patches, heads folded into
one axis) and the documented shape.  `read` and `write` are exact inverses, so writing back a
value that was read changes no bit.  `describe_sites` returns the sites as a tree with typed
shapes, with all layers in one entry.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from hooked_vlm.anatomy.model import Anatomy
from hooked_vlm.anatomy.parts import Attention, Block, Columns, Fused, Mlp, Projection
from hooked_vlm.anatomy.sizes import EncoderConfig, HookedVLMConfig, StackConfig
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.errors import counted
from hooked_vlm.hooks.attention import AttentionPart
from hooked_vlm.hooks.names import PROJECTOR, VISION, site_path
from hooked_vlm.hooks.patch_order import (
    PackedLayout,
    Stage,
    VisionActivation,
    cropped,
    from_images,
    to_images,
    uncropped,
)


Tap = Literal["output", "input", "residual", "inputs_embeds", "attention"]


@dataclass(frozen=True)
class Site:
    """One named activation.

    `tap` is how the module carries it: its `"output"`, its `"input"`, the `"residual"` that it
    reads and that also passes a skip connection (written in place so that both see a change),
    the decoder's `"inputs_embeds"`, or a quantity inside its `"attention"`.
    """

    name: str
    axes: str
    module: str
    tap: Tap
    part: AttentionPart | Literal[""] = ""
    """The quantity of the attention, at an `"attention"` tap."""
    layout: Fused | Columns = ""
    """The layout of a fused projection's output (see `anatomy.parts.Projection`)."""
    index: int = 0
    """The index of this site in the fused output."""
    heads: int = 0
    """Number of heads into which the last axis is split; 0: it is not split."""
    order: Stage | Literal[""] = ""
    """The stage of `PackedLayout.order` where rows are packed; empty where they are not."""
    conv: bool = False
    """Whether the output is a convolution's, with the grid as its last axes."""
    read_only: str = ""
    """Why the site cannot be written; empty when it can."""
    computed: str = ""
    """What is computed from the module's input (see `on_request`); empty: the input itself."""
    own: bool = False
    """Whether the user added it (see `own_sites`)."""

    @property
    def by_image(self) -> bool:
        """Whether the first axis is images, or the attention windows of images."""
        return self.axes.startswith(("image", "window"))

    @property
    def by_prompt(self) -> bool:
        """Whether the first axis is prompts."""
        return self.axes.startswith("batch")

    @property
    def by_position(self) -> bool:
        """Whether the first axes are prompts and their positions."""
        return self.axes.startswith("batch pos")

    @property
    def by_patch(self) -> bool:
        """Whether the first axes are images and their patches."""
        return self.axes.startswith("image patch")

    @property
    def by_token(self) -> bool:
        """Whether the first axes are images and their visual tokens."""
        return self.axes.startswith("image token")

    def stack(self, cfg: HookedVLMConfig | EncoderConfig) -> StackConfig:
        """Returns the vision encoder's sizes for its sites, else the language model's."""
        found = cfg.vision if site_path(self.name).tower == VISION else cfg
        assert found is not None, "a model without a vision encoder has no site in one"
        return found


def list_sites(anatomy: Anatomy) -> dict[str, Site]:
    """Returns every site of a model by name, in the order of a forward pass."""
    sites = [Site("hook_embed", "batch pos d_model", anatomy.embed, "output")]
    if anatomy.vision is not None:
        sites += _vision_sites(anatomy.vision, anatomy.projector)
    if anatomy.merges:
        # Without this case the decoder embeds token ids itself, and hook_embed is the only site.
        axes, decoder = "batch pos d_model", anatomy.lm.path
        sites.append(Site("hook_merged_embed", axes, decoder, "inputs_embeds"))
    lm = anatomy.lm
    for layer, block in enumerate(lm.blocks):
        sites += _block_sites(block, f"blocks.{layer}.", "batch pos", "", "", "d_model")
    if lm.final_norm:
        sites.append(Site("ln_final.hook_in", "batch pos d_model", lm.final_norm, "input"))
        sites.append(Site("ln_final.hook_normalized", "batch pos d_model", lm.final_norm, "output"))
    sites.append(Site("hook_logits", "batch pos d_vocab", anatomy.unembed, "output"))
    return {site.name: site for site in sites}


def list_encoder_sites(vision: Vision, out: str | None) -> dict[str, Site]:
    """Returns every site of an encoder without a language model; `out` is its output's module."""
    sites = list(_vision_sites(vision, None))
    if out is not None:
        order = "blocks" if vision.packed else ""
        axes = "image patch d_vision"
        sites.append(Site(f"{VISION}.hook_out", axes, out, "output", order=order))
    return {site.name: site for site in sites}


def _vision_sites(vision: Vision, projector: str | None) -> Iterator[Site]:
    inside = "blocks" if vision.packed else ""
    axes = "image patch d_vision"
    if vision.patch_embed:
        yield Site(
            f"{VISION}.hook_patch_embed",
            axes,
            vision.patch_embed,
            "output",
            order="patches" if vision.packed else "",
            conv=vision.patch_conv,
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
    tokens = "tokens" if vision.packed else ""
    if projector:
        features = "image patch d_features"
        order = "features" if vision.packed else ""
        if vision.packed and not projector.startswith(f"{vision.path}."):
            order = tokens = "outside"
        read_by = (features, projector, "input")
        conv = vision.feature_maps
        yield Site(f"{VISION}.hook_out", *read_by, order=order, conv=conv)
        yield Site(f"{PROJECTOR}.hook_in", *read_by, order=order, conv=conv)
        yield Site(
            f"{PROJECTOR}.hook_out", "image token d_model", projector, "output", order=tokens
        )
    tokens = "tokens" if vision.packed else ""
    for i, path in enumerate(vision.deepstack):
        name = f"{PROJECTOR}.deepstack.{i}.hook_out"
        yield Site(name, "image token d_model", path, "output", order=tokens)


def _block_sites(
    block: Block, prefix: str, rows: str, order: Stage | Literal[""], read_only: str, width: str
) -> Iterator[Site]:
    common: dict[str, Any] = {"order": order, "read_only": read_only}
    axes = f"{rows} {width}"
    yield Site(f"{prefix}hook_resid_pre", axes, block.path, "input", **common)
    if block.ln1:
        yield Site(f"{prefix}ln1.hook_normalized", axes, block.ln1, "output", **common)
    inside = rows.replace("image", "window") if block.windowed else rows
    if block.attn:
        yield from _attention_sites(block.attn, f"{prefix}attn.", inside, common)
    if block.attn_out:
        added = f"{inside} {width}"
        yield Site(f"{prefix}hook_attn_out", added, block.attn_out, "output", **common)
    if block.ln2:
        yield Site(f"{prefix}hook_resid_mid", axes, block.ln2, "residual", **common)
        yield Site(f"{prefix}ln2.hook_normalized", axes, block.ln2, "output", **common)
    if block.cross:
        yield from _attention_sites(block.cross, f"{prefix}cross_attn.", rows, common)
    if block.cross_out:
        yield Site(f"{prefix}hook_cross_attn_out", axes, block.cross_out, "output", **common)
    if block.mlp:
        yield from _mlp_sites(block.mlp, f"{prefix}mlp.", f"{rows} d_mlp", common)
    if block.mlp_out:
        yield Site(f"{prefix}hook_mlp_out", axes, block.mlp_out, "output", **common)
    if block.per_layer_out:
        yield Site(f"{prefix}hook_per_layer_out", axes, block.per_layer_out, "output", **common)
    yield Site(f"{prefix}hook_resid_post", axes, block.path, "output", **common)


def _attention_sites(attn: Attention, prefix: str, rows: str, common: dict) -> Iterator[Site]:
    q_axes = f"{rows} head d_head"
    # In cross-attention, keys and values have the encoder's positions.
    kv_rows = f"{rows.split()[0]} source" if attn.cross else rows
    kv_head = "head" if attn.n_key_value_heads == attn.n_heads else "kv_head"
    kv_axes = f"{kv_rows} {kv_head} d_head"
    shapes = {"q": (q_axes, attn.n_heads), "k": (kv_axes, attn.n_key_value_heads)}
    shapes["v"] = shapes["k"]
    for letter, (axes, heads) in shapes.items():
        found: Projection | None = getattr(attn, letter)
        if found:
            yield Site(
                f"{prefix}hook_{letter}",
                axes,
                found.path,
                "output",
                layout=found.layout,
                index=found.index,
                heads=heads,
                **common,
            )
    if attn.dispatched:
        rotated: dict[str, AttentionPart] = {"q": "rot_q", "k": "rot_k"}
        for letter, part in rotated.items():
            if attn.rotary or not getattr(attn, letter):
                name = f"{prefix}hook_{part if attn.rotary else letter}"
                yield Site(name, shapes[letter][0], attn.path, "attention", part, **common)
        if not attn.v:
            yield Site(f"{prefix}hook_v", kv_axes, attn.path, "attention", "v", **common)
        square = f"{rows.split()[0]} head query key"
        for part in ("attn_scores", "pattern"):
            yield Site(f"{prefix}hook_{part}", square, attn.path, "attention", part, **common)
    yield Site(f"{prefix}hook_z", q_axes, attn.out, "input", heads=attn.n_heads, **common)


def _mlp_sites(mlp: Mlp, prefix: str, axes: str, common: dict) -> Iterator[Site]:
    for name, found in (("pre", mlp.pre), ("pre_linear", mlp.linear)):
        if found:
            layout = found.layout
            yield Site(f"{prefix}hook_{name}", axes, found.path, "output", layout=layout, **common)
    yield Site(f"{prefix}hook_post", axes, mlp.down, "input", **common)


def read(site: Site, raw: Tensor, layout: PackedLayout | None) -> VisionActivation:
    """Returns a module's tensor in the documented shape of a site; a view where possible."""
    if _padded(site, raw, layout):
        return cropped(raw, _known(layout))
    x = rearrange(raw, "image d ... -> image (...) d") if site.conv else raw
    if site.tap == "attention":
        x = x.transpose(1, 2)[0] if site.order else x.transpose(1, 2)
    else:
        x = _part(site, x)
    if site.order:
        rows = _rows(x, site)
        return to_images(rows, _known(layout).order(site.order, len(rows)))
    return _grid_flat(x, site)


def write(site: Site, value: VisionActivation, raw: Tensor, layout: PackedLayout | None) -> Tensor:
    """Returns a value of the documented shape as the module's tensor: the inverse of `read`."""
    if _padded(site, raw, layout):
        return uncropped(value, raw, _known(layout))
    # 1. Restore the encoder's own order of rows.
    if site.order:
        x = from_images(value, _known(layout).order(site.order, sum(map(len, value))))
    else:
        assert isinstance(value, Tensor), "only packed encoders have lists by image"
        x = value
    # 2. Restore heads, fused parts and grid axes.
    if site.tap == "attention":
        x = x[None] if site.order else x
        return x.transpose(1, 2)
    if site.layout:
        whole = raw.clone()
        part = _part(site, whole)
        part.copy_(x.reshape(part.shape))
        return whole
    if site.heads:
        x = x.flatten(-2)
    if site.conv:
        x = x.reshape(len(raw), -1, x.shape[-1]).transpose(1, 2)
    x = x.reshape(raw.shape)
    # 3. Restore the memory layout: another one can change the last bits of later results.
    if x.stride() == raw.stride() and not site.conv:
        return x
    reach = 1 + sum((n - 1) * step for n, step in zip(raw.shape, raw.stride(), strict=True))
    dense = reach == raw.numel()
    like = {"dtype": raw.dtype, "device": raw.device}
    return torch.empty_strided(raw.shape, raw.stride(), **like).copy_(x) if dense else x


def _padded(site: Site, raw: Tensor, layout: PackedLayout | None) -> bool:
    """Whether images of different sizes are one padded batch here, and packed afterwards."""
    if not (site.order and site.conv) or raw.ndim != 4 or layout is None:
        return False
    height, width = (max(shape[i] for shape in layout.shapes) for i in (1, 2))
    return len(raw) == len(layout.shapes) and tuple(raw.shape[2:]) == (height, width)


def _known(layout: PackedLayout | None) -> PackedLayout:
    assert layout is not None, "a packed encoder ran without its layout having been noted"
    return layout


def _part(site: Site, x: Tensor) -> Tensor:
    """Returns the site's part of a projection's output as a view, with heads split."""
    if isinstance(site.layout, tuple):
        x = x[..., slice(*site.layout)]
    elif site.layout == "3hd":
        return x.unflatten(-1, (3, site.heads, -1)).select(-3, site.index)
    elif site.layout == "h3d":
        return x.unflatten(-1, (site.heads, 3, -1)).select(-2, site.index)
    elif site.layout == "h2d":
        return x.unflatten(-1, (site.heads, 2, -1)).select(-2, 0)
    return x.unflatten(-1, (site.heads, -1)) if site.heads else x


def _grid_flat(x: Tensor, site: Site) -> Tensor:
    """Returns patches as one axis where an encoder has axes of rows and columns."""
    wanted = len(site.axes.split())
    if site.by_image and x.ndim > wanted:
        return x.flatten(1, x.ndim - wanted + 1)
    return x


def _rows(x: Tensor, site: Site) -> Tensor:
    """Returns packed rows without the leading axis of size one that some encoders keep."""
    inner = 2 if site.heads or site.tap == "attention" else 1
    return x.flatten(0, x.ndim - inner - 1)


def describe_sites(cfg: HookedVLMConfig | EncoderConfig, sites: dict[str, Site]) -> str:
    """Returns one line per site: its name, its axes with fixed sizes, and its limits."""
    # Sites that differ only in the layer become one entry.
    lines = _headers(cfg)
    lines.append(f"attention: {cfg.attn_implementation}, {cfg.dtype} on {cfg.device}")
    folded: dict[str, list[Site]] = {}
    for site in sites.values():
        folded.setdefault(re.sub(r"blocks\.\d+\.", "blocks.{l}.", site.name), []).append(site)
    width = max(map(len, folded)) + 2
    previous: tuple[str, ...] = ()
    for name, group in folded.items():
        *parents, leaf = name.split(".")
        for depth, parent in enumerate(parents):
            if tuple(parents[: depth + 1]) != previous[: depth + 1]:
                lines.append(f"{'  ' * depth}{_parent(parent, group)}")
        previous = tuple(parents)
        indent = "  " * len(parents)
        shape = _shape(group[0], cfg)
        lines.append(f"{indent}{leaf:<{width - len(indent)}}{shape}{_limits(group)}".rstrip())
    return "\n".join(lines)


def _headers(cfg: HookedVLMConfig | EncoderConfig) -> list[str]:
    v = cfg.vision
    encoder = f"{_sizes(v)}, patch={v.patch_size}px, merge={v.merge}x{v.merge}" if v else ""
    if isinstance(cfg, EncoderConfig):
        return [f"{cfg.model_name}: {encoder}, {counted(cfg.n_prefix, 'token')} before the patches"]
    lines = [f"{cfg.model_name}: {_sizes(cfg)}, d_vocab={cfg.d_vocab}"]
    return [*lines, f"vision encoder: {encoder}"] if v else lines


def _sizes(cfg: StackConfig) -> str:
    layers, heads = counted(cfg.n_layers, "layer"), counted(cfg.n_heads, "head")
    if cfg.n_key_value_heads != cfg.n_heads:
        heads += f" ({cfg.n_key_value_heads} key/value)"
    return f"{layers}, d_model={cfg.d_model}, {heads} of {cfg.d_head}, d_mlp={cfg.d_mlp}"


def _parent(parent: str, group: list[Site]) -> str:
    return f"l = 0..{len(group) - 1}" if parent == "{l}" else parent


def _shape(site: Site, cfg: HookedVLMConfig | EncoderConfig) -> str:
    tower = site.stack(cfg)
    sizes = {
        "d_model": cfg.d_model,
        "d_vision": cfg.vision.d_model if cfg.vision else None,
        "d_vocab": getattr(cfg, "d_vocab", None),
        "d_mlp": tower.d_mlp,
        "d_head": tower.d_head,
        "head": tower.n_heads,
        "kv_head": tower.n_key_value_heads,
    }
    axes = (f"{axis}={size}" if (size := sizes.get(axis)) else axis for axis in site.axes.split())
    return f"[{' '.join(axes)}]"


def _limits(group: list[Site]) -> str:
    limited = [site for site in group if site.read_only]
    if not limited:
        return ""
    layers = ", ".join(str(site_path(site.name).layer) for site in limited)
    return f"  read-only in layer {layers}"
