"""Estimates the memory of a cache before a run, and raises when the cache does not fit.

    print(estimate_cache(model, inputs))
    The cache needs about 31 GB: blocks.*.attn.hook_pattern 12 GB, …
    names_filter="blocks.*.hook_resid_post" needs 0.4 GB, …

Sizes come from `activation_sizes`, so the model does not run.  Bytes are counted as in
`ActivationCache.nbytes`: sites that share memory (a block's output is the input of the next
block) count twice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from hooked_vlm.anatomy.devices import compute_dtype, execution_device, free_bytes
from hooked_vlm.errors import CacheMemoryError
from hooked_vlm.hooks.names import NamesFilter, select_names, site_path
from hooked_vlm.model.activation_sizes import Counts, Footprint


_NOT_WORTH_ASKING = 2**26
"""Below this size in bytes, free memory is not queried."""
_LARGEST_NUMBER = 8
"""Bytes of a number in the widest dtype."""


@runtime_checkable
class Sized(Protocol):
    """A wrapped model; `HookedModel` is one."""

    @property
    def footprint(self) -> Footprint: ...


@dataclass(frozen=True)
class CacheEstimate:
    """The estimated memory of one cache; `print` shows it as text."""

    nbytes: int
    by_group: Mapping[str, int]
    """Bytes by site; all layers of a site form one pattern that `names_filter` takes."""
    cheaper: Mapping[str, int]
    """Filters that select fewer sites, as source text, and their bytes."""
    unknown: tuple[str, ...] = ()
    """Patterns of sites that are not counted, because the inputs do not determine their size."""

    def __str__(self) -> str:
        largest = sorted(self.by_group.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {size_text(n)}" for name, n in largest[:3])
        more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
        text = f"The cache needs about {size_text(self.nbytes)}: {shown}{more}."
        if self.cheaper:
            text += f" {self.advice}."
        if self.unknown:
            text += f" Not counted, because their size is unknown: {', '.join(self.unknown)}."
        return text

    @property
    def advice(self) -> str:
        """The cheaper filters and the memory they need, as one line."""
        return ", ".join(f"{text} needs {size_text(n)}" for text, n in self.cheaper.items())


def estimate_cache(
    model: Sized,
    inputs: Mapping[str, Any],
    names_filter: NamesFilter = None,
    stop_at_layer: int | None = None,
) -> CacheEstimate:
    """Returns the memory that `model.run_with_cache` needs with these arguments, without running.

    The estimate is exact for sites whose size the inputs determine.  In models like Qwen-VL,
    Gemma 3 and LLaVA these are all sites.  Raises `UnknownHookError` for a filter that selects
    no site.
    """
    footprint = model.footprint
    names = select_names(names_filter, footprint.sites)
    return _estimate(footprint, inputs, _reached(footprint, names, stop_at_layer))


def _reached(footprint: Footprint, names: Sequence[str], layer: int | None) -> Sequence[str]:
    """Returns the sites that a pass reaches when it ends before an LM block."""
    if layer is None:
        return names
    n_layers, known = footprint.cfg.n_layers, list(footprint.sites)
    layer = layer + n_layers if layer < 0 else layer
    last = "ln_final.hook_in" if layer >= n_layers else f"blocks.{layer}.hook_resid_pre"
    beyond = set(known[known.index(last) + 1 :]) if last in known else set()
    layers = {name: site_path(name).layer for name in names if name not in known}
    beyond |= {n for n, inside in layers.items() if inside is None or inside >= layer}
    return [name for name in names if name not in beyond]


def require_memory(
    footprint: Footprint,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    stop_at_layer: int | None,
    device: str | torch.device | None,
    n_copies: int = 1,
) -> str | None:
    """Raises `CacheMemoryError` for a cache that does not fit into the memory of its device.

    With gradients, each activation is there twice (`n_copies`).

    Returns a warning for a cache that takes more than half of the free memory.  Small inputs
    are skipped without an estimate, and small caches without a query of the free memory.
    """
    if n_copies * footprint.at_most(inputs) * _LARGEST_NUMBER < _NOT_WORTH_ASKING:
        return None
    names = _reached(footprint, names, stop_at_layer)
    if n_copies * _total(footprint, inputs, names) < _NOT_WORTH_ASKING:
        return None
    warning = None
    for place, once in _by_device(footprint, inputs, names, device).items():
        free, needed = free_bytes(place), n_copies * once
        if free is None or needed <= free / 2:
            continue
        have = f"{size_text(needed)} and {size_text(free)} are free on {place}"
        advice = _estimate(footprint, inputs, names).advice or "cache fewer sites with names_filter"
        if needed > free:
            elsewhere = "" if place.type == "cpu" else "; or cache on the CPU: device='cpu'"
            raise CacheMemoryError(
                f"This cache needs about {have}: {advice}{elsewhere}; "
                "pass check_memory=False to run without this check."
            )
        warning = f"This cache takes more than half of the free memory, about {have}: {advice}."
    return warning


def size_text(nbytes: int) -> str:
    """Returns a number of bytes as text with a unit.

    >>> size_text(31_400_000_000), size_text(410_000_000), size_text(1_500)
    ('31 GB', '0.4 GB', '2 kB')
    """
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit * (0.1 if word == "GB" else 1):
            number = nbytes / unit
            return (
                f"{number:.1f} {word}" if number < 10 and word == "GB" else f"{number:.0f} {word}"
            )
    return f"{nbytes} bytes"


def _estimate(
    footprint: Footprint, inputs: Mapping[str, Any], names: Sequence[str]
) -> CacheEstimate:
    sizes = _by_name(footprint, inputs, names)
    groups: dict[str, int] = {}
    unknown: dict[str, None] = {}
    for name, n in sizes.items():
        group = re.sub(r"blocks\.\d+\.", "blocks.*.", name)
        if n is None:
            unknown[group] = None
        elif n:
            groups[group] = groups.get(group, 0) + n
    total = sum(groups.values())
    cheaper = {
        text: needed
        for text, kept in _filters(footprint, names)
        if kept
        and (needed := sum(n or 0 for n in _by_name(footprint, inputs, kept).values())) < total
    }
    return CacheEstimate(total, groups, cheaper, tuple(unknown))


def _filters(footprint: Footprint, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns suggestions for cheaper filters, as source text, and the sites they select."""
    square = ("attn_scores", "pattern")
    residual = "blocks.*.hook_resid_post"
    every = list(footprint.sites)
    found = [
        (
            f'names_filter="{residual}"',
            [n for n in every if site_path(n)[::2] == ("lm", "hook_resid_post")],
        )
    ]
    if len(names) == len(every):
        text = 'names_filter=lambda name: not name.endswith(("attn_scores", "pattern"))'
        found.append((text, [n for n in every if not n.endswith(square)]))
    return found


def _by_name(
    footprint: Footprint, inputs: Mapping[str, Any], names: Sequence[str]
) -> dict[str, int | None]:
    """Returns the bytes of each site; None where the inputs do not determine them."""
    text, vision = _itemsizes(footprint)
    counts = Counts(footprint, inputs)
    rows: dict[str, int | None] = {}
    sizes: dict[str, int | None] = {}
    for name in names:
        width = footprint.widths[name]
        if width.per not in rows:
            rows[width.per] = counts[width.per]
        n = rows[width.per]
        sizes[name] = None if n is None else n * width.numbers * (vision if width.inside else text)
    return sizes


def _total(footprint: Footprint, inputs: Mapping[str, Any], names: Sequence[str]) -> int:
    """Returns the bytes of the sites together, without sites of unknown size.

    It uses cached sums of widths, so it takes almost no time.
    """
    text, vision = _itemsizes(footprint)
    counts = Counts(footprint, inputs)
    return sum(
        (counts[per] or 0) * (text * outside + vision * inside)
        for per, (outside, inside) in footprint.summed(names).items()
    )


def _itemsizes(footprint: Footprint) -> tuple[int, int]:
    """Returns the bytes of one number in the language model, and in the vision encoder."""
    whole, vision = footprint.hf_model, footprint.vision
    inside = whole.get_submodule(vision.path) if vision else whole
    embed = next((s.module for s in footprint.sites.values() if s.name == "hook_embed"), None)
    text = whole.get_submodule(embed) if embed is not None else inside
    return compute_dtype(text, whole).itemsize, compute_dtype(inside, whole).itemsize


def _by_device(
    footprint: Footprint,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    device: str | torch.device | None,
) -> dict[torch.device, int]:
    """Returns the bytes on each device; with `device`, all tensors are moved there."""
    spread = getattr(footprint.hf_model, "hf_device_map", None) or {}
    if device is None and len(set(spread.values())) < 2:
        device = execution_device(footprint.hf_model)
    if device is not None:
        return {torch.device(device): _total(footprint, inputs, names)}
    found: dict[torch.device, int] = {}
    for name, n in _by_name(footprint, inputs, names).items():
        module = footprint.hf_model.get_submodule(footprint.sites[name].module)
        place = execution_device(module) or torch.device("cpu")
        found[place] = found.get(place, 0) + (n or 0)
    return found
