"""The cells that a swap exchanges: whole strips, object cells, strips without their objects."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hooked_vlm.errors import HookedVLMWarning, RegionError
from hooked_vlm.regions.pairs import CellPairs, swap_pairs
from hooked_vlm.stimuli.geometry import Layout


KINDS = ("strip", "object", "background")
ALIGNED = "strip, aligned"
"""Strips paired object on object, where the published pairing does not pair them so."""


@dataclass(frozen=True)
class SwapRegions:
    """The kinds of swap that a layout allows, and the cells that each exchanges."""

    pairs: Mapping[str, Mapping[str, CellPairs]]
    """Axis -> kind -> cells; the same kinds on every axis."""
    refused: str = ""
    """Why strips cannot be paired as published; empty where they can."""

    @classmethod
    def of(cls, geometry: Layout, axes: Sequence[str]) -> "SwapRegions":
        """Returns all kinds, with aligned strips where they differ from the published ones.

        Where published strips have unequal sizes and cannot be paired (What'sUp's table on 16
        tokens), only aligned strips are used, and "background" is the aligned strips without
        objects.
        """
        kinds, refused = KINDS, ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HookedVLMWarning)  # these pairs are only compared
            try:
                if any(
                    cell_pairs(geometry, axis, "strip") != cell_pairs(geometry, axis, ALIGNED)
                    for axis in axes
                ):
                    kinds = (*KINDS, ALIGNED)
            except RegionError as error:
                kinds, refused = (ALIGNED, *KINDS[1:]), str(error)
        found = {}
        for axis in axes:
            found[axis] = {kind: cell_pairs(geometry, axis, kind) for kind in kinds if not refused}
            if refused:
                whole, inside = (cell_pairs(geometry, axis, k) for k in (ALIGNED, "object"))
                found[axis] = {ALIGNED: whole, "object": inside, "background": _less(whole, inside)}
        return cls(found, refused)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds, in the order of reports."""
        return tuple(next(iter(self.pairs.values())))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report about these kinds."""
        if not self.refused:
            return ()
        return (
            f"Strips as published are left out: {self.refused} 'strip, aligned' and the strips "
            "without objects cover the cells that both strips have around their objects.",
        )


def strips_of(kinds: Sequence[str]) -> str:
    """Returns the kind to report as strips: the published one where there is one."""
    return "strip" if "strip" in kinds else ALIGNED


def cell_pairs(geometry: Layout, axis: str, kind: str) -> CellPairs:
    """Returns the cells that one kind of swap exchanges, in the published pairing.

    Raises `RegionError` for strips of unequal size, except when they are aligned.
    """
    left, right = (geometry.object_region(axis, place) for place in (0, 2))
    if kind == "object":
        return swap_pairs(left, right)
    first, last = (geometry.strip_region(axis, place) for place in (0, 2))
    if kind in ("strip", ALIGNED):
        pairing = "aligned" if kind == ALIGNED else "published"
        return swap_pairs(first, last, pairing, objects=(left, right))
    return swap_pairs(first - left, last - right)


def _less(whole: CellPairs, inside: CellPairs) -> CellPairs:
    kept = [
        (target, source)
        for target, source in zip(whole.targets, whole.sources, strict=True)
        if target not in inside.targets
    ]
    return CellPairs(whole.shape, tuple(t for t, _ in kept), tuple(s for _, s in kept))
