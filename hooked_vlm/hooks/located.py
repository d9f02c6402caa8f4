"""Where a place of a prompt or a region of an image lies in one site's activation.

The same region means positions in the language model, patches in the vision encoder and
tokens after the projector.  `locate` turns it into indices for the site at hand: pairs
of an index along the site's first axis (prompt or image) and indices along its second;
`rows_at` and `with_rows_at` read and write there.
"""

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.errors import InterventionError, counted
from hooked_vlm.hooks.patch_order import VisionActivation
from hooked_vlm.hooks.sites import Site
from hooked_vlm.regions.generated import Generated
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.pairs import CellPairs
from hooked_vlm.regions.positions import (
    Answer,
    AnyOf,
    InImage,
    LastToken,
    Positions,
    PromptRow,
    Span,
    TextTokens,
    TokenSelector,
)
from hooked_vlm.regions.region import Region


class Located(list[tuple[int, Tensor]]):
    """Where something is: an index along a site's first axis, and indices along its second."""

    @cached_property
    def first(self) -> int:
        """The lowest index along the second axis; 0 where nothing was located."""
        return min((int(inner.min()) for _, inner in self if len(inner)), default=0)

    @cached_property
    def _indices(self) -> dict[Any, tuple[Tensor, ...]]:
        return {}

    def index(self, heads: tuple[int, ...] | None, device: torch.device) -> tuple[Tensor, ...]:
        """Returns `index_of` these, made once for each device."""
        key = heads, device
        if key not in self._indices:
            self._indices[key] = index_of(self, heads, device)
        return self._indices[key]


def needs_text(place: Any) -> bool:
    """Whether a place can only be found in prompts whose tokens' text is known."""
    parts = place if isinstance(place, list | tuple) else getattr(place, "parts", ())
    return isinstance(place, Span) or any(needs_text(part) for part in parts)


def needs_images(place: Any) -> bool:
    """Whether a place can only be found in prompts whose images have a grid.

    A selector of the user's own may read the grids.
    """
    if isinstance(place, AnyOf | list | tuple):
        parts = place.parts if isinstance(place, AnyOf) else place
        return any(map(needs_images, parts))
    known = LastToken | Positions | Span | TextTokens | Answer | Generated
    return not (place is None or isinstance(place, known))


def locate(site: Site, place: Any, rows: Sequence[PromptRow]) -> Located:
    """Returns the indices of a place at a site, prompt by prompt (or image by image).

    No place (None) is every token of a prompt, and every cell of its images.  A list has a place
    for each prompt.

    Raises `InterventionError` for a site without such an axis, for a place that is no
    part of an image at a site of the vision encoder or projector, and for a list of another
    length than the batch.
    """
    places = place_of_each(place, len(rows))
    if site.by_position:
        return Located(
            (b, row.real if own is None else own.positions(row))
            for b, (own, row) in enumerate(zip(places, rows, strict=True))
        )
    if not site.by_patch and not site.by_token:
        raise no_positions(site)
    located = Located()
    for own, row in zip(places, rows, strict=True):
        for grid, region in _images(own, row, site):
            located += _in_encoder(site, region, grid)
    return located


def place_of_each(place: Any, n_prompts: int) -> list[Any]:
    """Returns the place in each prompt of a batch: the one that was given, or those of a list.

    Raises `InterventionError` for what is no place, and for a list of another length.
    """
    for own in place if isinstance(place, list | tuple) else [place]:
        missing = own is None and own is not place  # in a list None could mean all or nothing
        paired = isinstance(own, CellPairs)
        if missing or paired or not (own is None or isinstance(own, TokenSelector)):
            raise InterventionError(
                f"at={repr(own)[:80]} is no place here. Give a Region, LastToken(), "
                "Positions((0, -1)), Span('text'), TextTokens(), a list of them (one for each "
                "prompt), or None for all positions. (Paired cells are for Patch(at=…) alone.)"
            )
    if not isinstance(place, list | tuple):
        return [place] * n_prompts
    if len(place) != n_prompts:
        raise InterventionError(
            f"at=[…] has {counted(len(place), 'place')} for {counted(n_prompts, 'prompt')}. Give "
            "one place for each prompt, or a single one for all of them."
        )
    return list(place)


def index_of(
    located: Sequence[tuple[int, Tensor]], heads: Sequence[int] | None, device: torch.device
) -> tuple[Tensor, ...]:
    """Returns located positions as one index into an activation: row by row, all or some heads.

    Raises `InterventionError` where nothing was located.
    """
    if not located:
        raise InterventionError(
            "These inputs have no image whose tokens are known to form a grid, so there is no "
            "place to intervene at in the vision encoder or projector. Use a hook function: "
            "fwd_hooks=[(name, fn)]."
        )
    outer = sent(torch.cat([torch.full_like(inner, o) for o, inner in located]), device)
    inner = sent(torch.cat([inner for _, inner in located]), device)
    if heads is None:
        return outer, inner
    return outer[:, None], inner[:, None], sent(torch.tensor(heads), device)[None]


def rows_at(value: VisionActivation, index: tuple[Tensor, ...]) -> Tensor:
    """Returns a copy of the rows at an index of an activation, listed by image or not."""
    if not isinstance(value, list):
        return value[index]
    return torch.stack([value[image][inner] for image, inner in _by_image(index)])


def with_rows_at(
    value: VisionActivation, index: tuple[Tensor, ...], rows: Tensor
) -> VisionActivation:
    """Returns a copy of an activation with the rows at an index replaced."""
    if not isinstance(value, list):
        changed = value.clone()
        changed[index] = rows
        return changed
    copies = [tensor.clone() for tensor in value]
    for (image, inner), row in zip(_by_image(index), rows, strict=True):
        copies[image][inner] = row
    return copies


def _by_image(index: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yields (image, index into that image) row by row, for images that are listed."""
    outer, inner, *heads = index
    for image, row in zip(outer.flatten().tolist(), inner.flatten(), strict=True):
        yield image, (row, *(h[0] for h in heads))


def no_positions(site: Site) -> InterventionError:
    return InterventionError(
        f"{site.name} has axes [{site.axes}], with no position to intervene at. Use a hook "
        "function there: fwd_hooks=[(name, fn)]."
    )


@cache
def _everything(shape: tuple[int, int]) -> Region:
    """Returns all cells of a grid; each pass asks for them several times."""
    return Region.everything(shape)


def _images(place: Any, row: PromptRow, site: Site) -> list[tuple[TokenGrid, Region]]:
    if place is None:
        return [(grid, _everything(grid.shape)) for grid in row.grids]  # type: ignore[misc]
    if isinstance(place, AnyOf):
        return [found for part in place.parts for found in _images(part, row, site)]
    if isinstance(place, InImage):
        place.positions(row)  # checks the image's number and the region's shape
        return [(row.grids[place.image], place.region)]  # type: ignore[list-item]
    if not isinstance(place, Region):
        raise InterventionError(
            f"{place} is no part of an image, and {site.name} has axes [{site.axes}]. Give a "
            "Region there, such as grid.box(…) or grid.all()."
        )
    place.positions(row)
    return [(row.grids[0], place)]  # type: ignore[list-item]


def _in_encoder(site: Site, region: Region, grid: TokenGrid) -> list[tuple[int, Tensor]]:
    """Returns a region's rows at a vision or projector site, tile by tile."""
    rows = grid.projected if site.by_token else grid.patches
    if rows is None:
        index = region.tokens if site.by_token else region.patches(grid) - prefix_gone(site, grid)
        return [(grid.image, index)]
    region.positions(grid)  # checks that the region fits
    row, col = torch.tensor(region.cells).T
    tile, index = rows[row, col].flatten(0, 1).unbind(-1)
    shift = 0 if site.by_token else prefix_gone(site, grid)
    return [
        (grid.image + int(t), index[tile == t].sort().values - shift)
        for t in tile.unique().tolist()
    ]


def prefix_gone(site: Site, grid: TokenGrid) -> int:
    """How many leading encoder tokens are not there: the patch embedding has them not yet, and
    the projector no longer."""
    return grid.n_prefix if site.conv or "d_features" in site.axes else 0
