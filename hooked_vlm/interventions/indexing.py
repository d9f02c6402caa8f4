"""Indices into one site's activation: paired cells of two images, and the same in every row."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import InterventionError, counted
from hooked_vlm.hooks.located import Located, locate, no_positions, prefix_gone
from hooked_vlm.hooks.sites import Site
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.pairs import CellPairs
from hooked_vlm.regions.positions import PromptRow


def all_rows(n_rows: int, index: Sequence[int]) -> Located:
    """Returns the same indices along the second axis in each of the rows of the first."""
    inner = torch.tensor(list(index))
    return Located((row, inner) for row in range(n_rows))


def rows_needed(site: Site, rows: Sequence[PromptRow]) -> dict[int, int]:
    """Returns how many rows each image has at least, by its grid, at a site that lists them."""
    if site.axes.split()[1] not in ("patch", "token"):
        return {}
    located = locate(site, None, rows)
    return {image: int(inner.max()) + 1 for image, inner in located if len(inner)}


def locate_pairs(
    site: Site, pairs: CellPairs, rows: Sequence[PromptRow], source_rows: Sequence[PromptRow]
) -> tuple[Located, Located]:
    """Returns where paired cells are written, and where they are read from, in step.

    Prompts have one image each; a source of one prompt serves all.
    """
    sources = [*source_rows] * len(rows) if len(source_rows) == 1 else source_rows
    if len(sources) != len(rows):
        raise InterventionError(
            f"Cannot write {counted(len(rows), 'prompt')} from a source of {len(sources)}: give a "
            "source of the same batch size, or of one prompt."
        )
    found = [
        _pair_indices(site, pairs, _only_grid(target), _only_grid(source))
        for target, source in zip(rows, sources, strict=True)
    ]
    if site.by_prompt:
        outer = [(b, b % len(source_rows)) for b in range(len(rows))]
    else:
        outer = [
            (_only_grid(t).image, _only_grid(s).image) for t, s in zip(rows, sources, strict=True)
        ]
    targets = Located((o, t) for (o, _), (t, _) in zip(outer, found, strict=True))
    return targets, Located((o, s) for (_, o), (_, s) in zip(outer, found, strict=True))


def _pair_indices(
    site: Site, pairs: CellPairs, target: TokenGrid, source: TokenGrid
) -> tuple[Int[Tensor, " index"], Int[Tensor, " index"]]:
    if site.by_position:
        return pairs.positions(target, source)
    if site.by_token:
        _refuse_tiles(site, target, source)
        written, taken = pairs.tokens()
        return target.projected_tokens()[written], source.projected_tokens()[taken]
    if not site.by_patch:
        raise no_positions(site)
    _refuse_tiles(site, target, source)
    written, taken = pairs.patches(target, source)
    return written - prefix_gone(site, target), taken - prefix_gone(site, source)


def _refuse_tiles(site: Site, *grids: TokenGrid) -> None:
    for grid in grids:
        rows = grid.projected if site.by_token else grid.patches
        if rows is not None and len(rows[..., 0].unique()) > 1:
            raise InterventionError(
                f"Paired cells at {site.name}: the encoder sees this image in tiles, and a pair "
                "may cross from one to another. Pair cells at a site of the language model, or "
                "use at=region, source_at=region."
            )


def _only_grid(row: PromptRow) -> TokenGrid:
    if len(row.grids) != 1:
        raise InterventionError(
            f"Paired cells are cells of one image, and a prompt here has {len(row.grids)}. Use "
            "places of one image each: at=region.of_image(0), source_at=other.of_image(0)."
        )
    return row.grids[0]  # type: ignore[return-value]
