"""Vision encoders by themselves: the laws of a wrapped model, and regions of patches."""

import re
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers.tiny_encoders import (
    ENCODERS,
    PATCH,
    SIDE,
    build_encoder,
    encoder,
    pictures,
    processor_of,
)
from hooked_vlm.errors import (
    DataError,
    GridError,
    HookedVLMWarning,
    InterventionError,
    RegionError,
    UnknownHookError,
)
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.positions import LastToken


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
OUT = "vision_encoder.hook_out"
SQUARE = ("hook_pattern", "hook_attn_scores")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tensors(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def same(a: Any, b: Any) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def perturbed(value: Tensor, hook: Any = None) -> Tensor:
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return value * 1.5 + 0.1 * noise


# --- the laws of a wrapped model ----------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_are_transformers_own_bit_for_bit(name, attn):
    model = encoder(name, attn)
    inputs = model.prepare(pictures())
    base = model.hf_model(**inputs)
    assert type(model(inputs)) is type(base)
    assert same(model(inputs), base)
    output, cache = model.run_with_cache(inputs, lambda name: not name.endswith(SQUARE))
    assert same(output, base)
    if "last_hidden_state" in base:
        assert torch.equal(cache[OUT], base.last_hidden_state)
    assert not torch.equal(cache[OUT][0], cache[OUT][1])


@pytest.mark.parametrize("name", ENCODERS)
def test_every_site_fires_once_in_order_with_its_shape(name):
    model, fired = encoder(name), []
    inputs = model.prepare(pictures())
    model.run_with_hooks(inputs, [("*", lambda v, hook: fired.append(hook.name))])
    # In which order an attention makes q, k and v is its own affair (k first, in DINOv2).
    assert sorted(fired, key=model.hook_names.index) == model.hook_names
    together = [re.sub(r"hook_[qkv]$", "hook_qkv", name) for name in fired]
    assert together == [re.sub(r"hook_[qkv]$", "hook_qkv", name) for name in model.hook_names]
    _, cache = model.run_with_cache(inputs)
    rows = 36 + ENCODERS[name][3]
    width = 32
    for site, value in cache.items():
        shape = {OUT: (2, rows, width), "vision_encoder.hook_patch_embed": (2, 36, width)}
        if site.endswith(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")):
            assert value.shape == (2, rows, width), site
        elif site in shape:
            assert value.shape == shape[site], site
        elif site.endswith((".hook_q", ".hook_k", ".hook_v", ".hook_z")):
            assert value.shape == (2, rows, 4, width // 4), site
        elif site.endswith(SQUARE):
            assert value.shape == (2, 4, rows, rows), site


@pytest.mark.parametrize("name", ENCODERS)
def test_every_site_is_written_and_writing_back_changes_nothing(name):
    model = encoder(name)
    inputs = model.prepare(pictures())
    base = model(inputs)
    assert not any(site.read_only for site in model.sites.values())
    for site in model.hook_names:
        assert same(model.run_with_hooks(inputs, [(site, lambda v, hook: v.clone())]), base), site
        changed = tensors(model.run_with_hooks(inputs, [(site, perturbed)]))
        assert not same(changed, base), site
        assert all(value.isfinite().all() for value in changed.values()), site


@pytest.mark.parametrize("name", ENCODERS)
def test_residual_identities_are_exact_with_layer_scale_too(name):
    model = encoder(name)
    _, cache = model.run_with_cache(model.prepare(pictures()), "*blocks.*.hook_*")
    for i in range(3):
        pre, mid, post = (cache[f"resid_{p}", i, "vision"] for p in ("pre", "mid", "post"))
        assert torch.equal(pre + cache["attn_out", i, "vision"], mid)
        assert torch.equal(mid + cache["mlp_out", i, "vision"], post)
        if i < 2:
            assert torch.equal(post, cache["resid_pre", i + 1, "vision"])


@pytest.mark.parametrize("name", ENCODERS)
def test_patterns_are_what_mixes_values(name):
    model = encoder(name)
    _, cache = model.run_with_cache(model.prepare(pictures()), "*blocks.1.attn.*")
    z, value, weights = (cache[part, 1, "vision"] for part in ("z", "v", "pattern"))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    mixed = torch.einsum("ihqk,ikhd->iqhd", weights, value)
    torch.testing.assert_close(mixed, z, atol=1e-5, rtol=1e-4)


def test_nothing_stays_attached_when_a_hook_raises():
    model = encoder("dinov2")
    inputs = model.prepare(pictures())
    base = model(inputs)

    def broken(value, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(inputs, [("*hook_pattern", broken)])
    assert same(model(inputs), base)
    with pytest.raises(UnknownHookError, match=r"vision_encoder\.blocks\.1\.hook_resid_post"):
        model.run_with_cache(inputs, "vision_encoder.blocks.1.hook_resid_pos")
    with model.hooks([("vision_encoder.blocks.0.hook_attn_out", perturbed)]) as hooked:
        assert hooked is model
        assert not same(model(inputs), base)
    assert same(model(inputs), base)


def test_gradients_flow_through_hooks():
    with torch.enable_grad():
        model = encoder("dinov3")
        inputs = model.prepare(pictures())
        added = torch.zeros(32, requires_grad=True)
        edit = [("vision_encoder.blocks.1.hook_attn_out", lambda v, hook: v + added)]
        output = model.run_with_hooks(inputs, edit)
        (gradient,) = torch.autograd.grad(output.pooler_output.square().sum(), added)
        assert gradient.abs().max() > 0


# --- patches and pixels -------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_without_attention_a_changed_patch_moves_its_own_row_alone(name):
    model = encoder(name)
    cut = [("vision_encoder.blocks.*.hook_attn_out", lambda v, hook: torch.zeros_like(v))]
    images = pictures()
    _, clean = model.run_with_cache(model.prepare(images), OUT, fwd_hooks=cut)
    for row, col in ((0, 0), (1, 4), (5, 5)):
        changed = [images[0], images[1].copy()]
        box = (col * PATCH, row * PATCH, (col + 1) * PATCH, (row + 1) * PATCH)
        changed[1][box[1] : box[3], box[0] : box[2]] ^= 255
        inputs = model.prepare(changed)
        grid = inputs.grids[1][0]
        region = grid.box(*box)
        _, cache = model.run_with_cache(inputs, OUT, fwd_hooks=cut)
        moved = (cache[OUT] != clean[OUT]).any(-1)
        assert not moved[0].any()
        assert moved[1].nonzero().flatten().tolist() == region.patches(grid).tolist()
        assert region.patches(grid).tolist() == region.positions(grid).tolist()
        assert grid.n_prefix == model.cfg.n_prefix == ENCODERS[name][3]


def test_grids_of_resized_and_cropped_images_keep_the_users_pixels():
    crop = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    model = HookedVisionEncoder(build_encoder("clip"), crop)
    with pytest.warns(HookedVLMWarning, match="It was cropped too: the cells show x 0 to 96"):
        grid = model.prepare(Image.new("RGB", (96, 192))).grid
    assert grid.shape == (6, 6)
    assert grid.cell_size == (16, 16)
    assert grid.visible_box == (0, 48, 96, 144)
    assert grid.at(17, 65) == (1, 1)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "vit", "deit", "i-jepa"])
def test_images_of_another_size_have_grids_of_their_own(name):
    processor = processor_of(name)
    processor.size = {"height": 32, "width": 64}
    model = HookedVisionEncoder(encoder(name).hf_model, processor)
    with pytest.warns(HookedVLMWarning, match="to 64x32 px"):
        inputs = model.prepare(pictures(2, side=64))
    grid = inputs.grids[1][0]
    assert grid.shape == (4, 8)
    _, cache = model.run_with_cache(inputs, OUT)
    assert cache[OUT].shape == (2, 32 + ENCODERS[name][3], 32)


def test_siglip2_images_of_several_shapes_are_measured_one_by_one():
    model = encoder("siglip2")
    images = [Image.new("RGB", (48, 48)), Image.new("RGB", (64, 32))]
    inputs = model.prepare(images)
    assert [grid.shape for (grid,) in inputs.grids] == [(6, 6), (4, 8)]
    assert inputs["pixel_values"].shape[1] == 36
    zero = Ablate("vision_encoder.blocks.0.hook_resid_post", at=None)
    _, cache = model.run_with_cache(inputs, "*blocks.0.hook_resid_post", fwd_hooks=[zero])
    kept = cache["resid_post", 0, "vision"].abs().sum(-1) > 0
    assert kept.sum(-1).tolist() == [0, 4]  # of the second, the padding


def test_encoders_that_drop_patches_have_no_grid():
    model = HookedVisionEncoder(build_encoder("vit-mae", mask_ratio=0.75), processor_of("vit-mae"))
    with pytest.raises(GridError, match=r"27 of 6x6 patches reach no row.*mask_ratio=0\.0"):
        model.prepare(pictures())
    shuffled = {"pixel_values": torch.randn(2, 3, SIDE, SIDE), "noise": torch.rand(2, 36)}
    with pytest.raises(GridError, match="not keep its patches in raster order"):
        encoder("vit-mae").grids(shuffled)


def test_inputs_made_by_hand_have_grids_over_what_the_encoder_sees():
    model = encoder("dinov2-registers")
    ((grid,), _) = model.grids({"pixel_values": torch.randn(2, 3, SIDE, SIDE)})
    assert isinstance(grid, TokenGrid)
    assert not grid.is_resized
    assert grid.positions[0].tolist() == [5, 6, 7, 8, 9, 10]
    with pytest.raises(GridError, match="no \\[image, channel, height, width\\]"):
        model.grids({"pixel_values": torch.randn(2, 36, 192)})


# --- interventions ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_a_region_is_patched_from_another_image(name):
    model = encoder(name)
    inputs, other = model.prepare(pictures(2)), model.prepare(pictures(2, seed=1))
    region = inputs.grids[0][0].box(8, 16, 24, 40, name="object")
    site = "vision_encoder.blocks.1.hook_resid_post"
    source = record(model, other, site)
    _, clean = model.run_with_cache(inputs, site)
    _, cache = model.run_with_cache(
        inputs, [site, OUT], fwd_hooks=[Patch(site, at=region, source=source)]
    )
    rows = region.patches(inputs.grids[0][0])
    written = torch.zeros(cache[site].shape[1], dtype=torch.bool)
    written[rows] = True
    assert torch.equal(cache[site][:, written], source.cache[site][:, written])
    assert torch.equal(cache[site][:, ~written], clean[site][:, ~written])
    assert not same(
        model(inputs), model.run_with_hooks(inputs, [Patch(site, at=region, source=other)])
    )


def test_a_whole_image_patched_is_the_other_image():
    model = encoder("siglip")
    inputs, other = model.prepare(pictures(1)), model.prepare(pictures(1, seed=1))
    for site in ("hook_patch_embed", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid"):
        patch = Patch(f"vision_encoder.{site}", at=inputs.grid.all(), source=other)
        assert same(model.run_with_hooks(inputs, [patch]), model(other)), site


def test_the_patch_embedding_has_no_prefix_and_the_blocks_do():
    model = encoder("dinov2-registers")
    inputs = model.prepare(pictures(1))
    region = inputs.grid.cells([(0, 0), (2, 3)])
    for site, rows in (("hook_patch_embed", [0, 15]), ("blocks.0.hook_resid_pre", [5, 20])):
        name = f"vision_encoder.{site}"
        _, cache = model.run_with_cache(inputs, name, fwd_hooks=[Ablate(name, at=region)])
        assert (cache[name][0] == 0).all(-1).nonzero().flatten().tolist() == rows


def test_steering_heads_and_what_is_refused():
    model = encoder("vit")
    inputs = model.prepare(pictures(1))
    base, region = model(inputs), inputs.grid.box(0, 0, 16, 16)
    site = "vision_encoder.blocks.1.hook_resid_post"
    direction = torch.randn(32)
    for alpha in (0.0, 2.0):
        steer = Steer(site, at=region, directions=direction, alpha=alpha)
        assert same(model.run_with_hooks(inputs, [steer]), base) == (alpha == 0)
    z = "vision_encoder.blocks.1.attn.hook_z"
    _, cache = model.run_with_cache(inputs, z, fwd_hooks=[Ablate(z, at=region, heads=(2,))])
    assert (cache[z][0] == 0).all(-1).sum(0).tolist() == [0, 0, 4, 0]
    with pytest.raises(InterventionError, match="has 32 features, and 8 were given"):
        model.run_with_hooks(inputs, [Steer(site, at=region, directions=torch.ones(8), alpha=1.0)])
    with pytest.raises(InterventionError, match="is no part of an image"):
        model.run_with_hooks(inputs, [Ablate(site, at=LastToken())])
    with pytest.raises(RegionError, match="on a grid of 3x3 cells"):
        model.run_with_hooks(inputs, [Ablate(site, at=region.everything((3, 3)))])


def test_half_precision_and_bad_images():
    model = HookedVisionEncoder(build_encoder("vit").bfloat16(), processor_of("vit"))
    inputs = model.prepare(pictures())
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert model(inputs).last_hidden_state.dtype == torch.bfloat16
    with pytest.raises(DataError, match="No image was given"):
        model.prepare([])


def test_describe_and_repr():
    model = encoder("dinov2-registers")
    lines = model.describe().splitlines()
    assert lines[0].startswith(
        "tiny dinov2-registers: 3 layers, d_model=32, 4 heads of 8, d_mlp=64"
    )
    assert lines[0].endswith("5 tokens before the patches")
    assert any("hook_resid_post" in line and "[image patch d_vision=32]" in line for line in lines)
    assert (
        repr(model)
        == f"HookedVisionEncoder('tiny dinov2-registers', 3 layers, {len(model.sites)} sites)"
    )


class CroppedUnannounced:
    """A processor that cuts out the middle of a picture, by a setting of another name."""

    do_resize = True
    size = {"height": SIDE, "width": SIDE}  # noqa: RUF012 - as processors have it

    def __init__(self) -> None:
        self.own = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)

    def __call__(self, **given: Any) -> Any:
        return self.own(**given)


def test_cells_that_show_something_else_than_the_settings_say_are_warned_of():
    """As where transformers renames the setting that crops: boxes would be of the whole image."""
    model = HookedVisionEncoder(encoder("clip").hf_model, CroppedUnannounced())
    said = []
    for _ in range(2):
        with pytest.warns(HookedVLMWarning) as caught:  # the image is resized, too
            model.prepare(Image.new("RGB", (96, 48)))
        said.append(sum("show other parts of the image" in str(w.message) for w in caught))
    assert said == [1, 0]  # once for each size
    honest = HookedVisionEncoder(encoder("clip").hf_model, CroppedUnannounced().own)
    with pytest.warns(HookedVLMWarning) as caught:
        honest.prepare(Image.new("RGB", (96, 48)))
    assert not any("show other parts of the image" in str(w.message) for w in caught)
