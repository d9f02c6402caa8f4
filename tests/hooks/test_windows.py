"""Window attention reorders patches inside the encoder; users see raster order all the same."""

import warnings

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from helpers.tiny_models import _TEXT, END, IMAGE, START
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.hooks.patch_order import window_index
from hooked_vlm.model.vlm import HookedVLM


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 48,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 8,
            "intermediate_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 2, 2],
                "rope_theta": 10000.0,
            },
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    return HookedVLM(Qwen2_5_VLForConditionalGeneration(config).eval(), name="tiny Qwen2.5-VL")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """One prompt with two images of different sizes, each of several windows."""
    ids = torch.tensor([[5, START, *[IMAGE] * 12, END, 7, START, *[IMAGE] * 6, END, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(48 + 24, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 6, 8], [1, 4, 6]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def test_windows_do_reorder_here(model: HookedVLM, inputs: dict) -> None:
    encoder = model.hf_model.get_submodule("model.visual")
    order = window_index(encoder, inputs["image_grid_thw"])
    assert order is not None and not torch.equal(order, torch.arange(18))


def test_projector_row_i_is_visual_token_i(model: HookedVLM, inputs: dict) -> None:
    names = ["vision_projector.hook_out", "hook_merged_embed"]
    _, cache = model.run_with_cache(inputs, names)
    rows = torch.cat(list(cache["vision_projector.hook_out"]))
    assert torch.equal(rows, cache["hook_merged_embed"][inputs["input_ids"] == IMAGE])


def test_block_inputs_are_the_patches_in_raster_order(model: HookedVLM, inputs: dict) -> None:
    names = ["vision_encoder.hook_patch_embed", "vision_encoder.blocks.0.hook_resid_pre"]
    _, cache = model.run_with_cache(inputs, names)
    for patches, residual in zip(*(cache[name] for name in names), strict=True):
        assert torch.equal(patches, residual)


def test_every_site_writes_back_exactly_and_takes_effect(model: HookedVLM, inputs: dict) -> None:
    def copied(value, hook):
        return [v.clone() for v in value] if isinstance(value, list) else value.clone()

    def moved(value, hook):
        if isinstance(value, list):
            return [v * 1.5 + 0.1 * torch.randn_like(v) for v in value]
        return value * 1.5 + 0.1 * torch.randn_like(value)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)  # patterns run eager attention
        for name in model.sites:
            read = model.run_with_hooks(inputs, [(name, lambda value, hook: None)])
            assert torch.equal(model.run_with_hooks(inputs, [(name, copied)]), read), name
            assert not torch.equal(model.run_with_hooks(inputs, [(name, moved)]), read), name
