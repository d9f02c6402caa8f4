"""Sites that run only where they are named: inputs of single parts, results of heads, scales.

`run_with_cache` without a filter leaves them out, since they repeat what other sites hold, and
patterns select them only where they select nothing else.  They belong to the language model.

- `blocks.{l}.hook_attn_in` and `.hook_mlp_in` are the residual stream as attention, or the MLP,
  reads it, before its norm.  A write reaches that part alone, not the stream.
- `blocks.{l}.attn.hook_result` is what each head adds to the output of attention, before a bias.
- `blocks.{l}.ln1.hook_scale`, `.ln2.hook_scale` and `ln_final.hook_scale` are what a norm divides
  by.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.model import Anatomy
from hooked_vlm.anatomy.parts import Block, first_of
from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.sites import Site


_RESULT = "it is computed from hook_z and the weight; write attn.hook_z or hook_attn_out"
_SCALE = "it is computed from the norm's input; write hook_normalized or the stream"


def on_request_sites(hf_model: nn.Module, anatomy: Anatomy) -> dict[str, Site]:
    """Returns the sites of a model that run only where they are named, by name."""
    sites: list[Site] = []
    for layer, block in enumerate(anatomy.lm.blocks):
        sites += _of_block(hf_model, block, f"blocks.{layer}.")
    final = anatomy.lm.final_norm
    if final and norm_kind(hf_model.get_submodule(final)):
        sites.append(_scale("ln_final.", final))
    return {site.name: site for site in sites}


def _of_block(hf_model: nn.Module, block: Block, prefix: str) -> Iterator[Site]:
    stream = "batch pos d_model"
    # With a norm each, an input can be changed for one part alone.
    if block.ln1 and block.ln2 and block.attn:
        yield Site(f"{prefix}hook_attn_in", stream, block.ln1, "input")
    if block.ln2 and block.mlp_out:
        yield Site(f"{prefix}hook_mlp_in", stream, block.ln2, "input")
    attn = block.attn
    if attn and is_plain_map(hf_model.get_submodule(attn.out)):
        yield Site(
            f"{prefix}attn.hook_result",
            "batch pos head d_model",
            attn.out,
            "input",
            heads=attn.n_heads,
            read_only=_RESULT,
            computed="result",
        )
    for name, path in (("ln1", block.ln1), ("ln2", block.ln2)):
        if path and norm_kind(hf_model.get_submodule(path)):
            yield _scale(f"{prefix}{name}.", path)


def _scale(prefix: str, path: str) -> Site:
    name = f"{prefix}hook_scale"
    return Site(name, "batch pos scale", path, "input", read_only=_SCALE, computed="scale")


def norm_kind(norm: nn.Module) -> str:
    """Returns whether a norm divides by a root mean square ("rms") or a deviation ("layer").

    Empty for a norm of another kind, or one that has no epsilon to be read.
    """
    if isinstance(norm, nn.LayerNorm):
        return "layer"
    if isinstance(norm, nn.RMSNorm):
        return "rms"
    if first_of(norm, "variance_epsilon", "eps", "epsilon") is None:
        return ""
    own = getattr(type(norm), "_norm", None)
    source = forward_source(type(norm).forward) + (forward_source(own) if own else "")
    squares = ("pow(2).mean(-1", "pow(2).mean(dim=-1", "square().mean(", "** 2).mean(")
    is_centred = any(part in source for part in ("- mean", "-mean", ".var("))
    return "rms" if any(part in source for part in squares) and not is_centred else ""


def is_plain_map(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight can be read as a matrix."""
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    return plain and type(module).__name__ in (
        "Linear",
        "Conv1D",
        "NonDynamicallyQuantizableLinear",
    )


def computed(site: Site, module: Any, raw: Tensor) -> Tensor:
    """Returns what a site computes from the input of its module, `[batch, pos, …]`."""
    if site.computed == "scale":
        return _scale_of(module, raw)
    z = raw.unflatten(-1, (site.heads, -1))
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    by_head = weight.unflatten(0, (site.heads, -1))
    if z.ndim != 4 or z.shape[-1] != by_head.shape[1]:
        raise HookError(
            f"{site.name} cannot be computed: the heads' outputs have shape {tuple(z.shape)}, and "
            f"the weight {tuple(by_head.shape)}. Use attn.hook_z."
        )
    return torch.einsum("bphd,hdm->bphm", z, by_head)


def _scale_of(norm: Any, raw: Tensor) -> Tensor:
    x = raw.float()
    eps = first_of(norm, "variance_epsilon", "eps", "epsilon")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    eps = float(eps) if not isinstance(eps, Tensor) else eps.float()
    if norm_kind(norm) == "layer":
        x = x - x.mean(-1, keepdim=True)
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
