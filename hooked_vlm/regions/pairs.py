"""Which cell is written from which: pairings of two regions, for interchange.

A swap writes the cells of A from those of B in another run, and B's from A's.  What it
says about objects depends on which cell meets which.  Two pairings are offered:

- "published": the k-th cell of A in raster order with the k-th of B, as the paper's code
  does.  On Gemma-3's 16x16 tokens with strips of 5, 6 and 5 columns that pairs column 0
  with 11, 1 with 12, and so on; but the objects begin in columns 0 and 12, so an object
  lands one column off.
- "aligned": B is A moved so that A's object falls onto B's, and both strips are cropped to
  what the move has in common.  There that pairs columns 0-3 with 12-15; columns 4 and 11
  stay as they are.

Either way the swap is its own inverse.  Regions of unequal size cannot be paired as
published (protocol 2.1 has such a case: 96 against 64 tokens), and a pairing that does not
take object cells to object cells warns.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import HookedVLMWarning, RegionError, did_you_mean
from hooked_vlm.regions.positions import ImageCells
from hooked_vlm.regions.region import Cell, Region


PAIRINGS = ("published", "aligned")


@dataclass(frozen=True)
class CellPairs:
    """Cells to write (`targets`) and the cells they are written from (`sources`), in step."""

    shape: tuple[int, int]
    targets: tuple[Cell, ...]
    sources: tuple[Cell, ...]

    def __post_init__(self) -> None:
        if len(self.targets) != len(self.sources):
            raise RegionError(
                f"{len(self.targets)} cells cannot be written from {len(self.sources)}. Give as "
                "many sources as targets."
            )
        if len(set(self.targets)) != len(self.targets):
            raise RegionError("A cell would be written twice. Each target may occur once.")

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

        The sources' grid is the targets' own where none is given.  Raises `RegionError` when
        a grid has another shape.
        """
        source_grid = target_grid if source_grid is None else source_grid
        # Region.positions sorts by raster order and would lose the pairing: it only checks.
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


def pair_cells(
    a: Region,
    b: Region,
    pairing: str = "published",
    objects: tuple[Region, Region] | None = None,
) -> CellPairs:
    """Returns pairs that write the cells of `a` from those of `b`.

    `objects` are the object cells inside `a` and inside `b`; "aligned" needs them, and with
    "published" they are checked: a `HookedVLMWarning` says so when object cells do not meet
    object cells (without them, when the two regions are not one shape moved).

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
            "The aligned pairing moves one object onto the other. Give objects=(object cells in "
            "the first region, object cells in the second)."
        )
    return _aligned(a, b, objects)


def swap_pairs(
    a: Region,
    b: Region,
    pairing: str = "published",
    objects: tuple[Region, Region] | None = None,
) -> CellPairs:
    """Returns pairs that write `a` from `b` and `b` from `a` (protocol 2.6, E4).

    Applying it twice gives back what was there.  Takes and raises what `paired` does, and
    raises `RegionError` when the regions share cells.
    """
    if not a.isdisjoint(b):
        raise RegionError(
            f"{a.name!r} and {b.name!r} share {len(a & b)} cells, so a swap would write those "
            "twice. Swap disjoint regions."
        )
    one_way = pair_cells(a, b, pairing, objects)
    return CellPairs(
        one_way.shape, one_way.targets + one_way.sources, one_way.sources + one_way.targets
    )


def _published(a: Region, b: Region, objects: tuple[Region, Region] | None) -> CellPairs:
    if len(a) != len(b):
        raise RegionError(
            f"{a.name!r} has {len(a)} cells and {b.name!r} has {len(b)}; cells can only be paired "
            "one to one. Choose regions of equal size, or pairing='aligned', which crops both to "
            "their common part around the objects."
        )
    if objects is None and _move(a, b) is None:
        _warn(
            f"{a.name!r} and {b.name!r} are not one shape moved, so cells that meet do not lie "
            "alike in their regions: an object inside one is scattered in the other."
        )
    if objects is not None:
        met = dict(zip(a.cells, b.cells, strict=True))
        landed = {met[cell] for cell in objects[0].cells}
        hits = sum(cell in objects[1] for cell in landed)
        if landed != set(objects[1].cells):
            _warn(
                f"Pairing {a.name!r} with {b.name!r} in raster order takes {hits} of "
                f"{len(landed)} object cells to object cells: {objects[0].cells[0]} meets "
                f"{met[objects[0].cells[0]]}, and the other object begins at "
                f"{objects[1].cells[0]}. pairing='aligned' puts object on object."
            )
    return CellPairs(a.shape, a.cells, b.cells)


def _aligned(a: Region, b: Region, objects: tuple[Region, Region]) -> CellPairs:
    move = _move(*objects)
    if move is None:
        raise RegionError(
            f"The objects {objects[0]} and {objects[1]} are not one shape moved, so neither can "
            "be laid on the other. Give objects of one shape."
        )
    there = {cell: (cell[0] + move[0], cell[1] + move[1]) for cell in a.cells}
    targets = tuple(cell for cell in a.cells if there[cell] in b)
    return CellPairs(a.shape, targets, tuple(there[cell] for cell in targets))


def _check_objects(a: Region, b: Region, objects: tuple[Region, Region]) -> None:
    for region, inside in zip((a, b), objects, strict=True):
        if not inside <= region:
            raise RegionError(
                f"The object {inside} is not inside {region}: {len(inside - region)} of its cells "
                "are outside. Give objects in the order of the regions."
            )


def _move(a: Region, b: Region) -> Cell | None:
    """Returns `(rows, cols)` that take one region onto the other, or None when none does."""
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
    warnings.warn(message, HookedVLMWarning, stacklevel=4)
