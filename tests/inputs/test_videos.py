"""Frames of videos: their grids are where the pixels of each frame go, measured."""

import pytest
import torch

from conformance.tiny import tiny_config, tiny_model
from hooked_vlm.checks.laws import quiet
from hooked_vlm.errors import GridError
from hooked_vlm.hooks.names import PROJECTOR, VISION
from hooked_vlm.inputs.pixel_routing import measure_routes
from hooked_vlm.inputs.videos import frame_grids
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.model.vlm import HookedVLM


VIDEO, START, END = 40, 41, 42
SHAPES = [(3, 4, 6), (2, 6, 4)]  # frames, rows and columns of patches


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def model(request) -> HookedVLM:
    ids = {"image_token_id": 39, "video_token_id": VIDEO, "vision_start_token_id": START}
    config = tiny_config(request.param, **ids, vision_end_token_id=END)
    return HookedVLM(tiny_model(request.param, config))


def video_inputs(model: HookedVLM) -> dict[str, torch.Tensor]:
    """Inputs of two prompts with a video each, of different sizes."""
    assert model.cfg.vision is not None
    rows = []
    for t, h, w in SHAPES:
        rows.append([5, START, *[VIDEO] * (t * h * w // 4), END, 7, 8])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    patch = model.cfg.vision.patch_size
    total = sum(t * h * w for t, h, w in SHAPES)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values_videos": torch.randn(total, 3 * 2 * patch * patch),
        "video_grid_thw": torch.tensor(SHAPES),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
    }


def test_each_frame_has_a_grid_of_its_own(model: HookedVLM) -> None:
    frames = frame_grids(model, video_inputs(model))
    assert [[len(video) for video in prompt] for prompt in frames] == [[3], [2]]
    assert [frames[0][0][1].shape, frames[1][0][0].shape] == [(2, 3), (3, 2)]
    first, second = frames[0][0][:2]
    assert int(second.positions[0, 0]) == int(first.positions[-1, -1]) + 1


def test_grids_are_where_pixels_go(model: HookedVLM) -> None:
    inputs = video_inputs(model)
    with quiet():
        routes = measure_routes(model, inputs)
    length = inputs["input_ids"].shape[1]
    sites = {f"{VISION}.blocks.0.hook_resid_pre": "patches", f"{PROJECTOR}.hook_out": "projected"}
    for prompt in frame_grids(model, inputs):
        for grid in (frame for video in prompt for frame in video):
            for site, field in sites.items():
                for cell in ((0, 0), (0, grid.cols - 1), (grid.rows - 1, 0)):
                    rows = getattr(grid, field)[cell][:, 1]
                    found = routes.rows[site][grid.image][rows].unique().tolist()
                    assert found == [grid.prompt * length + int(grid.positions[cell])]


def test_a_region_of_one_frame_is_ablated_alone(model: HookedVLM) -> None:
    inputs = video_inputs(model)
    grid = frame_grids(model, inputs)[0][0][1]
    cell = grid.cells([(1, 2)])
    with quiet():
        _, before = model.run_with_cache(inputs, "hook_merged_embed")
        position = int(cell.positions(grid)[0])
        zero = [("hook_merged_embed", lambda x, hook: x.index_fill(1, torch.tensor([position]), 0))]
        _, after = model.run_with_cache(inputs, "hook_merged_embed", fwd_hooks=zero)
    moved = (before["hook_merged_embed"] != after["hook_merged_embed"]).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [position]
    assert Ablate("hook_merged_embed", at=cell)  # a region like any other


def test_what_does_not_fit_is_said(model: HookedVLM) -> None:
    inputs = video_inputs(model)
    with pytest.raises(GridError, match="no video_grid_thw"):
        frame_grids(model, {"input_ids": inputs["input_ids"]})
    inputs["video_grid_thw"] = torch.tensor([(9, 4, 6), (2, 6, 4)])
    with pytest.raises(GridError, match="18 video tokens left for a video of 9 frames"):
        frame_grids(model, inputs)
    inputs["video_grid_thw"] = torch.tensor([*SHAPES, (1, 2, 2)])
    with pytest.raises(GridError, match=r"no video tokens for 1 video\. Give"):
        frame_grids(model, inputs)
