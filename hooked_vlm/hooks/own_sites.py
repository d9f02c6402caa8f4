"""Sites that a user adds: the input or the output of any module of the wrapped model.

The name of a site says where it is: `blocks.3.…` is inside block 3 of the language model.
Recording, sweeps and `stop_at_layer` rely on it.  A name that does not say where its module is
is therefore refused, with the one that does.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from hooked_vlm.anatomy.parts import is_linear
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.errors import HookError, UnknownHookError, did_you_mean
from hooked_vlm.hooks.names import GRADIENT, PROJECTOR, VISION, resolve_name
from hooked_vlm.hooks.sites import Site, Tap


WHERE: dict[str, Tap] = {"output": "output", "input": "input"}
_NAME = re.compile(r"([a-z][a-z0-9_]*\.|\d+\.)*hook_[a-z0-9_]+")
_BLOCK = re.compile(rf"((?:{VISION}\.)?blocks\.\d+\.)hook_resid_pre")
_OUTSIDE = ("blocks.", f"{VISION}.", f"{PROJECTOR}.")


def own_site(model: Any, name: str, module: str, where: str, axes: str | None) -> Site:
    """Returns the site of a module's input or output under a name of the user's.

    Raises `HookError` for a module that does not exist or is never called, a name that is taken,
    malformed or of another place, an activation that is a site already, and axes that the place
    does not have.
    """
    found = _module(model.hf_model, module)
    if where not in WHERE:
        raise HookError(
            f"where={where!r} was given; expected 'output' or 'input'.{did_you_mean(where, WHERE)}"
        )
    _require_new(model.sites, name)
    for site in (*model.sites.values(), *getattr(model.sites, "more", {}).values()):
        if site.module == module and _is_whole(site, where):
            raise HookError(
                f"The {where} of {module!r} is the site {site.name!r} already. Use that name."
            )
    prefix = _prefix(model.sites, model._vision, module)
    beside = name.startswith(_OUTSIDE) if not prefix else not name.startswith(prefix)
    if beside:
        leaf = name.rpartition(".")[2]
        raise HookError(
            f"{module!r} is {_words(prefix)}, and the name {name!r} says something else. Name it "
            f"{prefix + leaf!r}."
        )
    given = axes if axes is not None else _axes(model, prefix, found, where)
    _require_axes(prefix, given)
    order = _order(model, prefix, module, given)
    return Site(name, given, module, WHERE[where], order=order, own=True)


def insert(named: dict[str, Any], name: str, value: Any) -> None:
    """Puts a value into a dict of a model's sites (or points) where a forward pass comes to it.

    That is before the last one of its block, or of its part of the model.
    """
    block = re.match(rf"(?:{VISION}\.)?blocks\.\d+\.", name)
    last = f"{block[0]}hook_resid_post" if block else f"{name.split('.')[0]}.hook_out"
    items = list(named.items())
    place = next((i for i, (known, _) in enumerate(items) if known == last), len(items))
    items.insert(place, (name, value))
    named.clear()
    named.update(items)


def _module(hf_model: nn.Module, path: str) -> nn.Module:
    modules = dict(hf_model.named_modules(remove_duplicate=False))
    if not path or path not in modules:
        raise HookError(
            f"There is no module {path!r} in the wrapped model.{did_you_mean(path, modules)} "
            "model.hf_model.named_modules() lists all."
        )
    found = modules[path]
    if isinstance(found, nn.ModuleList | nn.ModuleDict):
        raise HookError(
            f"{path!r} is a {type(found).__name__}, which is never called. Give a module in it, "
            f"such as {next((f'{path}.{n}' for n, _ in found.named_children()), path)!r}."
        )
    return found


def _require_new(sites: Mapping[str, Site], name: str) -> None:
    if not _NAME.fullmatch(name) or name.endswith(GRADIENT):
        raise HookError(
            f"{name!r} is no name of a site. Expected parts separated by dots, the last of which "
            f"begins with hook_ and does not end with {GRADIENT}, such as 'blocks.0.hook_router'."
        )
    try:
        taken = resolve_name(name, sites)
    except UnknownHookError:
        return
    raise HookError(f"The name {name!r} is taken: it is the site {taken!r}. Use another name.")


def _is_whole(site: Site, where: str) -> bool:
    """Whether a site carries a module's whole input or output as it is."""
    same = site.tap == "output" if where == "output" else site.tap in ("input", "residual")
    return same and not (site.layout or site.heads or site.computed)


def _prefix(sites: Mapping[str, Site], vision: Vision | None, module: str) -> str:
    """Returns how the names of sites in a module begin; empty outside blocks and encoder."""
    places = {} if vision is None else {vision.path: f"{VISION}."}
    for name, site in sites.items():
        if (block := _BLOCK.fullmatch(name)) is not None:
            places[site.module] = block[1]
        elif name.startswith(PROJECTOR) and name.endswith("hook_out") and not site.own:
            places[site.module] = name.removesuffix("hook_out")
    inside = [path for path in places if module == path or module.startswith(f"{path}.")]
    return places[max(inside, key=len)] if inside else ""


def _words(prefix: str) -> str:
    if not prefix:
        return "neither in a block nor in the vision encoder or the projector"
    tower = "the vision encoder" if prefix.startswith(VISION) else "the language model"
    if block := re.search(r"blocks\.(\d+)\.", prefix):
        return f"in block {block[1]} of {tower}"
    return "in the projector" if prefix.startswith(PROJECTOR) else f"in {tower}, outside its blocks"


def _rows(prefix: str) -> tuple[str, ...]:
    """Returns what the axes may begin with, the usual first."""
    if prefix.startswith(PROJECTOR):
        return "image token", "image patch"
    return ("image patch",) if prefix.startswith(VISION) else ("batch",)


def _axes(model: Any, prefix: str, module: Any, where: str) -> str:
    """Returns the axes of a sequence of vectors, with the name of their size where it is known."""
    rows = _rows(prefix)[0]
    if rows == "batch":
        rows = "batch pos"
    size = None
    if is_linear(module):
        size = module.out_features if where == "output" else module.in_features
    elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:  # a norm
        size = len(module.weight)
    in_encoder = rows == "image patch"
    stack = model.cfg.vision if in_encoder else model.cfg
    if size is not None and size == stack.d_model:
        return f"{rows} {'d_vision' if in_encoder else 'd_model'}"
    return f"{rows} feature"


def _require_axes(prefix: str, axes: str) -> None:
    begin = _rows(prefix)
    words = axes.split()
    if len(set(words)) == len(words) and any(axes.startswith(f"{rows} ") for rows in begin):
        return
    raise HookError(
        f"axes={axes!r} was given; expected different names separated by blanks, that begin with "
        f"{' or '.join(map(repr, begin))}, such as "
        f"'{'batch pos' if begin == ('batch',) else begin[0]} feature'."
    )


def _order(model: Any, prefix: str, module: str, axes: str) -> Any:
    """Returns the stage at which rows are packed there; empty where they are not."""
    vision: Vision | None = model._vision
    if vision is None or not vision.packed or not prefix.startswith((VISION, PROJECTOR)):
        return ""
    if prefix.startswith(PROJECTOR):
        leaf = "hook_out" if axes.startswith("image token") else "hook_in"
        like = model.sites.get(prefix + leaf) or model.sites[f"{PROJECTOR}.{leaf}"]
        return like.order
    if prefix != f"{VISION}.":
        return model.sites[f"{prefix}hook_resid_pre"].order
    raise HookError(
        f"{module!r} is in the vision encoder, outside its blocks, and this encoder packs patches "
        "in an order that is not known there. Add sites in a block or in the projector."
    )
