"""A model's sites as a tree with typed shapes, the layers folded together."""

import re

from hooked_vlm.anatomy.sizes import EncoderConfig, HookedVLMConfig, StackConfig
from hooked_vlm.naming import VISION
from hooked_vlm.sites import Site


def describe_sites(cfg: HookedVLMConfig | EncoderConfig, sites: dict[str, Site]) -> str:
    """Returns one line a site: its name, its axes with the sizes that are fixed, its limits."""
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
        return [f"{cfg.model_name}: {encoder}, {cfg.n_prefix} tokens in front of the patches"]
    lines = [f"{cfg.model_name}: {_sizes(cfg)}, d_vocab={cfg.d_vocab}"]
    return [*lines, f"vision encoder: {encoder}"] if v else lines


def _sizes(cfg: StackConfig) -> str:
    heads = f"{cfg.n_heads} heads"
    if cfg.n_key_value_heads != cfg.n_heads:
        heads += f" ({cfg.n_key_value_heads} key/value)"
    return (
        f"{cfg.n_layers} layers, d_model={cfg.d_model}, {heads} of {cfg.d_head}, d_mlp={cfg.d_mlp}"
    )


def _parent(parent: str, group: list[Site]) -> str:
    return f"l = 0..{len(group) - 1}" if parent == "{l}" else parent


def _shape(site: Site, cfg: HookedVLMConfig | EncoderConfig) -> str:
    tower: StackConfig | None = cfg.vision if site.name.startswith(VISION) else cfg
    assert tower is not None
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
    layers = ", ".join(re.findall(r"blocks\.(\d+)", " ".join(site.name for site in limited)))
    return f"  read-only in layer {layers}"
