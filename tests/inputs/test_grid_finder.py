"""Grids by rule and by measurement: both agree, a wrong rule is found out, pixels have the say."""

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from conformance import suite
from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES
from hooked_vlm.errors import (
    GridError,
    HookedVLMWarning,
    InterventionError,
    NoGradientError,
    NoGridError,
)
from hooked_vlm.inputs import grid_finder
from hooked_vlm.inputs.pixel_routing import attention_sites
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.region import Region


pytestmark = pytest.mark.filterwarnings("ignore:The image processor changed")
Box = tuple[int, int, int, int]
EMBED, FIRST = "hook_merged_embed", "vision_encoder.blocks.0.hook_resid_pre"
PROJECTED = "vision_projector.hook_out"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def made(model_type: str) -> HookedVLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return suite.build(model_type)


def painted(image: Image.Image, box: Box) -> Image.Image:
    """The image with its colours inverted in a box."""
    pixels = np.array(image)
    pixels[box[1] : box[3], box[0] : box[2]] ^= 255
    return Image.fromarray(pixels)


def embedded(model: HookedVLM, inputs: Any, more: tuple[Any, ...] = ()) -> Tensor:
    """What the language model reads, `[pos, d_model]`, with the encoder's attention off."""
    off = [(name, lambda x, hook: _zeros(x)) for name in attention_sites(model)]
    _, cache = model.run_with_cache(inputs, EMBED, fwd_hooks=[*off, *more])
    return cache[EMBED][0]


def _zeros(value: Any) -> Any:
    return [torch.zeros_like(v) for v in value] if isinstance(value, list) else value * 0


def moved(a: Tensor, b: Tensor) -> set[int]:
    """The positions at which two runs differ."""
    return set(((a - b).abs().amax(-1) > 1e-6).nonzero().flatten().tolist())


def positions(grid: TokenGrid, region: Region) -> set[int]:
    return set(region.positions(grid).tolist())


# --- the rule and the measurement ----------------------------------------------------------

SIZES = {"square": (64, 64), "wide": (128, 64), "tall": (64, 160), "resized": (150, 110)}


@cache
def measuring(family: str) -> HookedVLM:
    """The same model, which does not believe the rule."""
    model = HookedVLM(prepared(family).hf_model, prepared(family).processor)
    model.grid_finder.trusts_rule = False
    return model


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rule_and_measurement_agree(family: str, size: tuple[int, int]) -> None:
    model = prepared(family)
    image = suite.picture(*size)
    rule = model.prepare(image, "Where is it?").grid
    measured = measuring(family).prepare(image, "Where is it?").grid
    assert model.grid_finder.trusts_rule is True
    assert rule.patches is None  # what was measured says more
    assert torch.equal(rule.positions, measured.positions)
    assert (rule.image_size, rule.n_prefix) == (measured.image_size, measured.n_prefix)
    assert (rule.patch_rows, rule.patch_cols) == (measured.patch_rows, measured.patch_cols)
    assert rule.processed_size == measured.processed_size
    for known, found, length in zip(rule.edges, measured.edges, size, strict=True):
        np.testing.assert_allclose(found, known, atol=0.5 + length / 255)
    everything = Region.everything(rule.shape)
    by_rule, by_measure = (everything.patches_by_cell(grid) for grid in (rule, measured))
    assert torch.equal(by_rule, by_measure.sort(-1).values)
    assert measured.projected is not None
    assert measured.projected[..., 1].flatten().tolist() == list(range(len(rule)))
    assert measured.overview is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_box_of_pixels_moves_its_own_positions(family: str) -> None:
    model, image = prepared(family), suite.picture(64, 64)
    inputs = model.prepare(image, "Where?")
    base = embedded(model, inputs)
    for box in ((0, 0, 16, 16), (17, 40, 20, 41), (40, 3, 64, 25)):
        changed = embedded(model, model.prepare(painted(image, box), "Where?"))
        assert moved(base, changed) == positions(inputs.grid, inputs.grid.box(*box))


# --- a rule that is wrong ------------------------------------------------------------------


class Reordered(nn.Module):
    """A projector whose k-th token is what would have been the `order[k]`-th."""

    def __init__(self, projector: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.projector, self.order = projector, order

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)[..., self.order, :]


class Mixed(Reordered):
    """A projector whose tokens are sums of two: none shows one place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x) + super().forward(x)


FLIP = torch.arange(64).flip(0)
ORDERS = {
    "flipped": FLIP,
    "by columns": torch.arange(64).reshape(8, 8).T.flatten(),
    "shuffled": torch.randperm(64, generator=torch.Generator().manual_seed(1)),
}


def with_projector(made_of: type[Reordered], order: Tensor) -> HookedVLM:
    """LLaVA's copy with another projector around its own."""
    model = prepared("llava")
    hf_model: Any = copy.deepcopy(model.hf_model)
    hf_model.model.multi_modal_projector = made_of(hf_model.model.multi_modal_projector, order)
    return HookedVLM(hf_model, model.processor)


def with_features(order: Tensor) -> HookedVLM:
    """LLaVA's copy, its visual tokens permuted after they were projected."""
    model = prepared("llava")
    hf_model: Any = copy.deepcopy(model.hf_model)
    own = hf_model.model.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        found.pooler_output = [rows[order] for rows in found.pooler_output]
        return found

    hf_model.model.get_image_features = get_image_features
    return HookedVLM(hf_model, model.processor)


@pytest.mark.parametrize(
    ("order", "where"),
    [
        ("flipped", "projector"),
        ("flipped", "features"),
        ("by columns", "features"),
        ("shuffled", "projector"),
    ],
)
def test_a_wrong_rule_is_found_out_and_the_order_followed(order: str, where: str) -> None:
    order_ = ORDERS[order]
    model = with_projector(Reordered, order_) if where == "projector" else with_features(order_)
    image = suite.picture(64, 64)
    with pytest.warns(HookedVLMWarning, match="do not follow the usual layout"):
        inputs = model.prepare(image, "Where?")
    assert model.grid_finder.trusts_rule is False
    grid, first = inputs.grid, int(inputs.grid.positions.min())
    assert torch.equal(grid.positions.flatten()[order_], first + torch.arange(64))
    assert Region.everything(grid.shape).patches_by_cell(grid).flatten().tolist() == [*range(1, 65)]
    base = embedded(model, inputs)
    for box in ((0, 0, 8, 8), (20, 40, 30, 50)):
        region = grid.box(*box)
        changed = embedded(model, model.prepare(painted(image, box), "Where?"))
        assert moved(base, changed) == positions(grid, region)
        for site in (FIRST, PROJECTED):
            edited = embedded(model, inputs, (Ablate(site, at=region),))
            assert moved(base, edited) == positions(grid, region)
    again = model.prepare([image, image], ["Where?", "And where?"])  # the warning is said once
    for (other,) in again.grids:
        assert torch.equal(other.positions - other.positions.min(), grid.positions - first)


def test_tokens_that_are_mixed_have_no_grid() -> None:
    mixed = with_projector(Mixed, FLIP)
    with pytest.warns(HookedVLMWarning, match="has no grid here"):
        inputs = mixed.prepare(suite.picture(64, 64), "Where?")
    with pytest.raises(NoGridError, match="no place in the image"):
        _ = inputs.grid
    assert mixed(inputs).isfinite().all()


def test_patches_that_stand_elsewhere_are_found_out() -> None:
    """Patches are flipped before the encoder, and flipped back in the projector: positions
    are as the rule has them, and patches are not."""
    model, turned = prepared("llava"), with_projector(Reordered, FLIP)
    norm: Any = next(m for n, m in turned.hf_model.named_modules() if n.endswith("pre_layrnorm"))
    norm.register_forward_hook(
        lambda module, args, out: torch.cat([out[:, :1], out[:, 1:].flip(1)], 1)
    )
    image = suite.picture(64, 64)
    with pytest.warns(HookedVLMWarning, match="do not follow the usual layout"):
        grid = turned.prepare(image, "Where?").grid
    assert torch.equal(grid.positions, model.prepare(image, "Where?").grid.positions)
    found = Region.everything(grid.shape).patches_by_cell(grid).flatten()
    assert torch.equal(found, FLIP + 1)


def test_where_nothing_can_be_compared_the_rule_is_believed_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, image = prepared("llava"), suite.picture(64, 64)
    fresh = HookedVLM(model.hf_model, model.processor)

    def severed(*args: Any) -> Any:
        raise NoGradientError("No gradient.")

    monkeypatch.setattr(grid_finder, "measure_routes", severed)
    with pytest.warns(HookedVLMWarning, match=r"No gradient\..*which was not compared"):
        found = fresh.prepare(image, "Where?").grid
    assert torch.equal(found.positions, model.prepare(image, "Where?").grid.positions)


# --- tiles, thumbnails, separators ---------------------------------------------------------

TILED = ("llava_onevision", "internvl", "smolvlm", "mistral3", "molmo2")
OVERVIEW = ("llava_onevision", "internvl", "smolvlm", "molmo2")
CUT = ("llava_onevision", "internvl", "molmo2")  # in tiles, the image itself not resized


def wide(model: HookedVLM, seed: int = 0) -> Image.Image:
    width, height = suite.image_size(model)
    return suite.picture(2 * width, height, seed)


def seam(grid: TokenGrid) -> int:
    """The x of a border between two tiles, or of the middle."""
    middle = grid.cols // 2
    tiles = torch.zeros(grid.cols) if grid.patches is None else grid.patches[0, :, 0, 0]
    changes = (tiles.diff().nonzero().flatten() + 1).tolist() or [middle]
    return round(min(changes, key=lambda col: abs(col - middle)) * grid.cell_size[0])


def boxes(grid: TokenGrid) -> list[Box]:
    """A cell in a corner, two beside a seam (in two tiles), and some pixels of another."""
    (width, height), (cell_w, cell_h) = grid.image_size, map(round, grid.cell_size)
    return [
        (0, 0, cell_w, cell_h),
        (seam(grid) - cell_w, cell_h, seam(grid) + cell_w, 2 * cell_h),
        (width - cell_w + 1, height - cell_h + 1, width - 2, height - 2),
    ]


@pytest.mark.parametrize("model_type", TILED)
def test_pixels_of_a_box_move_its_positions_in_every_view(model_type: str) -> None:
    model = made(model_type)
    image = wide(model)
    inputs = model.prepare(image, "Where?")
    grid, base = inputs.grid, embedded(model, inputs)
    views = [grid] if grid.overview is None else [grid, grid.overview]
    assert grid.image_size == image.size
    assert len(views) == (2 if model_type in OVERVIEW else 1)
    for box in boxes(grid):
        found = moved(base, embedded(model, model.prepare(painted(image, box), "Where?")))
        for view in views:
            region = view.box(*box)
            here = found & positions(view, view.all())
            if view.is_resized:  # which spreads pixels over their neighbours
                assert positions(view, region) <= here
                assert here <= positions(view, region | region.ring())
            else:
                assert here == positions(view, region)
        assert found <= set().union(*(positions(view, view.all()) for view in views))


@pytest.mark.parametrize("model_type", OVERVIEW)
def test_the_overview_is_the_whole_picture_coarser(model_type: str) -> None:
    model = made(model_type)
    grid = model.prepare(wide(model), "Where?").grid
    coarse = grid.overview
    assert coarse is not None
    assert coarse.overview is None
    assert grid.shows_everything
    assert coarse.shows_everything
    assert coarse.image_size == grid.image_size
    assert len(coarse) < len(grid)
    assert not positions(grid, grid.all()) & positions(coarse, coarse.all())
    assert (coarse.prompt, coarse.image) == (grid.prompt, grid.image)


@pytest.mark.parametrize("model_type", ["mistral3", "llava_onevision"])
def test_separators_belong_to_no_cell(model_type: str) -> None:
    grid = made(model_type).prepare(wide(made(model_type)), "Where?").grid
    assert bool((grid.positions.diff(dim=1) == 1).all())  # cells of a row follow each other
    gaps = grid.positions[1:, 0] - grid.positions[:-1, -1]
    assert gaps.tolist() == [2] * (grid.rows - 1)


# --- interventions across tiles ------------------------------------------------------------


def pasted(image: Image.Image, other: Image.Image, box: Box) -> Image.Image:
    """The image with a box of another one's pixels."""
    whole = image.copy()
    whole.paste(other.crop(box), box[:2])
    return whole


@pytest.mark.parametrize("model_type", CUT)
def test_patching_patches_is_pasting_pixels(model_type: str) -> None:
    model = made(model_type)
    image, other = wide(model, 1), wide(model, 2)
    inputs, source = (model.prepare(i, "Where?") for i in (image, other))
    grid, base = inputs.grid, embedded(model, inputs)
    assert grid.patches is not None
    (w, h), border = map(round, grid.cell_size), seam(grid)
    one, several = (0, h, 2 * w, 2 * h), (border - w, 0, border + w, 2 * h)
    for box, n_tiles in ((one, 1), (several, 2)):
        region = grid.box(*box)
        row, col = torch.tensor(region.cells).T
        assert len(grid.patches[row, col, :, 0].unique()) == n_tiles
        patched = embedded(model, inputs, (Patch(FIRST, at=region, source=source),))
        wanted = embedded(model, model.prepare(pasted(image, other, box), "Where?"))
        here = grid.positions.flatten()
        torch.testing.assert_close(patched[here], wanted[here], atol=1e-5, rtol=1e-5)
        assert moved(base, patched) == positions(grid, region)


@pytest.mark.parametrize("model_type", TILED)
def test_what_is_removed_in_the_encoder_is_missing_at_its_positions(model_type: str) -> None:
    model = made(model_type)
    inputs = model.prepare(wide(model), "Where?")
    grid, base = inputs.grid, embedded(model, inputs)
    for box in boxes(grid):
        region = grid.box(*box)
        for site in (FIRST, PROJECTED):
            found = moved(base, embedded(model, inputs, (Ablate(site, at=region),)))
            assert found == positions(grid, region), (site, box)


def test_pairs_of_cells_in_different_tiles_are_refused_in_the_encoder() -> None:
    model = made("internvl")
    inputs, source = (model.prepare(wide(model, seed), "Where?") for seed in (1, 5))
    grid = inputs.grid
    pairs = swap_pairs(grid.strip("vertical", 0, 1), grid.strip("vertical", 7, 8))
    for site in (FIRST, PROJECTED):
        with pytest.raises(InterventionError, match="sees this image in tiles"):
            Patch(site, at=pairs, source=source).check(model, inputs)
    targets, sources = pairs.positions(grid)
    record = embedded(model, source)
    edit = Patch(EMBED, at=pairs, source=source)
    _, cache = model.run_with_cache(inputs, EMBED, fwd_hooks=[edit])
    _, other = model.run_with_cache(source, EMBED)
    assert torch.equal(cache[EMBED][0][targets], other[EMBED][0][sources])
    assert not torch.equal(record[targets], record[sources])


# --- several images, and how often one is measured -----------------------------------------


@pytest.mark.parametrize("model_type", ["internvl", "mistral3"])
def test_images_of_different_sizes_in_one_prompt(model_type: str) -> None:
    model = made(model_type)
    side = suite.image_size(model)[0]
    sizes = [(side, side), (side, 2 * side), (side, side)]
    images = [suite.picture(*size, seed) for seed, size in enumerate(sizes)]
    inputs = model.prepare([images], ["Which?"])
    grids, base = inputs.grids[0], embedded(model, inputs)
    assert [grid.image_size for grid in grids] == sizes
    for i, grid in enumerate(grids[:2]):
        w, h = map(round, grid.cell_size)
        box = (w, 2 * h, 3 * w, 3 * h)
        changed = [painted(one, box) if k == i else one for k, one in enumerate(images)]
        found = moved(base, embedded(model, model.prepare([changed], ["Which?"])))
        region = grid.box(*box)
        assert found & positions(grid, grid.all()) == positions(grid, region)
        for other in [*grids[:i], *grids[i + 1 :]]:
            assert not found & positions(other, other.all())
        edit = Ablate(PROJECTED, at=region.of_image(i))
        assert moved(base, embedded(model, inputs, (edit,))) == positions(grid, region)


def test_an_image_in_company_may_be_cut_otherwise() -> None:
    """LLaVA-OneVision cuts a picture into tiles only where it is the prompt's only one."""
    model = made("llava_onevision")
    images = [suite.picture(112, 112, seed) for seed in range(2)]
    alone, both = model.prepare([images[0]], "Which?"), model.prepare([images], ["Which?"])
    assert alone.grid.overview is not None or alone.grid.patches is not None
    for i, grid in enumerate(both.grids[0]):
        assert (grid.shape, grid.overview, grid.image) == ((8, 8), None, i)
    changed = [images[0], painted(images[1], (0, 14, 28, 28))]
    found = moved(embedded(model, both), embedded(model, model.prepare([changed], ["Which?"])))
    second = both.grids[0][1]
    assert found == positions(second, second.box(0, 14, 28, 28))
    with pytest.warns(HookedVLMWarning, match="padded this image into its tiles"):
        padded = model.prepare([[images[0], suite.picture(112, 224)]], ["Which?"])
    assert "An image of 112x224 px has no grid here" in padded.no_grid


def test_prompts_with_different_images_in_one_batch() -> None:
    model = made("internvl")
    side = suite.image_size(model)[0]
    images = [[suite.picture(2 * side, side, 1)], [suite.picture(side, side, 2)], []]
    texts = ["Which is it?", "Hi", "Nothing"]
    inputs = model.prepare(images, texts)
    assert [len(row) for row in inputs.grids] == [1, 1, 0]
    for b in range(2):
        alone, (grid,) = model.prepare(images[b], texts[b]), inputs.grids[b]
        shift = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
        assert grid.prompt == b
        assert torch.equal(grid.positions, alone.grid.positions + shift)
    assert [grid.image for row in inputs.grids for grid in row] == [0, 3]  # two tiles, a thumbnail


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every measurement."""
    own, calls = grid_finder.measure_routes, []

    def measure(model: Any, inputs: Any) -> Any:
        calls.append(int(inputs["input_ids"].shape[1]))
        return own(model, inputs)

    monkeypatch.setattr(grid_finder, "measure_routes", measure)
    return calls


def test_each_size_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(made("mistral3").hf_model, made("mistral3").processor)
    calls = counted(monkeypatch)
    square, tall = suite.picture(112, 112), suite.picture(112, 168, 1)
    for images in ([square], [square], [tall], [square, tall], [tall, square, square]):
        model.prepare([images], ["Where?"])
    assert len(calls) == len(set(calls)) == 2
    assert len(model.grid_finder.templates) == 2


def test_a_rule_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(prepared("qwen2-vl").hf_model, prepared("qwen2-vl").processor)
    calls = counted(monkeypatch)
    for size in ((64, 64), (128, 64), (64, 128)):
        model.prepare(suite.picture(*size), "Where?")
    assert len(calls) == 1


# --- no grid -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("idefics2", "no place in the image"), ("mllama", "reads the image by cross-attention")],
)
def test_without_a_grid_it_is_said_why_and_the_model_runs(model_type: str, why: str) -> None:
    model = made(model_type)
    size = suite.image_size(model)
    with pytest.warns(HookedVLMWarning, match=why):
        inputs = model.prepare([suite.picture(*size)], "What?")
    assert f"An image of {size[0]}x{size[1]} px has no grid here" in inputs.no_grid
    with pytest.raises(NoGridError, match=why):
        _ = inputs.grid
    assert not any(inputs.grids)
    logits, cache = model.run_with_cache(inputs, FIRST)
    assert torch.equal(logits, model.hf_model(**inputs).logits)
    assert len(cache) == 1


def test_tensors_alone_tell_no_tiles() -> None:
    model = made("llava_onevision")
    inputs = model.prepare(wide(model), "Where?")
    with pytest.raises(GridError, match=r"Use prepare\(images, texts\)"):
        model.grids(dict(inputs))


def test_placeholders_that_do_not_fit_the_rule_are_refused() -> None:
    finder = prepared("llava").grid_finder
    inputs = dict(prepared("llava").prepare(suite.picture(64, 64), "Where?"))
    short = {**inputs, "input_ids": inputs["input_ids"][:, -30:]}
    with pytest.raises(GridError, match="image tokens for 1 image of 64 patches"):
        finder.by_rule(short)
    with pytest.raises(GridError, match="2 images became 1 picture for"):
        finder.by_rule(inputs, [(64, 64), (64, 64)])


def test_placeholders_that_do_not_fit_a_template_are_refused() -> None:
    model = made("mistral3")
    inputs = model.prepare(suite.picture(112, 112), "Where?")
    ids = inputs["input_ids"]
    image = (ids[0] == model.anatomy.image_token_id).nonzero().flatten()

    def find(input_ids: Tensor) -> Any:
        def process(images: list[Image.Image]) -> dict[str, Any]:
            return dict(inputs)  # unused: this size is known already

        return model.grid_finder.find(
            {**inputs, "input_ids": input_ids}, [[(112, 112)]], process, "[]"
        )

    assert torch.equal(find(ids)[0][0].positions, inputs.grid.positions)
    fewer = torch.cat([ids[:, : image[0]], ids[:, image[0] + 1 :]], 1)
    with pytest.raises(GridError, match=f"too few .* 112x112 px has {len(image)}"):
        find(fewer)
    with pytest.raises(GridError, match="1 image token more than"):
        find(torch.cat([ids, ids[:, image[:1]]], 1))
