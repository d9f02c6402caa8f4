"""The grammar of hook names, and the spellings that are accepted for them.

The name of a site in a block is `[vision_encoder.]blocks.{layer}.{site}`; other names are
`{site}`, `vision_encoder.{site}` or `vision_projector.{site}`.  The sites have
TransformerLens's names.  The spellings of its bridge (`blocks.3.attn.q.hook_out`,
`vision_encoder.encoder_layers.0.hook_in`) are accepted and converted.  A name or filter that
matches no site of the model raises `UnknownHookError` with the nearest names.
"""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Final, Literal, NamedTuple

from hooked_vlm.arguments.checked import checked, is_listed, shown
from hooked_vlm.arguments.kinds import Name
from hooked_vlm.errors import UnknownHookError, counted, did_you_mean


VISION: Final = "vision_encoder"
PROJECTOR: Final = "vision_projector"

GRADIENT: Final = "_grad"
"""What follows the name of a site in the name of its gradient, as in TransformerLens."""

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

_RENAMED = (
    (r"\bencoder_layers\.", "blocks."),
    (r"(blocks\.-?\d+)\.hook_in$", r"\1.hook_resid_pre"),
    (r"(blocks\.-?\d+)\.hook_out$", r"\1.hook_resid_post"),
    (r"(blocks\.-?\d+)\.ln2\.hook_in$", r"\1.hook_resid_mid"),
    (r"(blocks\.-?\d+)\.(attn|mlp)\.hook_out$", r"\1.hook_\2_out"),
    (r"\.attn\.([qkv])\.hook_out$", r".attn.hook_\1"),
    (r"\.attn\.o\.hook_in$", ".attn.hook_z"),
    (r"\.attn\.hook_scores$", ".attn.hook_attn_scores"),
    (r"^embed\.hook_out$", "hook_embed"),
    (r"^(unembed\.hook_out|hook_unembed)$", "hook_logits"),
    (r"^ln_final\.hook_out$", "ln_final.hook_normalized"),
    (r"^unembed\.hook_in$", "ln_final.hook_normalized"),
    (r"hook_vision_out$", "hook_out"),
    (r"hook_vision_proj_(in|out)$", r"hook_\1"),
)

# Short site names and their place inside a block, as in TransformerLens's get_act_name.
_IN_ATTENTION = {"q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern", "result"}
_IN_MLP = {"pre", "post", "mid", "pre_linear"}
_SHORT = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_TOWERS = {"vision": VISION, VISION: VISION, "projector": PROJECTOR, PROJECTOR: PROJECTOR}


@checked(UnknownHookError)
def get_act_name(name: Name, layer: int | Name | None = None, layer_type: str | None = None) -> str:
    """Returns the full hook name of a short name, as TransformerLens's function does.

    `layer_type` may also be a tower: `"vision_encoder"` (or `"vision"`), or
    `"vision_projector"` (or `"projector"`).  Full names are returned unchanged.

    >>> get_act_name("resid_post", 3)
    'blocks.3.hook_resid_post'
    >>> get_act_name("k6")
    'blocks.6.attn.hook_k'
    >>> get_act_name("pattern", 0, "vision_encoder")
    'vision_encoder.blocks.0.attn.hook_pattern'
    >>> get_act_name("out", layer_type="vision_projector")
    'vision_projector.hook_out'
    >>> get_act_name("q_grad", 3)
    'blocks.3.attn.hook_q_grad'
    """
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    if name.endswith(GRADIENT):
        return get_act_name(name.removesuffix(GRADIENT), layer, layer_type) + GRADIENT
    # "k6" has its layer in the name.
    match = re.match(r"([a-z_]+)(\d+)([a-z]?.*)", name)
    if match and layer is None:
        name, layer, layer_type = match[1], int(match[2]), match[3] or layer_type
    name = _SHORT.get(name, name).removeprefix("hook_")
    tower = _TOWERS.get(layer_type or "")
    inner = "" if tower else _LAYER_TYPES.get(layer_type or "", layer_type or "")
    prefix = f"{tower}." if tower else ""
    if name in ("scale", "normalized"):
        norm = "ln_final" if layer is None else f"blocks.{layer}.{inner or 'ln1'}"
        return f"{prefix}{norm}.hook_{name}"
    if name in _IN_ATTENTION:
        inner = "attn"
    elif name in _IN_MLP:
        inner = "mlp"
    block = f"blocks.{layer}." if layer is not None else ""
    return f"{prefix}{block}{inner + '.' if inner else ''}hook_{name}"


def without_gradient(name: str) -> str:
    """Returns the site whose activation or gradient has this name in a cache.

    >>> without_gradient("hook_embed_grad"), without_gradient("hook_embed")
    ('hook_embed', 'hook_embed')
    """
    return name.removesuffix(GRADIENT)


def tower_of(name: str | None) -> str:
    """Returns the prefix of a tower (None: the language model, `""`), or `UnknownHookError`."""
    if name is not None and name not in _TOWERS:
        raise UnknownHookError(
            f"tower={name!r} is not known: use None (the language model), {VISION!r} or "
            f"{PROJECTOR!r}.{did_you_mean(name, _TOWERS)}"
        )
    return _TOWERS[name] if name is not None else ""


def slot_name(slot: int, n_layers: int, tower: str = "") -> str:
    """Returns the residual site of a slot: slot 0 is block 0's input, slot l block l-1's output.

    A stack of `n_layers` blocks has `n_layers + 1` slots (paper, section 4); negative
    slots count from the end.  Raises `UnknownHookError` when there is no such slot.
    """
    if not -n_layers - 1 <= slot <= n_layers:
        raise UnknownHookError(
            f"Slot {slot} does not exist: a model of {counted(n_layers, 'block')} has slots 0 to "
            f"{n_layers} (or -1 to {-n_layers - 1} from the end)."
        )
    slot %= n_layers + 1
    prefix = f"{tower}." if tower else ""
    if slot == 0:
        return f"{prefix}blocks.0.hook_resid_pre"
    return f"{prefix}blocks.{slot - 1}.hook_resid_post"


def resolve_name(name: str, known: Iterable[str], n_layers: Mapping[str, int] | None = None) -> str:
    """Returns the site with this name, or raises `UnknownHookError` with the nearest names.

    Negative layers count from the end of the known layers.  Where only some layers are known,
    `n_layers` gives the number by stack (`"blocks"`, `"vision_encoder.blocks"`).
    """
    if isinstance(known, Mapping) and name in known:  # sweeps ask for every cell
        return name
    more = getattr(known, "more", ())
    known = list(known)
    if name in (lookup := {*known, *more}):
        return name
    gradient = GRADIENT if name.endswith(GRADIENT) else ""
    canonical = name.removesuffix(GRADIENT)
    for pattern, replacement in _RENAMED:
        canonical = re.sub(pattern, replacement, canonical)
    canonical += gradient
    canonical = _from_the_end(canonical, known, n_layers or {})
    if canonical in lookup:
        return canonical
    raise UnknownHookError(_unknown(name, canonical, known))


class SitePath(NamedTuple):
    """The parts of a site's name: the tower, the block (None: outside blocks) and the rest."""

    tower: Literal["lm", "vision_encoder", "vision_projector"]
    layer: int | None
    leaf: str

    @property
    def is_vision(self) -> bool:
        """Whether it is on the way from pixels to image tokens."""
        return self.tower != "lm"


@cache
def site_path(name: str) -> SitePath:
    """Returns the parts of a site's name.

    >>> site_path("vision_encoder.blocks.3.attn.hook_z")
    SitePath(tower='vision_encoder', layer=3, leaf='attn.hook_z')
    >>> site_path("hook_merged_embed")
    SitePath(tower='lm', layer=None, leaf='hook_merged_embed')
    """
    tower, _, rest = name.partition(".")
    if tower not in (VISION, PROJECTOR):
        tower, rest = "lm", name
    block = re.match(r"blocks\.(\d+)\.(.*)", rest)
    layer, leaf = (int(block[1]), block[2]) if block else (None, rest)
    return SitePath(tower, layer, leaf)


def _layer_pattern(name: str) -> re.Match[str] | None:
    return re.match(rf"((?:{VISION}\.)?blocks)\.(-?\d+)\.", name)


def last_block(names: NamesFilter) -> int | None:
    """Returns the highest block of the language model among site names, or None.

    Sites of the vision encoder and projector run before block 0 and count as -1.  The result
    is None for other sites, and for patterns and functions, which may select other sites.

    >>> last_block(["blocks.2.hook_resid_pre", "blocks.10.hook_mlp_out"])
    10
    >>> last_block(["vision_encoder.blocks.3.hook_resid_post"])
    -1
    """
    given = [names] if isinstance(names, str) else names
    if given is None or callable(given):
        return None
    if not all(re.fullmatch(r"(blocks\.\d+|vision_\w+)\.[\w.]+", name) for name in given):
        return None
    paths = [site_path(name) for name in given]
    layers = [-1 if path.is_vision or path.layer is None else path.layer for path in paths]
    return max(layers, default=None)


def count_layers(prefix: str, known: Iterable[str]) -> int:
    """Returns the number of layers of `"blocks"` or `"vision_encoder.blocks"` in known names."""
    layers = [int(m[2]) for n in known if (m := _layer_pattern(n)) and m[1] == prefix]
    return max(layers, default=-1) + 1


def _from_the_end(name: str, known: list[str], n_layers: Mapping[str, int]) -> str:
    match = _layer_pattern(name)
    if not match or int(match[2]) >= 0:
        return name
    layer = int(match[2]) + (n_layers.get(match[1]) or count_layers(match[1], known))
    return name if layer < 0 else name.replace(f".{match[2]}.", f".{layer}.", 1)


def layer_out_of_range(name: str, n_layers: Mapping[str, int]) -> str:
    """Returns the message for a name whose layer is out of range, else `""`."""
    match = _layer_pattern(name)
    n = n_layers.get(match[1], 0) if match else 0
    if not match or not n or -n <= int(match[2]) < n:
        return ""
    return (
        f"layer {match[2]} is out of range, {match[1]} has layers 0 to {n - 1} "
        f"(or -1 to -{n} from the end)."
    )


def _unknown(name: str, canonical: str, known: list[str]) -> str:
    stacks = {prefix: count_layers(prefix, known) for prefix in ("blocks", f"{VISION}.blocks")}
    if wrong := layer_out_of_range(canonical, stacks):
        return f"No hook named {name!r}: {wrong}"
    tower = [n for n in known if n.startswith((VISION, PROJECTOR))]
    if canonical.startswith((VISION, PROJECTOR)) and not tower:
        return f"No hook named {name!r}: this model has no vision encoder."
    hint = did_you_mean(canonical, known) or " See model.hook_dict or print(model.describe())."
    return f"No hook named {name!r} among this model's {len(known)} sites.{hint}"


class SiteNames(list[str]):
    """The names of a model's sites; `more` are those that run only where they are named."""

    more: Collection[str] = ()

    @classmethod
    def of(cls, sites: Collection[str]) -> "SiteNames":
        """Returns the names of sites, which may have `more` as well."""
        made = cls(sites)
        made.more = list(getattr(sites, "more", ()))
        return made


def select_names(names_filter: NamesFilter, known: Collection[str]) -> list[str]:
    """Returns the known names that a filter selects, in the model's order.

    Names that run on request (`known.more`) come after these.  A pattern or a function selects them
    only where it selects no other.

    A filter is None (all names), a name, a pattern with `*`, a sequence of names and patterns,
    or a function of the name.  Raises `UnknownHookError` when a name, a pattern or the whole
    filter selects no site.
    """
    if names_filter is None:
        return list(known)
    more = list(getattr(known, "more", ()))
    if callable(names_filter):
        chosen = {name for name in known if names_filter(name)}
        chosen = chosen or {name for name in more if names_filter(name)}
        if not chosen:
            raise UnknownHookError(
                f"The names_filter selects none of this model's {len(known)} sites. "
                "See model.hook_dict for their names."
            )
        return [name for name in (*known, *more) if name in chosen]
    patterns = [names_filter] if isinstance(names_filter, str) else names_filter
    if not is_listed(patterns) or not all(isinstance(p, str) for p in patterns):
        raise UnknownHookError(
            f"The names_filter is {shown(names_filter)}; expected a name, a pattern, a list of "
            "these, a function of names, or None for all sites."
        )
    chosen = set()
    for pattern in patterns:
        if "*" not in pattern:
            chosen.add(resolve_name(pattern, known))
            continue
        found = fnmatch.filter(known, pattern) or fnmatch.filter(more, pattern)
        if not found:
            raise UnknownHookError(
                f"The pattern {pattern!r} matches none of this model's {len(known)} sites."
                f"{did_you_mean(pattern, known)}"
            )
        chosen.update(found)
    if not chosen:
        raise UnknownHookError(
            "The names_filter is empty: it names no site. Give at least one name, or None for all."
        )
    return [name for name in (*known, *more) if name in chosen]
