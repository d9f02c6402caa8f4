"""Pairs the cells of two regions for interchange: which cell is written from which.

A swap writes the cells of A from the cells of B in another run, and B's from A's.  The
pairing decides which object cell is written from which.  There are two pairings:

- "published": the k-th cell of A in raster order is paired with the k-th of B, as in the
  paper's code.  On Gemma-3's 16x16 tokens with strips of 5, 6 and 5 columns, column 0 is
  paired with 11, 1 with 12, and so on.  The objects begin in columns 0 and 12, so an object
  lands one column off.
- "aligned": A is moved so that its object falls onto B's object, and both strips are cropped
  to the common part.  In the same example columns 0-3 are paired with 12-15; columns 4 and 11
  are not written.

With either pairing the swap is its own inverse.  Regions of unequal size cannot be paired as
published (protocol 2.1 has such a case: 96 against 64 tokens).  A `HookedVLMWarning` is given
for a pairing that does not map object cells to object cells.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import (
    HookedVLMWarning,
    RegionError,
    callers_level,
    counted,
    did_you_mean,
)
from hooked_vlm.regions.positions import ImageCells
from hooked_vlm.regions.region import Cell, Region


PAIRINGS = ("published", "aligned")


@checked(RegionError)
@dataclass(frozen=True)
class CellPairs:
    """Cells to write (`targets`) and the cells they are written from (`sources`), pairwise."""

    shape: tuple[int, int]
    targets: tuple[Cell, ...]
    sources: tuple[Cell, ...]

    def __post_init__(self) -> None:
        if len(self.targets) != len(self.sources):
            raise RegionError(
                f"Cannot write {counted(len(self.targets), 'cell')} from {len(self.sources)}. Give "
                "as many sources as targets."
            )
        if len(set(self.targets)) != len(self.targets):
            raise RegionError(
                f"{len(self.targets) - len(set(self.targets))} of {len(self.targets)} cells would "
                "be written twice. Give each target once."
            )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def target(self) -> Region:
        """The cells that are written, as a region."""
        return Region(self.shape, self.targets, "targets")

    @property
    def source(self) -> Region:
        """The cells that are read, as a region."""
        return Region(self.shape, self.sources, "sources")

    def reversed(self) -> "CellPairs":
        """Returns the pairs with sources and targets exchanged."""
        return CellPairs(self.shape, self.sources, self.targets)

    def tokens(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Returns flat raster indices `(targets, sources)` into `[image, token, d_model]`."""
        rows, cols = self.shape
        flat = torch.arange(rows * cols).reshape(rows, cols)
        return flat[_index(self.targets)], flat[_index(self.sources)]

    def positions(
        self, target_grid: ImageCells, source_grid: ImageCells | None = None
    ) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Returns positions `(targets, sources)` in the prompts of the two grids.

        `source_grid` defaults to `target_grid`.  Raises `RegionError` when a grid has another
        shape.
        """
        source_grid = target_grid if source_grid is None else source_grid
        # Called only for its checks: Region.positions sorts in raster order and loses the pairing.
        self.target.positions(target_grid)
        self.source.positions(source_grid)
        return (
            target_grid.positions[_index(self.targets)].long(),
            source_grid.positions[_index(self.sources)].long(),
        )

    def patches(
        self, target_grid: ImageCells, source_grid: ImageCells | None = None
    ) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Returns encoder token indices `(targets, sources)`, patch by patch within each cell."""
        source_grid = target_grid if source_grid is None else source_grid
        return (
            _patches(self.shape, self.targets, target_grid),
            _patches(self.shape, self.sources, source_grid),
        )


@checked(RegionError)
def pair_cells(
    a: Region,
    b: Region,
    pairing: str = "published",
    objects: tuple[Region, Region] | None = None,
) -> CellPairs:
    """Returns pairs that write the cells of `a` from the cells of `b`.

    `objects` are the object cells inside `a` and inside `b`.  The "aligned" pairing needs them.
    The "published" pairing checks them, and gives a `HookedVLMWarning` when object cells are
    not paired with object cells.  Without `objects` it warns when `b` is not `a` translated.

    Raises `RegionError` for an empty region, regions of two grids, unequal sizes under
    "published", objects outside their regions or of two shapes, and an unknown pairing.

    >>> left, right = Region.column_band((16, 16), 0, 5), Region.column_band((16, 16), 11, 16)
    >>> square = Region.rectangle((16, 16), rows=(6, 9), cols=(0, 3))
    >>> objects = square, square.shifted(cols=12)
    >>> pairs = pair_cells(left, right, "aligned", objects)
    >>> len(pairs), pairs.targets[0], pairs.sources[0]
    (64, (0, 0), (0, 12))
    """
    for region in (a, b, *(objects or ())):
        region.check_not_empty("cell to pair")
        region.check_same_grid(a)
    if objects is not None:
        _check_objects(a, b, objects)
    if pairing == "published":
        return _published(a, b, objects)
    if pairing != "aligned":
        raise RegionError(
            f"No pairing {pairing!r}. Use 'published' or 'aligned'."
            f"{did_you_mean(pairing, PAIRINGS)}"
        )
    if objects is None:
        raise RegionError(
            "No objects were given; the aligned pairing moves one object onto the other. Give "
            "objects=(object cells in the first region, object cells in the second)."
        )
    return _aligned(a, b, objects)


@checked(RegionError)
def swap_pairs(
    a: Region,
    b: Region,
    pairing: str = "published",
    objects: tuple[Region, Region] | None = None,
) -> CellPairs:
    """Returns pairs that write `a` from `b` and `b` from `a` (protocol 2.6, E4).

    Applying the swap twice restores the activations.  Takes and raises what `pair_cells` does,
    and raises `RegionError` when the regions share cells.

    >>> left, right = Region.column_band((2, 4), 0, 1), Region.column_band((2, 4), 3, 4)
    >>> pairs = swap_pairs(left, right)
    >>> pairs.targets
    ((0, 0), (1, 0), (0, 3), (1, 3))
    >>> pairs.sources
    ((0, 3), (1, 3), (0, 0), (1, 0))
    """
    if not a.isdisjoint(b):
        raise RegionError(
            f"{a.name!r} and {b.name!r} share {counted(len(a & b), 'cell')}, which a swap "
            "would write twice. Give disjoint regions."
        )
    one_way = pair_cells(a, b, pairing, objects)
    return CellPairs(
        one_way.shape, one_way.targets + one_way.sources, one_way.sources + one_way.targets
    )


def _published(a: Region, b: Region, objects: tuple[Region, Region] | None) -> CellPairs:
    if len(a) != len(b):
        raise RegionError(
            f"{a.name!r} has {counted(len(a), 'cell')} and {b.name!r} has {len(b)}; cells can only "
            "be paired one to one. Give regions of equal size, or use pairing='aligned', which "
            "crops both to their common part around the objects."
        )
    # Without objects, only the regions' shapes can be compared.
    if objects is None and _move(a, b) is None:
        _warn(
            f"{a.name!r} and {b.name!r} do not have the same shape, so paired cells have different "
            "places in their regions: an object inside one is scattered in the other."
        )
    # With objects, verify that object cells are paired with object cells.
    if objects is not None:
        met = dict(zip(a.cells, b.cells, strict=True))
        landed = {met[cell] for cell in objects[0].cells}
        hits = sum(cell in objects[1] for cell in landed)
        if landed != set(objects[1].cells):
            _warn(
                f"Pairing {a.name!r} with {b.name!r} in raster order maps {hits} of "
                f"{counted(len(landed), 'object cell')} to object cells: {objects[0].cells[0]} is "
                f"paired with {met[objects[0].cells[0]]}, and the other object begins at "
                f"{objects[1].cells[0]}. To map object to object, use pairing='aligned'."
            )
    return CellPairs(a.shape, a.cells, b.cells)


def _aligned(a: Region, b: Region, objects: tuple[Region, Region]) -> CellPairs:
    move = _move(*objects)
    if move is None:
        raise RegionError(
            f"The objects {objects[0]} and {objects[1]} do not have the same shape, so neither "
            "can be moved onto the other. Give objects of one shape."
        )
    there = {cell: (cell[0] + move[0], cell[1] + move[1]) for cell in a.cells}
    targets = tuple(cell for cell in a.cells if there[cell] in b)
    return CellPairs(a.shape, targets, tuple(there[cell] for cell in targets))


def _check_objects(a: Region, b: Region, objects: tuple[Region, Region]) -> None:
    for region, inside in zip((a, b), objects, strict=True):
        if not inside <= region:
            raise RegionError(
                f"The object {inside} is not inside {region}: {len(inside - region)} of its cells "
                "are outside. Give the objects in the order of the regions."
            )


def _move(a: Region, b: Region) -> Cell | None:
    """Returns the translation `(rows, cols)` from `a` to `b`; None when there is none."""
    move = b.cells[0][0] - a.cells[0][0], b.cells[0][1] - a.cells[0][1]
    moved = tuple((r + move[0], c + move[1]) for r, c in a.cells)
    return move if moved == b.cells else None


def _patches(
    shape: tuple[int, int], cells: tuple[Cell, ...], grid: ImageCells
) -> Int[Tensor, " pair"]:
    region = Region(shape, cells)
    row_of = {cell: i for i, cell in enumerate(region.cells)}
    return region.patches_by_cell(grid)[[row_of[cell] for cell in cells]].flatten()


def _index(cells: tuple[Cell, ...]) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"]]:
    rows, cols = zip(*cells, strict=True)
    return torch.tensor(rows), torch.tensor(cols)


def _warn(message: str) -> None:
    warnings.warn(message, HookedVLMWarning, stacklevel=callers_level())
