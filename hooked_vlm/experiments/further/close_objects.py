"""Pictures whose objects stand close together, and what probes read from their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.dual_mechanisms.order_reading import strips
from hooked_vlm.stimuli.geometry import Geometry, Layout, Shifted
from hooked_vlm.stimuli.settings import SETTINGS


READINGS = ("relative", "absolute", "other")
EDGES = {"start": "left or top edge", "end": "right or bottom edge"}
Read = Int[np.ndarray, "probe image row col"]
"""The place as which each probe reads each token."""


@dataclass(frozen=True)
class Moved:
    """An object of which no token lies in the strip of its order."""

    place: int
    """Its place among the objects: 0, 1 or 2."""
    mask: Bool[np.ndarray, "row col"]
    strips: Int[np.ndarray, " token"]
    """The strip of each of its tokens."""


def close_together(geometry: Layout, gap: int) -> dict[str, Shifted]:
    """Returns the layouts at the start, in the centre and at the end of the axis.

    Raises `DataError` for a gap at which the objects do not fit, or none leaves the strip of its
    order.
    """
    if not isinstance(geometry, Geometry):
        raise DataError(
            f"A {type(geometry).__name__} was given; its objects cannot be moved. Use one of the "
            f"settings {', '.join(SETTINGS)}."
        )
    n, size = geometry.n_tokens, geometry.object_tokens
    room = n - 3 * size - 2 * gap
    if room < 0:
        raise DataError(
            f"gap={gap} was given; three objects of {size} tokens do not fit with it in {n} "
            f"tokens. Give a gap of at most {(n - 3 * size) // 2}."
        )
    firsts = {"start": 0, "centre": room // 2, "end": room}
    layouts = {
        name: Shifted(n, geometry.token_px, size, gap, geometry.strips, first=first)
        for name, first in firsts.items()
    }
    if not all(moved(layouts[edge], "horizontal") for edge in EDGES):
        raise DataError(
            f"gap={gap} was given; with it every object at an edge has tokens in the strip of its "
            "order. Give another gap, such as 0."
        )
    return layouts


def moved(layout: Layout, axis: str) -> list[Moved]:
    """Returns the objects of which no token lies in the strip of their order."""
    strip, _ = strips(layout, axis)
    found = []
    for place in range(3):
        mask = layout.object_region(axis, place).mask
        if not (strip[mask] == place).any():
            found.append(Moved(place, mask, strip[mask]))
    return found


def shares_read(read: Read, objects: Sequence[Moved]) -> Float[np.ndarray, "object probe image 3"]:
    """Returns the shares of each object's tokens that are read as in `READINGS`."""
    shares = []
    for one in objects:
        tokens = read[..., one.mask]
        relative = (tokens == one.place).mean(-1)
        absolute = (tokens == one.strips).mean(-1)
        shares.append(np.stack([relative, absolute, 1 - relative - absolute], axis=-1))
    return np.stack(shares).clip(0, 1)  # a difference of shares may be -1e-17


def agreeing(read: Read, layout: Layout, axis: str) -> Float[np.ndarray, "probe image"]:
    """Returns the share read as their place, of object tokens whose order and strip agree.

    Places have the same weight.
    """
    strip, _ = strips(layout, axis)
    shares = []
    for place in range(3):
        mask = layout.object_region(axis, place).mask & (strip == place)
        if mask.any():
            shares.append((read[..., mask] == place).mean(-1))
    return np.mean(shares, axis=0)
