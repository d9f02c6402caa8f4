"""Where a place lies in one site's activation, in every tower."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.errors import InterventionError, RegionError
from hooked_vlm.hooks.located import index_of, locate, needs_text, rows_at, with_rows_at
from hooked_vlm.inputs.rows import rows_of
from hooked_vlm.interventions.indexing import locate_pairs
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import LastToken, Span, union
from hooked_vlm.regions.region import Region


def rows(family: str, **options: Any) -> list:
    model, inputs = tiny(family), make_inputs(family, **options)
    return rows_of(inputs, model.grids(inputs), False)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_region_means_positions_patches_and_tokens(family: str) -> None:
    model, prompts = tiny(family), rows(family, batch=2)
    n = prompts[0].grids[0].rows
    cell = Region((n, n), ((1, 2),))
    sites = model.sites
    for b, (outer, inner) in enumerate(locate(sites["blocks.1.hook_resid_pre"], cell, prompts)):
        # two tokens of text and the start token, then the image in raster order
        assert (outer, inner.tolist()) == (b, [3 + n + 2])
    for image, (outer, inner) in enumerate(
        locate(sites["vision_projector.hook_out"], cell, prompts)
    ):
        assert (outer, inner.tolist()) == (image, [n + 2])
    patches = [1 * 6 + 2] if family == "llava" else [2 * 6 + 4, 2 * 6 + 5, 3 * 6 + 4, 3 * 6 + 5]
    prefix = 1 if family == "llava" else 0
    for name, shift in (
        ("vision_encoder.blocks.0.hook_resid_pre", prefix),
        ("vision_encoder.blocks.1.attn.hook_q", prefix),
        ("vision_encoder.hook_patch_embed", 0),
        ("vision_encoder.hook_out", 0),
    ):
        located = locate(sites[name], cell, prompts)
        assert [(o, i.tolist()) for o, i in located] == [
            (image, [p + shift for p in patches]) for image in range(2)
        ], name


@pytest.mark.parametrize("family", FAMILIES)
def test_indices_fit_what_the_sites_hold(family: str) -> None:
    """No place reaches outside any site, or misses a patch of the whole image."""
    model, inputs = tiny(family), make_inputs(family, batch=2)
    prompts = rows(family, batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(
            inputs, lambda name: "attn_s" not in name and "patt" not in name
        )
    for name, value in cache.items():
        site = model.sites[name]
        if not site.axes.startswith(("batch pos", "image")):
            continue
        prefix = 1 if family == "llava" and "vision_encoder.blocks" in name else 0
        for _, inner in locate(site, None, prompts):
            assert inner.tolist() == list(range(prefix, value.shape[1])), name


def test_several_images_and_unions() -> None:
    model = tiny("gemma-3")
    prompts = rows("gemma-3", batch=2, images=2)
    projector = model.sites["vision_projector.hook_out"]
    cell = Region((3, 3), ((0, 1),))
    with pytest.raises(RegionError, match="this prompt has 2"):
        locate(projector, cell, prompts)
    second = locate(projector, cell.of_image(1), prompts)
    assert [(o, i.tolist()) for o, i in second] == [(1, [1]), (3, [1])]
    both = locate(projector, union(cell.of_image(0), cell.of_image(1)), prompts)
    assert [o for o, _ in both] == [0, 1, 2, 3]
    pairs = swap_pairs(cell, Region((3, 3), ((2, 2),)))
    with pytest.raises(InterventionError, match="prompt here has 2"):
        locate_pairs(projector, pairs, prompts, prompts)
    with pytest.raises(InterventionError, match="no part of an image"):
        locate(projector, LastToken(), prompts)
    with pytest.raises(InterventionError, match="no position to intervene at"):
        locate(model.sites["blocks.0.attn.hook_pattern"], None, prompts)


def test_pairs_stay_in_step_in_every_tower() -> None:
    model, prompts = tiny("llava"), rows("llava", batch=2)
    a, b = Region((6, 6), ((0, 0), (1, 0))), Region((6, 6), ((0, 5), (1, 5)))
    pairs = swap_pairs(a, b)
    for name, offset in (
        ("blocks.0.hook_resid_pre", 3),
        ("vision_projector.hook_out", 0),
        ("vision_encoder.blocks.0.hook_resid_pre", 1),
        ("vision_encoder.hook_out", 0),
    ):
        targets, sources = locate_pairs(model.sites[name], pairs, prompts, prompts[:1])
        assert [t.tolist() for _, t in targets] == [[i + offset for i in (0, 6, 5, 11)]] * 2
        assert [s.tolist() for _, s in sources] == [[i + offset for i in (5, 11, 0, 6)]] * 2
        assert [o for o, _ in sources] == [0, 0]
        assert [o for o, _ in targets] == [0, 1]
    with pytest.raises(InterventionError, match="a source of 3"):
        locate_pairs(model.sites["hook_embed"], pairs, prompts, [*prompts, prompts[0]])


def test_text_is_only_needed_for_spans() -> None:
    assert needs_text(Span("red"))
    assert needs_text(union(LastToken(), Span("red")))
    assert not needs_text(union(LastToken(), Region((2, 2), ((0, 0),))))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back_listed_or_not(data: st.DataObject) -> None:
    """A list of images and a tensor of them are the same thing to an index."""
    images, patches, heads, width = 3, 5, 4, 2
    dense = torch.arange(images * patches * heads * width).float()
    dense = dense.reshape(images, patches, heads, width)
    places = st.lists(st.integers(0, patches - 1), min_size=1, max_size=patches, unique=True)
    located = [
        (image, torch.tensor(data.draw(places)))
        for image in data.draw(
            st.lists(st.integers(0, images - 1), min_size=1, max_size=3, unique=True)
        )
    ]
    some = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    index = index_of(located, some, torch.device("cpu"))
    read = rows_at(dense, index)
    assert read.shape[:2] == (sum(len(i) for _, i in located), heads if some is None else len(some))
    assert torch.equal(rows_at(list(dense), index), read)
    written, listed = (with_rows_at(v, index, -read - 1) for v in (dense, list(dense)))
    assert torch.equal(torch.stack(list(listed)), torch.as_tensor(written))
    assert torch.equal(rows_at(written, index), -read - 1)
    assert torch.equal(torch.as_tensor(with_rows_at(written, index, read)), dense)


def test_j2_pairs_of_an_image_in_one_measured_tile_are_its_own_patches() -> None:
    """Patches that were measured; a second tile is refused, since pairs may cross it."""
    model = tiny("llava")
    (row,) = rows("llava")
    order = torch.arange(36).flip(0).reshape(6, 6)
    measured = torch.stack([0 * order, order + 1], -1)[:, :, None]
    pairs = swap_pairs(Region((6, 6), ((0, 0),)), Region((6, 6), ((0, 5),)))
    site = model.sites["vision_encoder.blocks.0.hook_resid_pre"]
    grid = replace(row.grids[0], patches=measured)
    here = [replace(row, grids=(grid,))]
    targets, sources = locate_pairs(site, pairs, here, here)
    assert [index.tolist() for _, index in targets] == [[36, 31]]
    assert [index.tolist() for _, index in sources] == [[31, 36]]
    tiles = replace(grid, patches=measured + torch.tensor([1, 0]) * (order > 17)[..., None, None])
    with pytest.raises(InterventionError, match="in tiles"):
        locate_pairs(site, pairs, [replace(row, grids=(tiles,))], here)
