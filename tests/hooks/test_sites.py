"""Every site: fires, can be written or says why not, and shows what its name promises."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.tiny_models import FAMILIES, IMAGE, build, make_inputs, tiny
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.patch_order import packed_layout
from hooked_vlm.hooks.sites import Site, read, write
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "llava -1": ("llava", {"vision_feature_layer": -1}),
    "llava 1": ("llava", {"vision_feature_layer": 1}),
    "llava list": ("llava", {"vision_feature_layer": [-2, -1]}),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def variant(name: str) -> HookedVLM:
    family, options = VARIANTS[name]
    return HookedVLM(build(family, "eager", **options)) if options else tiny(family, "eager")


def each(function: Callable[[Tensor], Any]) -> Callable:
    """A hook function that does the same to a tensor and to each tensor of a list."""

    def hook_function(value, hook):
        if not isinstance(value, list):
            return function(value)
        results = [function(tensor) for tensor in value]
        return None if results[0] is None else results

    return hook_function


def perturbed(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor * 1.5 + 0.1 * noise


def perturb_in_place(tensor: Tensor) -> None:
    tensor.copy_(perturbed(tensor))


def representatives(model: HookedVLM) -> list[Site]:
    """The sites outside blocks, and those of one block of each tower."""
    return [s for s in model.sites.values() if "blocks." not in s.name or "blocks.1." in s.name]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_fires_once_in_the_order_of_the_list(family, attn):
    model, fired = tiny(family, attn), []
    everywhere = [("*", lambda value, hook: fired.append(hook.name))]
    model.run_with_hooks(make_inputs(family, 2), everywhere)
    assert fired == list(model.hook_dict)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_site_is_written_or_refuses(name):
    model, inputs = variant(name), make_inputs(VARIANTS[name][0])
    base = model(inputs)
    for site in model.sites.values():
        edit = [(site.name, each(perturbed))]
        if site.read_only:
            with pytest.raises(HookError, match=r"cannot be written: the projector reads"):
                model.run_with_hooks(inputs, edit)
        else:
            assert not torch.equal(model.run_with_hooks(inputs, edit), base), site.name


def test_only_blocks_behind_the_one_the_projector_reads_are_read_only():
    limited = {
        name: {s.name.split(".hook")[0][:23] for s in variant(name).sites.values() if s.read_only}
        for name in VARIANTS
    }
    blocks = {layer: f"vision_encoder.blocks.{layer}" for layer in (1, 2)}
    assert limited == {
        "qwen2-vl": set(),
        "gemma-3": set(),
        "llava": {blocks[2]},
        "llava -1": set(),
        "llava 1": {blocks[1], blocks[2]},
        "llava list": set(),
    }


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_writing_back_what_was_read_changes_nothing(family, attn):
    model, inputs = tiny(family, attn), make_inputs(family, 2, images=2)
    same = each(lambda tensor: tensor.clone())
    writable = [site for site in model.sites.values() if not site.read_only]
    read = model.run_with_hooks(inputs, [(site.name, lambda x, hook: None) for site in writable])
    assert torch.equal(model.run_with_hooks(inputs, [(s.name, same) for s in writable]), read)
    fused = [s for s in writable if s.part not in ("attn_scores", "pattern")]
    written = model.run_with_hooks(inputs, [(site.name, same) for site in fused])
    assert torch.equal(written, model(inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_in_place_is_the_edit_returned(family):
    model, inputs = tiny(family), make_inputs(family, 2)
    base = model(inputs)
    for site in representatives(model):
        returned = model.run_with_hooks(inputs, [(site.name, each(perturbed))])
        assert (returned - base).abs().max() > 1e-5, site.name
        in_place = model.run_with_hooks(inputs, [(site.name, each(perturb_in_place))])
        assert torch.equal(returned, in_place), site.name
    with torch.inference_mode():  # where torch counts no versions
        again = model.run_with_hooks(inputs, [(site.name, each(perturb_in_place))])
    assert torch.equal(again, returned)


def test_an_edit_in_place_of_a_read_only_site_is_refused():
    model, inputs = tiny("llava", "eager"), make_inputs("llava")
    base = model(inputs)
    for site in model.sites.values():
        if site.read_only:
            with pytest.raises(HookError, match="vision block 1"):
                model.run_with_hooks(inputs, [(site.name, each(Tensor.zero_))])
    assert torch.equal(model(inputs), base)


# --- the residual stream ------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_identities_are_exact(family):
    model = tiny(family)
    _, cache = model.run_with_cache(make_inputs(family, 2), "*blocks.*.hook_*")
    assert model.cfg.vision is not None
    for tower, n_layers in ((None, 3), ("vision_encoder", model.cfg.vision.n_layers)):
        for i in range(n_layers):
            pre, mid, post = (cache[f"resid_{place}", i, tower] for place in ("pre", "mid", "post"))
            assert torch.equal(pre + cache["attn_out", i, tower], mid)
            assert torch.equal(mid + cache["mlp_out", i, tower], post)
            if i + 1 < n_layers:
                assert torch.equal(post, cache["resid_pre", i + 1, tower])
            assert cache["attn_out", i, tower].abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_resid_mid_moves_the_mlp_and_the_skip_connection(family):
    model, inputs = tiny(family), make_inputs(family)
    for tower in ("", "vision_encoder."):
        block = f"{tower}blocks.0."
        delta = torch.randn(48 if not tower else 32)
        names = [f"{block}hook_resid_mid", f"{block}ln2.hook_normalized", f"{block}hook_resid_post"]
        runs = {}
        for site in ("hook_attn_out", "hook_resid_mid"):
            edit = [(block + site, lambda x, hook, delta=delta: x + delta)]
            runs[site] = model.run_with_cache(inputs, names, fwd_hooks=edit)
        (logits, cache), (other_logits, other) = runs.values()
        for name in names:
            torch.testing.assert_close(cache[name], other[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits, other_logits, atol=1e-4, rtol=1e-4)
        _, clean = model.run_with_cache(inputs, names)
        moved = other[names[2]] - clean[names[2]] - delta
        assert moved.abs().max() > 1e-2, "the MLP did not see the change"


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_sites(family):
    model, inputs = tiny(family), make_inputs(family, 2)
    names = ["hook_embed", "hook_merged_embed", "vision_projector.hook_out", "*.0.hook_resid_pre"]
    _, cache = model.run_with_cache(inputs, names)
    image = inputs["input_ids"] == IMAGE
    merged = cache["hook_merged_embed"]
    assert torch.equal(merged[~image], cache["hook_embed"][~image])
    tokens = cache["vision_projector.hook_out"]
    assert torch.equal(merged[image].view_as(tokens), tokens)
    assert torch.equal(cache["resid_pre", 0], merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_sites_are_what_the_next_map_takes(family):
    model = tiny(family, "eager")
    _, cache = model.run_with_cache(make_inputs(family, 2))
    for tower, prefix in ((None, ""), ("vision_encoder", "vision_encoder.")):
        z, value, weights = (cache[part, 1, tower] for part in ("z", "v", "pattern"))
        value = value.repeat_interleave(z.shape[2] // value.shape[2], dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value)
        torch.testing.assert_close(mixed, z, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights, cache["attn_scores", 1, tower].softmax(-1))
        sites = model.sites
        down = model.hf_model.get_submodule(sites[f"{prefix}blocks.1.mlp.hook_post"].module)
        out = down(cache["post", 1, tower])
        if family == "gemma-3" and not tower:  # its output is taken after a norm
            out = model.hf_model.get_submodule(sites["blocks.1.hook_mlp_out"].module)(out)
        torch.testing.assert_close(out, cache["mlp_out", 1, tower], atol=1e-5, rtol=1e-4)


# --- raster order -------------------------------------------------------------------------


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]


def packed_inputs(images: list[np.ndarray]) -> dict[str, Tensor]:
    """Inputs of one prompt per image, through the real processor's order of patches."""
    pixels = {"shortest_edge": 256, "longest_edge": 10**6}
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=pixels)
    made = dict(processor([Image.fromarray(i) for i in images], return_tensors="pt"))
    counts = [int(h * w // 4) for _, h, w in made["image_grid_thw"].tolist()]
    width = max(counts) + 4
    ids = torch.tensor([[5] * (width - 3 - n) + [298, *[IMAGE] * n, 297, 7] for n in counts])
    return {**made, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}


@pytest.mark.parametrize("sizes", [[(64, 48)], [(64, 48), (64, 48)], [(64, 48), (32, 80)]])
def test_a_changed_cell_moves_its_own_patches_in_raster_order(sizes):
    model, images = tiny("qwen2-vl", "eager"), pictures(*sizes)
    name = "vision_encoder.hook_patch_embed"
    token_name = "vision_projector.hook_out"
    _, clean = model.run_with_cache(packed_inputs(images), name)
    (width, height), image = sizes[-1], len(sizes) - 1
    assert isinstance(clean[name], list) == (len(set(sizes)) > 1)
    for row, col in ((0, 0), (height // 16 - 1, width // 16 - 1), (1, 0), (0, 1)):
        changed = [picture.copy() for picture in images]
        changed[-1][row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] ^= 255
        inputs = packed_inputs(changed)
        _, cache = model.run_with_cache(inputs, name)
        moved = (cache[name][image] != clean[name][image]).any(-1).view(height // 8, width // 8)
        expected = torch.zeros(height // 8, width // 8, dtype=torch.bool)
        expected[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = True
        assert torch.equal(moved, expected)
        assert all(torch.equal(cache[name][i], clean[name][i]) for i in range(image))
    # With attention between patches cut, a cell reaches its own visual token alone.
    cut = [("vision_encoder.blocks.*.hook_attn_out", each(torch.zeros_like))]
    runs = [
        model.run_with_cache(i, token_name, fwd_hooks=cut)[1][token_name][image]
        for i in (packed_inputs(images), inputs)
    ]
    moved = (runs[0] != runs[1]).any(-1).view(height // 16, width // 16)
    assert moved.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_images_of_different_sizes_are_lists_and_written_back_exactly(attn):
    model, inputs = tiny("qwen2-vl", attn), packed_inputs(pictures((64, 48), (32, 80)))
    _, cache = model.run_with_cache(inputs)
    vision = [name for name in cache if name.startswith("vision")]
    for name in vision:
        value, site = cache[name], model.sites[name]
        assert isinstance(value, list), name
        per_token = site.order == "tokens" and [12, 10]
        axis = 1 if site.part in ("attn_scores", "pattern") else 0
        assert [v.shape[axis] for v in value] == (per_token or [48, 40]), name
    for weights in cache["pattern", 1, "vision_encoder"]:
        assert weights.shape[-1] == weights.shape[-2]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    base = model.run_with_hooks(inputs, [(name, lambda x, hook: None) for name in vision])
    same = [(name, each(lambda tensor: tensor.clone())) for name in vision]
    assert torch.equal(model.run_with_hooks(inputs, same), base)
    # Only the second image is changed: the first prompt, which holds the first, keeps its logits.
    for name in ("attn.hook_pattern", "hook_resid_post", "attn.hook_q", "attn.hook_rot_k"):
        edit = [(f"vision_encoder.blocks.1.{name}", lambda x, hook: [x[0], x[1].flip(-1) * 2])]
        logits = model.run_with_hooks(inputs, edit)
        torch.testing.assert_close(logits[0], base[0], atol=1e-5, rtol=1e-5)
        assert (logits[1] - base[1]).abs().max() > 1e-4, name


def test_both_axes_of_a_packed_pattern_are_in_raster_order():
    model, inputs = tiny("qwen2-vl", "eager"), packed_inputs(pictures((64, 48), (64, 48)))
    _, cache = model.run_with_cache(inputs, "vision_encoder.blocks.1.*")
    z, value = cache["z", 1, "vision_encoder"], cache["v", 1, "vision_encoder"]
    weights = cache["pattern", 1, "vision_encoder"]
    assert weights.shape == (2, 4, 48, 48)
    # q, k, v and z are in raster order by themselves, so this fails if the pattern's axes are not.
    mixed = torch.einsum("ihqk,ikhd->iqhd", weights, value)
    torch.testing.assert_close(mixed, z, atol=1e-5, rtol=1e-4)


def test_j2_what_is_written_lies_in_memory_as_the_modules_own_tensor():
    """Another memory layout can change the last bits of what is computed from it."""
    sites = tiny("llava").sites
    patches = torch.randn(2, 32, 6, 6)
    stream = torch.randn(48, 2, 5).permute(1, 2, 0)
    for name, raw in (
        ("vision_encoder.hook_patch_embed", patches),
        ("vision_encoder.hook_patch_embed", patches.contiguous(memory_format=torch.channels_last)),
        ("blocks.0.hook_resid_post", stream),
        ("blocks.0.hook_resid_post", stream.contiguous()),
    ):
        shown = read(sites[name], raw, None)
        assert isinstance(shown, Tensor)
        edited = (shown * 2).contiguous()
        written = write(sites[name], edited, raw, None)
        assert written.stride() == raw.stride() and torch.equal(written, raw * 2), name
    # A view with gaps has no layout to keep.
    gaps = torch.randn(2, 5, 96)[..., :48]
    written = write(sites["blocks.0.hook_resid_post"], (gaps * 2).contiguous(), gaps, None)
    assert torch.equal(written, gaps * 2)


def test_j2_padded_images_are_shown_without_their_padding_and_written_back():
    """Pixtral's patches: convolved in one batch that is padded to the largest height and width."""
    axes = "image patch d_vision"
    site = Site(
        "vision_encoder.hook_patch_embed", axes, "conv", "output", order="patches", conv=True
    )
    layout = packed_layout(torch.tensor([[1, 2, 3], [1, 4, 1]]), 1)
    padded = torch.randn(2, 5, 4, 3)
    shown = read(site, padded, layout)
    assert [tuple(image.shape) for image in shown] == [(6, 5), (4, 5)]
    assert torch.equal(shown[1], padded[1, :, :, 0].T)
    written = write(site, [2 * image for image in shown], padded, layout)
    expected = padded.clone()
    expected[0, :, :2] *= 2
    expected[1, :, :, :1] *= 2
    assert torch.equal(written, expected)


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 3, 4, 5), (2, 2, 3, 2, 5)])
def test_j2_patches_in_rows_and_columns_are_shown_on_one_axis(shape: tuple[int, ...]):
    site = Site("vision_encoder.blocks.0.hook_resid_pre", "image patch d_vision", "block", "output")
    raw = torch.randn(shape)
    shown = read(site, raw, None)
    assert isinstance(shown, Tensor) and torch.equal(shown, raw.reshape(2, 12, 5))
    assert torch.equal(write(site, shown * 2, raw, None), raw * 2)


@pytest.mark.parametrize("layout", ["3hd", "h3d", "h2d"])
def test_j2_parts_of_a_fused_projection_are_cut_out_by_its_axes(layout: str) -> None:
    heads, width = 4, 5
    sizes = {"3": 3, "2": 2, "h": heads, "d": width}
    raw = torch.randn(2, 6, math.prod(sizes[axis] for axis in layout))
    parts = raw.reshape(2, 6, *(sizes[axis] for axis in layout))
    for index in range(1 if layout == "h2d" else 3):
        site = replace(
            tiny("llava").sites["blocks.0.attn.hook_q"], layout=layout, index=index, heads=heads
        )
        shown = read(site, raw, None)
        expected = parts[:, :, index] if layout == "3hd" else parts[:, :, :, index]
        assert isinstance(shown, Tensor) and torch.equal(shown, expected)
        written = write(site, torch.zeros_like(shown), raw, None)
        assert torch.equal(written == 0, torch.zeros_like(raw) == write(site, shown * 0, raw, None))
