"""The parts of a residual stream: block 0's input, and what attention and MLPs add to it.

Not every model adds exactly the output of a part.  Some scale it on the way (a residual
multiplier, a gate) or the whole stream, some add more between two blocks (DeepStack), and some
normalise the stream itself.  Each addition is therefore compared with the cached stream: a scaled
part gets its factor, and so do all parts that are in a stream when it is scaled; an addition
between blocks becomes a part, and all else raises an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import DataError, UnknownHookError


Named = list[tuple[str, Tensor]]
"""Parts with their labels."""

OUTPUTS = ("attn_out", "cross_attn_out", "mlp_out", "per_layer_out")
ROUNDING = 8
"""Allowed difference of a sum, in units of the dtype's precision times the sum of magnitudes: a
few roundings of the sum and of each scaled part."""
_ENOUGH = 8
"""Rows from which on one factor for each feature is determined beyond doubt."""


def parts_of(cache: Mapping[Any, Any], tower: str | None, layer: int, end: bool) -> Named:
    """Returns the parts of the stream before block `layer`; with `end`, after block `layer - 1`.

    Raises `DataError` when they do not sum to it, and `UnknownHookError` when the cache holds
    too little to verify that.
    """
    parts: Named = [("embed", _stream(cache, "resid_pre", 0, tower))]
    for block in range(layer):
        if block:
            parts += _between(cache, block, tower)
        added, factor = _of_block(cache, block, tower)
        parts = [(label, part if factor == 1 else factor * part) for label, part in parts] + added
    if layer and not end:
        parts += _between(cache, layer, tower)
    after = end and layer > 0
    name, block = ("resid_post", layer - 1) if after else ("resid_pre", layer)
    whole = _stream(cache, name, block, tower)
    # With the streams of all blocks, each addition was verified by itself.
    streams = [(f"resid_{place}", i, tower) for i in range(layer) for place in ("pre", "post")]
    if not all(stream in cache for stream in streams):
        _require_sum(parts, whole, layer, tower)
    return parts


def added_by(
    cache: Mapping[Any, Any], layer: int, name: str | None, tower: str | None
) -> tuple[Tensor | None, float]:
    """Returns what a part of a block adds to the stream, and what the block multiplies that by.

    A part adds its output, times its factor if any; without a name there is no part.  Raises
    `UnknownHookError` where the cache lacks what gives the factors.
    """
    needed = ["resid_pre", "resid_post", *([] if name is None else [name])]
    missing = [each for each in needed if (each, layer, tower) not in cache]
    try:
        parts, factor = ([], 1.0) if missing else _of_block(cache, layer, tower)
    except DataError:
        missing = [each for each in OUTPUTS if (each, layer, tower) not in cache]
        if "mlp_out" not in missing and "attn_out" not in missing:
            raise
    if missing:
        raise UnknownHookError(
            f"The cache holds no {', '.join(missing)} of block {layer}, and without them it is not "
            "known by what the model multiplies a part, or the stream. Cache the streams and the "
            "outputs of all parts: 'blocks.*resid*', 'blocks.*_out'."
        )
    return dict(parts).get(f"{layer}_{name}"), factor


def _stream(cache: Mapping[Any, Any], name: str, layer: int, tower: str | None) -> Tensor:
    found = cache[name, layer, tower]
    if isinstance(found, list):
        raise DataError(
            f"{name!r} is a list by image (sizes differ), so its parts cannot be stacked. "
            "Decompose the cache of one image."
        )
    return found


def _between(cache: Mapping[Any, Any], layer: int, tower: str | None) -> Named:
    """Returns what the model adds between the blocks before and at `layer`, if it adds anything."""
    if ("resid_post", layer - 1, tower) not in cache or ("resid_pre", layer, tower) not in cache:
        return []
    before = _stream(cache, "resid_post", layer - 1, tower)
    after = _stream(cache, "resid_pre", layer, tower)
    if before.shape != after.shape:
        raise _no_sum(tower, layer - 1, f"{_shape(before)} becomes {_shape(after)} after it")
    return [] if torch.equal(before, after) else [(f"before_{layer}", after - before)]


def _of_block(cache: Mapping[Any, Any], layer: int, tower: str | None) -> tuple[Named, float]:
    """Returns what the parts of a block add to the stream, and what it multiplies the stream by."""
    names = [name for name in OUTPUTS if (name, layer, tower) in cache] or [OUTPUTS[0]]
    outputs: Named = [(f"{layer}_{name}", _stream(cache, name, layer, tower)) for name in names]
    places = [
        place for place in ("pre", "mid", "post") if (f"resid_{place}", layer, tower) in cache
    ]
    streams = {place: _stream(cache, f"resid_{place}", layer, tower) for place in places}
    if not {"pre", "post"} <= streams.keys():
        return outputs, 1.0  # only the whole sum can be verified
    steps = [("pre", "post", outputs)]
    if "mid" in streams and "mlp_out" in names[1:]:
        at = names.index("mlp_out")
        steps = [("pre", "mid", outputs[:at]), ("mid", "post", outputs[at:])]
    found: Named = []
    factor = 1.0
    for start, stop, added in steps:
        scaled = _scaled(streams[start], streams[stop], added)
        if scaled is None:
            names = " + ".join(label for label, _ in added)
            raise _no_sum(tower, layer, f"resid_{start} + {names} is not resid_{stop}")
        added, of_stream = scaled
        found = [(label, of_stream * part) for label, part in found] if of_stream != 1 else found
        found, factor = [*found, *added], factor * of_stream
    return found, factor


def _scaled(start: Tensor, stop: Tensor, added: Named) -> tuple[Named, float] | None:
    """Returns the parts as they were added, each times its factor, and that of the stream.

    The factor is one number for each part, or one for each feature of a single part; the stream's
    is 1 unless nothing else fits.  None where nothing does.
    """
    if any(part.shape != stop.shape for part in (start, *(part for _, part in added))):
        return None
    if _sums(start, [part for _, part in added], stop):
        return added, 1.0
    # Positions that gain nothing: a model may mask what a block adds (text before an image).
    still = (stop == start).all(-1, keepdim=True)
    if bool(still.any()) and not bool(still.all()):
        added = [(label, part.masked_fill(still, 0)) for label, part in added]
    # One number for each part, by least squares.
    width = stop.shape[-1]
    given = torch.stack([part.double().reshape(-1) for _, part in added], dim=-1)
    gained = (stop.double() - start.double()).reshape(-1)
    factors = _fitted(given, gained)
    if factors is None:
        return None
    found = [(label, part * f) for (label, part), f in zip(added, factors, strict=True)]
    blur = _blur(given, start.double().reshape(-1, 1)).sum(-1).view(stop.shape)
    if _sums(start, [part for _, part in found], stop, blur):
        return found, 1.0
    # One number for each feature of a single part.
    ((label, part), *more) = added
    rows, gains = given.view(-1, width), gained.view(-1, width)
    if not more and len(rows) >= _ENOUGH:
        factor = (rows * gains).sum(0) / (rows * rows).sum(0).clamp(min=1e-30)
        part = (part.double() * factor).to(part.dtype)
        blur = _blur(rows, start.double().reshape(-1, width)).view(stop.shape)
        if _sums(start, [part], stop, blur):
            return [(label, part)], 1.0
    # The whole stream times one number, at the end of a block.
    total = (start.double() + sum(part.double() for _, part in added)).reshape(-1, 1)
    (factor,) = _fitted(total, stop.double().reshape(-1)) or (0.0,)
    scaled = [(label, factor * part) for label, part in added]
    blur = _blur(total, stop.double().reshape(-1, 1)).sum(-1).view(stop.shape)
    if factor and _sums(factor * start, [part for _, part in scaled], stop, blur):
        return scaled, factor
    return None


def _fitted(given: Tensor, target: Tensor) -> list[float] | None:
    """Returns the factors of columns that come closest to a target; None where there are none."""
    gram, products = (given.T @ given).cpu(), (given.T @ target).cpu()
    if not bool(gram.isfinite().all() and products.isfinite().all()):
        return None
    return torch.linalg.lstsq(gram, products[:, None]).solution.flatten().tolist()


def _blur(given: Tensor, start: Tensor) -> Tensor:
    """Returns how much the rounding of a stream blurs parts whose factors are fitted to it.

    A change of the stream is known to within its precision times its size; the factor's error,
    over all rows that determine it, is that of a mean.  The result is for a precision of 1.
    """
    error = (given * start).norm(dim=0) / (given * given).sum(0).clamp(min=1e-30)
    return given.abs() * error


def _sums(start: Tensor, parts: Sequence[Tensor], whole: Tensor, blur: Tensor | float = 0) -> bool:
    """Whether a start and its parts sum to a whole, within the rounding of each addition."""
    total, sizes = start.double(), start.abs().double() + whole.abs() + blur
    for part in parts:
        total, sizes = total + part, sizes + part.abs()
    roundings = ROUNDING * max(1.0, (len(parts) / 2) ** 0.5)  # which partly cancel
    allowed = roundings * torch.finfo(whole.dtype).eps * sizes
    return bool(((total - whole).abs() <= allowed).all())


def _require_sum(parts: Named, whole: Tensor, layer: int, tower: str | None) -> None:
    (_, start), *rest = parts
    if any(part.shape != whole.shape for _, part in parts):
        shapes = sorted({_shape(part) for _, part in parts} | {_shape(whole)})
        raise _no_sum(tower, layer - 1, f"parts and stream have shapes {', '.join(shapes)}")
    if not _sums(start, [part for _, part in rest], whole):
        total = torch.stack([part.double() for _, part in parts]).sum(0)
        off = float((total - whole).abs().max())
        raise _no_sum(tower, layer - 1, f"the sum of all parts is off by {off:.2g}")


def _shape(x: Tensor) -> str:
    return f"[{' '.join(map(str, x.shape))}]"


def _no_sum(tower: str | None, layer: int, what: str) -> DataError:
    prefix = f"{tower}." if tower else ""
    return DataError(
        f"The parts of {prefix}blocks.{max(layer, 0)} do not sum to its residual stream: {what}. "
        "The model scales or normalises the stream there, adds something without a site, or a "
        "hook wrote to it. Use accumulated_resid(), whose differences are what each block adds."
    )
