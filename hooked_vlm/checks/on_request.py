"""Verifies sites that run only where they are named: inputs of parts, heads, scales."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.checks.laws import NONE, Finding, finding, perturbed, quiet, writing
from hooked_vlm.hooks.on_request import norm_kind
from hooked_vlm.hooks.sites import Site
from hooked_vlm.model.vlm import HookedVLM


NEAR: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3}
PARTS = {"hook_attn_in": ("pre", "attn_out", "mid"), "hook_mlp_in": ("mid", "mlp_out", "post")}
"""By site, the stream before its part, what the part adds, and the stream after it."""


def check_on_request(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies in the middle block, and at the final norm, what these sites say they are.

    Results of heads sum to the output of attention's last map, without its bias.  A norm's output
    is, feature by feature, one affine function of its input over the scale.  A write to the input
    of a part moves the logits, and reaches the stream through what that part adds alone.
    """
    more: dict[str, Site] = getattr(model.sites, "more", {})
    middle = f"blocks.{model.cfg.n_layers // 2}."
    sites = [s for name, s in more.items() if name.startswith((middle, "ln_final"))]
    if not sites:
        return Finding("on request", NONE, "no norm or map of a known kind in the middle block")
    problems = []
    with quiet():
        logits, cache = model.run_with_cache(inputs, [site.name for site in sites])
        if not torch.allclose(logits, model(inputs), **NEAR):
            problems.append("reading changes the logits")
        for site in sites:
            if site.name not in cache:
                problems.append(f"{site.name} never ran")
            elif not site.computed:
                problems += _of_input(model, inputs, site, logits)
            else:
                given, out = _of_module(model, inputs, site)
                check = _of_result if site.computed == "result" else _of_scale
                problems += check(model, site, cache[site.name], given, out)
    return finding("on request", problems)


def _of_module(model: HookedVLM, inputs: Mapping[str, Any], site: Site) -> tuple[Tensor, Tensor]:
    """Returns the input and the output of a site's module, by torch's own hook."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: Any, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        seen.append((given.detach(), output.detach()))

    module = model.hf_model.get_submodule(site.module)
    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        model(inputs)
    finally:
        handle.remove()
    return seen[-1]


def _of_result(model: HookedVLM, site: Site, value: Tensor, _: Tensor, out: Tensor) -> list[str]:
    bias = getattr(model.hf_model.get_submodule(site.module), "bias", None)
    whole = value.sum(2) + (bias if isinstance(bias, Tensor) else 0)
    same = whole.shape == out.shape and torch.allclose(whole, out, **NEAR)
    return [] if same else [f"{site.name} does not sum to the output of its map"]


def _of_scale(model: HookedVLM, site: Site, value: Tensor, given: Tensor, out: Tensor) -> list[str]:
    if value.shape != (*given.shape[:-1], 1):
        return [f"{site.name} has shape {tuple(value.shape)} for {tuple(given.shape)}"]
    x = given.double()
    if norm_kind(model.hf_model.get_submodule(site.module)) == "layer":
        x = x - x.mean(-1, keepdim=True)
    normal, shown = (x / value).flatten(0, -2), out.double().flatten(0, -2)
    # Differences between positions leave out the norm's bias; the gain is that of the largest.
    normal, shown = normal - normal[:1], shown - shown[:1]
    best = normal.abs().argmax(0, keepdim=True)
    gain = shown.gather(0, best) / normal.gather(0, best)
    off = float((shown - gain * normal).abs().max() / shown.abs().max().clamp(min=1e-9))
    return [] if off < 1e-3 else [f"{site.name} is off by {off:.1e} of the norm's output"]


def _of_input(model: HookedVLM, inputs: Mapping[str, Any], site: Site, logits: Tensor) -> list[str]:
    prefix, _, leaf = site.name.rpartition(".")
    before, part, after = PARTS[leaf]
    stream, added, end = f"{prefix}.hook_resid_{before}", f"{prefix}.hook_{part}", after
    names = [stream, added, f"{prefix}.hook_resid_{end}"]
    if any(name not in model.sites for name in names):
        return []
    edit = (site.name, writing(perturbed))
    moved, edited = model.run_with_cache(inputs, names, fwd_hooks=[edit])
    problems = []
    if torch.allclose(moved, logits, **NEAR):
        problems.append(f"a write to {site.name} changes nothing")
    _, plain = model.run_with_cache(inputs, names)
    start, add, stop = (plain[name] for name in names)
    if not torch.allclose(start + add, stop, **NEAR):
        return problems  # the model scales what it adds
    if not torch.allclose(edited[stream], start, **NEAR):
        problems.append(f"a write to {site.name} moves the stream before it")
    if not torch.allclose(edited[stream] + edited[added], edited[names[2]], **NEAR):
        problems.append(f"a write to {site.name} reaches the stream beside what its part adds")
    return problems
