"""Finds the frames of videos: one grid of visual tokens for every frame.

Models that take videos as packed patches (the Qwen-VL layout) get the numbers of frames, rows
and columns of patches of each video, and their prompts have one video token for every merged
patch.  A frame here is a frame of the encoder, which may combine two successive pictures into
one patch.  Regions, boxes and interventions work on a frame's grid as on an image's grid.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hooked_vlm.anatomy.parts import first_of
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.errors import GridError, NoGridError, counted
from hooked_vlm.inputs.given import follows
from hooked_vlm.inputs.pixel_routing import Wrapped
from hooked_vlm.regions.grid import TokenGrid


Frames = tuple[tuple[tuple[TokenGrid, ...], ...], ...]
"""For each prompt, for each of its videos, the grid of every frame."""


def frame_grids(model: Wrapped, inputs: Mapping[str, Any]) -> Frames:
    """Returns the grids of the frames of the videos in the inputs.

    Pixels are those of the processed video.  `grid.patches` and `grid.projected` are rows of
    the whole video, one frame after the other.

    The grids follow a rule, which is compared with a measurement once for each layout.

    Raises `GridError` when the inputs have no patch counts of the videos, or when the prompts
    have another number of video tokens, and `NoGridError` where the model does not follow the rule.
    """
    vision, ids = model.anatomy.vision, inputs["input_ids"]
    sizes = inputs.get("video_grid_thw")
    if vision is None or sizes is None:
        raise GridError(
            "These inputs hold no video_grid_thw, which has the frames, rows and columns of "
            "patches of each video. Give inputs of a processor that packs video patches."
        )
    token = first_of(model.hf_model.config, "video_token_id", "video_token_index")
    if token is None:
        raise GridError(
            "The model's config has no video_token_id, so no video can be found in the prompt. "
            "Give a model that takes videos."
        )
    rest = [tuple(row) for row in sizes.tolist()]
    found, video = [], 0
    for prompt, row in enumerate(ids):
        positions = (row == token).nonzero().flatten()
        videos = []
        while len(positions):
            if not rest:
                raise GridError(
                    f"Prompt {prompt} has {counted(len(positions), 'video token')} more than its "
                    "videos have. Give every video that the prompt contains."
                )
            frames, height, width = rest.pop(0)
            count = frames * height * width // vision.merge**2
            if len(positions) < count:
                raise GridError(
                    f"Prompt {prompt} has {counted(len(positions), 'video token')} left for a "
                    f"video of {counted(frames, 'frame')} of {height}x{width} patches, which makes "
                    f"{count}. Check that the processor did not truncate the prompt."
                )
            shape = frames, height, width
            videos.append(_frames(positions[:count], shape, vision, prompt, video))
            positions, video = positions[count:], video + 1
        found.append(tuple(videos))
    if rest:
        raise GridError(
            f"The prompts have no video tokens for {counted(len(rest), 'video')}. Give one "
            "placeholder per video in the text."
        )
    frames = [grid for videos in found for grids in videos for grid in grids]
    on_meta = ids.is_meta or model.device.type == "meta"
    if frames and not on_meta and not follows(model, inputs, frames, len(sizes)):
        raise NoGridError(
            f"The video tokens of {type(model.hf_model).__name__} do not follow the usual layout "
            "(frame after frame, each in raster order), so no frame has a grid. Use token "
            "positions instead of regions."
        )
    return tuple(found)


def _frames(
    positions: Tensor, shape: tuple[int, int, int], vision: Vision, prompt: int, video: int
) -> tuple[TokenGrid, ...]:
    frames, height, width = shape
    side = vision.merge
    rows, cols = height // side, width // side
    pixels = width * vision.patch_size, height * vision.patch_size
    sizes = {"t": frames, "row": rows, "r": side, "c": side}
    patch = torch.arange(frames * height * width)
    patch = rearrange(patch, "(t row r col c) -> t row col (r c) 1", **sizes)
    token = torch.arange(frames * rows * cols).view(frames, rows, cols, 1, 1)
    return tuple(
        TokenGrid(
            positions=positions.view(frames, rows, cols)[frame],
            patch_rows=height,
            patch_cols=width,
            n_prefix=0,
            image_size=pixels,
            scale=(1.0, 1.0),
            offset=(0.0, 0.0),
            processed_size=pixels,
            prompt=prompt,
            image=video,
            patches=_paired(patch[frame]),
            projected=_paired(token[frame]),
        )
        for frame in range(frames)
    )


def _paired(rows: Tensor) -> Tensor:
    """Returns `[row, col, k, 2]` of (image, row) within one video."""
    return torch.cat([torch.zeros_like(rows), rows], dim=-1)
