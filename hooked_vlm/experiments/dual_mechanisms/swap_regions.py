"""Which cells a swap exchanges: whole strips, object cells, strips without their objects."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hooked_vlm.errors import HookedVLMWarning, RegionError
from hooked_vlm.regions.pairs import CellPairs, swap_pairs
from hooked_vlm.stimuli.geometry import Layout


KINDS = ("strip", "object", "background")
ALIGNED = "strip, aligned"
"""Strips with object laid on object, where the published pairing does not do that."""


@dataclass(frozen=True)
class SwapRegions:
    """The kinds of swap that a layout allows, and what each exchanges."""

    pairs: Mapping[str, Mapping[str, CellPairs]]
    """Axis -> kind -> cells; the same kinds on every axis."""
    refused: str = ""
    """Why strips cannot be paired as published, where they cannot."""

    @classmethod
    def of(cls, geometry: Layout, axes: Sequence[str]) -> "SwapRegions":
        """Returns all kinds, with aligned strips where they differ from the published ones.

        Where published strips are of unequal size and so cannot be paired (What'sUp's table on
        16 tokens), aligned ones stand alone, and "background" is theirs.
        """
        kinds, refused = KINDS, ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HookedVLMWarning)  # said when the pairs are used
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
        """What a report has to say about them."""
        if not self.refused:
            return ()
        return (
            f"Strips as published are left out: {self.refused} 'strip, aligned' and the strips "
            "without objects are what both strips have in common around their objects.",
        )


def strips_of(kinds: Sequence[str]) -> str:
    """Returns the kind that stands for strips: the published one where there is one."""
    return "strip" if "strip" in kinds else ALIGNED


def cell_pairs(geometry: Layout, axis: str, kind: str) -> CellPairs:
    """Returns the cells that one kind of swap exchanges, in the published pairing.

    Raises `RegionError` for strips of unequal size, except when they are aligned.
    """
    left, right = (geometry.object_region(axis, slot) for slot in (0, 2))
    if kind == "object":
        return swap_pairs(left, right)
    first, last = (geometry.strip_region(axis, slot) for slot in (0, 2))
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
