"""Descriptions of a block's parts, and tests that detect the kind of a single module.

A module's kind (a linear map, a norm, a list of blocks) is detected from its attributes and
its name.  The frozen descriptions hold module paths and sizes, not modules.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hooked_vlm.anatomy.source import called_children


Fused = Literal["", "3hd", "h3d", "h2d"]
"""The axes of a fused projection's output; empty where it has one part."""
Columns = tuple[int, int]
"""First and one past the last column of a part that is contiguous."""


@dataclass(frozen=True)
class Projection:
    """The module that computes queries, keys or values, and their part of its output."""

    path: str
    layout: Fused | Columns = ""
    """`""`: the whole output; `"3hd"`, `"h3d"`: a fused output with these axes; `"h2d"`: each
    head's queries are followed by a gate; `(a, b)`: these columns."""
    index: int = 0
    """Index in a fused output: 0, 1, 2 for q, k, v."""


@dataclass(frozen=True)
class Attention:
    """One attention module: its projections, its head counts, and how it computes."""

    path: str
    q: Projection | None
    k: Projection | None
    v: Projection | None
    out: str
    n_heads: int
    n_key_value_heads: int
    d_head: int
    dispatched: bool
    """Whether it uses transformers' attention interface (else scores and pattern have no site)."""
    rotary: bool
    packed: bool
    """Whether the patches of all images form one sequence, delimited by `cu_seqlens`."""
    cross: bool = False
    """Whether keys and values come from another sequence than the queries."""


@dataclass(frozen=True)
class Mlp:
    """One feed-forward module; `linear` is the ungated half of a gated one."""

    path: str
    pre: Projection
    linear: Projection | None
    down: str
    d_mlp: int


@dataclass(frozen=True)
class Block:
    """One block; `attn_out` and `mlp_out` are the modules whose output is added to the residual.

    `attn` is None where a block mixes tokens by other means (a convolution, a recurrence);
    `attn_out` is then the module that mixes them.
    """

    path: str
    ln1: str | None
    attn: Attention | None
    attn_out: str | None
    ln2: str | None
    mlp: Mlp | None
    mlp_out: str | None
    cross: Attention | None = None
    cross_out: str | None = None
    per_layer_out: str | None = None
    """The module whose output is added after the MLP's: inputs of each layer's own (Gemma 4)."""
    post_norm: bool = False
    """Whether the residual itself is normalised after each addition (as in BERT)."""
    windowed: bool = False
    """Whether attention runs on windows of the image, each as one batch row (as in SAM)."""


def first_of(owner: Any, *names: str) -> Any:
    """Returns the value of the first of these attributes that is not None, else None."""
    for name in names:
        try:
            value = getattr(owner, name, None)
        except ValueError:  # raised by a config whose layers have different values
            continue
        if value is not None:
            return value
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, quantised or not: it has in_features and out_features."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_norm(name: str, module: nn.Module | None = None) -> bool:
    """Whether a child is a normalisation, by its name or its class name."""
    named = re.search(r"norm|(^|_)ln", name) is not None
    return named or (module is not None and "Norm" in type(module).__name__)


def is_scale(module: nn.Module) -> bool:
    """Whether a module is a layer scale: its only parameter is one factor per feature."""
    own = list(module.parameters(recurse=False))
    alone = len(own) == 1 and not is_linear(module) and not any(True for _ in module.children())
    return alone and own[0].ndim == 1


def has_weights(module: nn.Module) -> bool:
    """Whether a module contains parameters, or linear maps with packed weights."""
    parameters = any(True for _ in module.parameters())
    return parameters or any(is_linear(part) for part in module.modules())


def linears_of(module: nn.Module) -> dict[str, Any]:
    """Returns the linear children of a module in the order of their calls."""
    children = dict(module.named_children())
    return {n: children[n] for n in called_children(module) if is_linear(children[n])}


def attention_maps(attn: nn.Module) -> dict[str, Any]:
    """Returns an attention's linear maps; without any, those of its children (`self.query`)."""
    own = linears_of(attn)
    if own:
        return own
    parts = dict(attn.named_children())
    return {
        f"{part}.{name}": linear
        for part in called_children(attn)
        for name, linear in linears_of(parts[part]).items()
    }


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a block's child is attention: by its name or class, and with projections inside."""
    named = re.search(r"attn|attention", name, re.I) or "Attention" in type(module).__name__
    return bool(named) and not is_norm(name, module) and bool(attention_maps(module))


def block_lists(stack: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yields the lists of blocks in a module: module lists in which some block has attention."""
    for path, module in stack.named_modules():
        if isinstance(module, nn.ModuleList) and any(
            is_attention(*child) for block in module for child in block.named_children()
        ):
            yield path, module
