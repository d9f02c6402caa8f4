"""Where each pixel goes: known on three layouts, planted in a map, refused where it is nowhere."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance import suite
from helpers.tiny_models import FAMILIES, IMAGE, build, make_inputs, tiny
from hooked_vlm.errors import GridError, NoGradientError
from hooked_vlm.inputs.pixel_routing import (
    NOWHERE,
    SEVERAL,
    attention_sites,
    holds_pixels,
    measure_routes,
    pixel_name,
    positions_reached,
)
from hooked_vlm.model.vlm import HookedVLM


ROWS, PROJECTED = "vision_encoder.blocks.0.hook_resid_pre", "vision_projector.hook_out"


def token_of_patch(family: str) -> Tensor:
    """Which token of its image each patch of 6x6 becomes, `[row, col]`, by hand."""
    row, col = torch.arange(6)[:, None], torch.arange(6)
    return row * 6 + col if family == "llava" else row // 2 * 3 + col // 2


def image_positions(family: str, inputs: dict[str, Tensor], n_images: int) -> Tensor:
    """The flat positions `[image, token]` of all images of a batch."""
    flat = (inputs["input_ids"].flatten() == IMAGE).nonzero().flatten()
    return flat.reshape(n_images, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_rows_and_tokens_go_where_the_layout_says(family: str) -> None:
    inputs = make_inputs(family, batch=2, images=2)
    routes = measure_routes(tiny(family), inputs)
    positions, token = image_positions(family, inputs, 4), token_of_patch(family)
    if family == "qwen2-vl":  # four patches of one token stand together
        wanted = positions.flatten()[torch.arange(4 * 36) // 4][:, None]
    else:
        fine = token.repeat_interleave(8, 0).repeat_interleave(8, 1)
        wanted = positions[:, fine][:, None]
    assert routes.pixels.shape == inputs["pixel_values"].shape
    assert torch.equal(routes.pixels, wanted.expand_as(routes.pixels))
    assert [len(routes.rows[site]) for site in (ROWS, PROJECTED)] == [4, 4]
    for image in range(4):
        patches = positions[image][token.flatten()]
        if family == "llava":
            patches = torch.cat([torch.tensor([NOWHERE]), patches])  # the class token
        assert torch.equal(routes.rows[ROWS][image], patches)
        assert torch.equal(routes.rows[PROJECTED][image], positions[image])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_and_frozen_weights_give_the_same(family: str) -> None:
    inputs = make_inputs(family, images=2, seed=3)
    exact = measure_routes(tiny(family), inputs)
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in inputs.items()}
    frozen = build(family).requires_grad_(False)
    for model, cast in ((build(family, dtype=torch.bfloat16), half), (frozen, inputs)):
        found = measure_routes(HookedVLM(model), cast)
        assert torch.equal(found.pixels, exact.pixels)
        for site, rows in exact.rows.items():
            assert all(map(torch.equal, found.rows[site], rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_attention_on_a_pixel_reaches_several(family: str) -> None:
    """Without the switch there would be no answer, so it is the switch that gives it."""
    model, inputs = tiny(family), make_inputs(family)

    def leave(*args: Any, fwd_hooks: list, **kwargs: Any) -> Any:
        kept = [(name, fn) for name, fn in fwd_hooks if name not in attention_sites(model)]
        return model.run_with_cache(*args, fwd_hooks=kept, **kwargs)

    leaky: Any = copy.copy(model)
    leaky.run_with_cache = leave
    assert (measure_routes(leaky, inputs).pixels == SEVERAL).float().mean() > 0.5


# --- a planted map from sources to positions -----------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_planted_map_is_found(data: st.DataObject) -> None:
    batch, length, n_sources = (data.draw(st.integers(1, n)) for n in (3, 9, 12))
    reached = st.lists(st.integers(0, batch * length - 1), max_size=2, unique=True)
    planted = [data.draw(reached) for _ in range(n_sources - 1)] + [[batch * length - 1]]
    source = torch.randn(n_sources, requires_grad=True)
    weights = torch.randn(n_sources, 5)
    residual = torch.randn(batch * length, 5)
    for i, positions in enumerate(planted):
        for position in positions:
            residual = residual.index_add(
                0, torch.tensor([position]), source[i] * weights[i : i + 1]
            )
    (found,) = positions_reached(residual.reshape(batch, length, 5), [source])
    kind = {0: lambda p: NOWHERE, 1: lambda p: p[0], 2: lambda p: SEVERAL}
    assert found.tolist() == [kind[len(p)](p) for p in planted]


def test_sources_that_the_residual_does_not_need_reach_nowhere() -> None:
    used, unused = (torch.randn(3, requires_grad=True) for _ in range(2))
    found = positions_reached(used[None, :, None].expand(1, 3, 4), [used, unused])
    assert [f.tolist() for f in found] == [[0, 1, 2], [NOWHERE] * 3]
    with pytest.raises(GridError, match="by cross-attention"):
        positions_reached(used[None, :, None], [unused])
    with pytest.raises(GridError, match="No position of the prompt depends on a pixel"):
        positions_reached(torch.randn(1, 3, 4), [unused])


# --- what has no answer --------------------------------------------------------------------


def made_by_suite(model_type: str) -> tuple[HookedVLM, Any]:
    model = suite.build(model_type)
    return model, model.prepare([suite.picture(*suite.image_size(model))], "What is this?")


@pytest.mark.filterwarnings("ignore")
def test_a_q_former_and_a_resampler_reach_several() -> None:
    for model_type in ("blip-2", "idefics2"):
        pixels = measure_routes(*made_by_suite(model_type)).pixels
        assert (pixels == SEVERAL).float().mean() > 0.9, model_type


@pytest.mark.filterwarnings("ignore")
def test_cross_attention_has_no_position() -> None:
    model, inputs = made_by_suite("mllama")
    with pytest.raises(GridError, match="by cross-attention"):
        measure_routes(model, inputs)
    assert_untouched(model.hf_model, inputs)


def test_an_encoder_without_attention_is_refused() -> None:
    model = tiny("llava")
    sites = {n: s for n, s in model.sites.items() if n not in attention_sites(model)}
    blind: Any = copy.copy(model)
    blind.sites = sites
    with pytest.raises(GridError, match="no attention that can be switched off"):
        measure_routes(blind, make_inputs("llava"))


def test_attention_sites_are_those_of_the_encoder_that_can_be_written() -> None:
    # LLaVA's projector reads the output of block 1 of 3
    wanted = [f"vision_encoder.blocks.{i}.hook_attn_out" for i in range(2)]
    assert attention_sites(tiny("llava")) == wanted


def test_inputs_without_pixels_are_refused() -> None:
    text = {"input_ids": torch.tensor([[3, 4]]), "inputs_embeds": torch.randn(1, 2, 4)}
    assert not holds_pixels({**text, "image_embeds": torch.randn(2, 4)})
    with pytest.raises(GridError, match="hold no pixels"):
        measure_routes(tiny("llava"), text)
    many = {"image_mask": torch.ones(2, 2), "patches": torch.ones(2, 2), "pixel_values": text}
    assert pixel_name({**many, "pixel_values": torch.ones(2, 2)}) == "pixel_values"


class Packed(nn.Module):
    """A linear map with whole numbers for weights, which passes no gradient on."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole = (linear.weight.data * 100).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.weight.T.to(x.dtype)) / 100


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_without_a_gradient_are_said(frozen: bool) -> None:
    hf_model = build("llava").requires_grad_(not frozen)
    projector = hf_model.model.multi_modal_projector
    projector.linear_1 = Packed(projector.linear_1)
    with pytest.raises(NoGradientError):
        measure_routes(HookedVLM(hf_model), make_inputs("llava"))


# --- nothing is left behind ----------------------------------------------------------------


def assert_untouched(hf_model: nn.Module, inputs: Any) -> None:
    for module in hf_model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in hf_model.parameters())
    assert not inputs["pixel_values"].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(family: str) -> None:
    # a fresh model: hooks that transformers sets on a model's first run are its own
    model, inputs = HookedVLM(build(family)), make_inputs(family)
    before = {name: p.clone() for name, p in model.hf_model.named_parameters()}
    kept = copy.deepcopy(inputs)
    with torch.no_grad():
        base = model(inputs)
        hooks = hook_counts(model.hf_model)
        measure_routes(model, inputs)
        assert not torch.is_grad_enabled()
        assert torch.equal(model(inputs), base)
    assert hook_counts(model.hf_model) == hooks
    assert all(p.grad is None for p in model.hf_model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.hf_model.named_parameters())
    assert all(torch.equal(inputs[name], value) for name, value in kept.items())
    assert not inputs["pixel_values"].requires_grad


def hook_counts(hf_model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in hf_model.named_modules()
    }
