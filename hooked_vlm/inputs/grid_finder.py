"""Finds the grids of images: by a rule for two common layouts, otherwise by a measurement.

A rule gives the grids of two layouts: packed images with their patch grids in another input,
and one picture of fixed size for each image.  The rule is verified by a measurement: before
the first image of a model, the rule's grid of a small image is compared with the measured
grid (`pixel_routing`).  When they differ, this model's grids are always measured.  All other
layouts (tiles, thumbnails, separators between rows) are measured once for each size of image.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooked_vlm.anatomy.model import Anatomy
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.errors import (
    GridError,
    HookedVLMWarning,
    NoGradientError,
    NoGridError,
    callers_level,
    counted,
)
from hooked_vlm.inputs.by_measurement import (
    Template,
    View,
    make_template,
    places_of,
    shows_what_it_says,
)
from hooked_vlm.inputs.by_rule import ImageLayout, token_grids
from hooked_vlm.inputs.pixel_map import pixel_transform
from hooked_vlm.inputs.pixel_routing import (
    Wrapped,
    attention_sites,
    holds_images,
    measure_routes,
    pixel_name,
)
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region


Size = tuple[int, int]
Grids = tuple[tuple[TokenGrid, ...], ...]
Process = Callable[[list[Image.Image]], dict[str, Any]]
"""From images to the model's inputs for a short prompt with these images."""


class GridFinder:
    """Finds the images of one model's inputs, and caches its measurements."""

    def __init__(self, model: Wrapped) -> None:
        self.model = model
        self.templates: dict[Any, Template] = {}
        self.shown: dict[Any, bool] = {}
        self.trusts_rule: bool | None = None
        """Whether the rule agrees with a measurement; None: not compared yet."""
        self.placeholder: str | None = None
        """The image placeholder before a prompt without a chat template; None: not known yet."""

    def by_rule(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[Size] | None = None,
        images_per_prompt: Sequence[int] | None = None,
    ) -> Grids:
        """Returns the grids that the inputs determine; raises `GridError` if they do not.

        `image_sizes` are (width, height) of the given images; without them, pixels are those of
        the processed images.  Whether the rule holds for the model is not verified here.
        """
        ids, vision = _prompt_ids(inputs), self.model.anatomy.vision
        if vision is None or not holds_images(inputs):
            return ((),) * len(ids)
        image_token = self.model.anatomy.image_token_id
        if image_token is None:
            raise GridError(
                "The model's config has no image_token_id, so no image can be found in the prompt. "
                "Use prepare(images, texts), which measures the positions."
            )
        shapes = patch_grids(inputs, vision)
        if image_sizes is not None and len(image_sizes) != len(shapes):
            raise GridError(
                f"{counted(len(image_sizes), 'image')} became "
                f"{counted(len(shapes), 'picture')} for the encoder: this model cuts images "
                "into tiles. Use prepare(images, texts), which measures their grids."
            )
        # Several patches may become one token: in the encoder, or pooled after it.
        n_tokens = int((ids == image_token).sum())
        pool = vision.merge if vision.merge > 1 else _pool(n_tokens, shapes)
        processor = getattr(self.model.processor, "image_processor", None)
        layouts = []
        for i, (rows, cols) in enumerate(shapes):
            seen = (cols * vision.patch_size, rows * vision.patch_size)
            given = image_sizes[i] if image_sizes is not None else seen
            scale, offset = pixel_transform(processor if image_sizes else None, given, seen)
            sides = rows // pool, cols // pool, rows, cols
            layouts.append(ImageLayout(*sides, given, seen, scale, offset, vision.n_prefix))
        found = token_grids(ids, image_token, layouts, images_per_prompt)
        return tuple(tuple(g for g in found if g.prompt == row) for row in range(len(ids)))

    def find(
        self,
        inputs: Mapping[str, Any],
        sizes_by_prompt: Sequence[Sequence[Size]],
        process: Process,
        key: Any = None,
    ) -> Grids:
        """Returns the grids of the images of prepared inputs, a tuple for each prompt.

        `process` makes inputs from images, with the options of the given inputs; `key`
        identifies these options.  Raises `NoGridError` when neither the rule nor a measurement
        finds a grid, and `GridError` when the numbers of images and placeholders differ.
        """
        try:
            sizes = [size for row in sizes_by_prompt for size in row]
            grids = self.by_rule(inputs, sizes, [len(row) for row in sizes_by_prompt])
        except GridError as error:
            return self._measured(inputs, sizes_by_prompt, process, key, error)
        if self.trusts_rule is None:
            self.trusts_rule = self._agrees(sizes[0], process)
        if self.trusts_rule and all(self._shows(g, process, key) for row in grids for g in row):
            return grids
        return self._measured(inputs, sizes_by_prompt, process, key, None)

    def _shows(self, grid: TokenGrid, process: Process, key: Any) -> bool:
        """Whether a rule's grid agrees with the processor, measured once per size of image.

        Only models that take one picture for each image are measured.
        """
        name = grid.image_size, key, "rule"
        if name not in self.shown:
            self.shown[name] = self._compare(grid, process)
        return self.shown[name]

    def _compare(self, grid: TokenGrid, process: Process) -> bool:
        inputs = process([noise(grid.image_size)])
        pixels = pixel_name(inputs)
        if inputs[pixels].ndim != 4 or len(inputs[pixels]) != 1:
            return True  # packed patches: the whole image is scaled
        return shows_what_it_says(grid, lambda image: process([image])[pixels])

    def _agrees(self, size: Size, process: Process) -> bool:
        """Whether the rule's grid of a small image equals the measured one, if it is measurable."""
        vision = self.model.anatomy.vision
        assert vision is not None
        if vision.packed:  # any size is possible; a size that is not square detects transposition
            side = vision.patch_size * max(vision.merge, 2)
            size = 4 * side, 3 * side
        inputs = process([noise(size)])
        if not attention_sites(self.model):
            return True  # nothing to compare with
        try:
            template = self._template(size, process)
        except NoGradientError as error:
            warnings.warn(
                f"{error} Grids follow the rule of the usual layout, which was not compared with "
                "a measurement. Check one grid with draw_regions.",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )
            return True
        except GridError:
            return False  # the measurement finds no grid, or no grid of this kind
        rule = self.by_rule(inputs, [size], [1])[0][0]
        measured = _grids(template, _image_positions(inputs, self.model.anatomy), size, 0, 0)
        same = rule.shape == measured.shape and torch.equal(rule.positions, measured.positions)
        if same and _same_patches(rule, measured):
            return True
        warnings.warn(
            f"The visual tokens of {type(self.model.hf_model).__name__} do not follow the usual "
            "layout's order; its grids are measured instead.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
        return False

    def _measured(
        self,
        inputs: Mapping[str, Any],
        sizes_by_prompt: Sequence[Sequence[Size]],
        process: Process,
        key: Any,
        reason: GridError | None,
    ) -> Grids:
        first, rows = 0, []
        for prompt, sizes in enumerate(sizes_by_prompt):
            rest = _image_positions(inputs, self.model.anatomy)[prompt]
            grids = []
            for size, template in zip(
                sizes, self._templates(sizes, len(rest), process, key, reason), strict=True
            ):
                found, rest = rest[: template.n_tokens], rest[template.n_tokens :]
                if len(found) != template.n_tokens:
                    raise GridError(
                        f"Prompt {prompt} has too few image tokens for its images "
                        f"({len(sizes)}): an image of {size[0]}x{size[1]} px has "
                        f"{template.n_tokens}. Check that the processor did not truncate it."
                    )
                grids.append(_grids(template, [found], size, prompt, first))
                first += template.n_encoder_images
            if len(rest):
                raise GridError(
                    f"Prompt {prompt} has {counted(len(rest), 'image token')} more than its images "
                    f"({len(sizes)}). Give every image that the prompt contains."
                )
            rows.append(tuple(grids))
        return tuple(rows)

    def _templates(
        self,
        sizes: Sequence[Size],
        n_tokens: int,
        process: Process,
        key: Any,
        reason: GridError | None,
    ) -> list[Template]:
        """Returns the templates of the images of one prompt, and measures those not cached.

        Some processors cut each image into fewer tiles when a prompt has several images.  If the
        templates of single images do not add up to the prompt's tokens, templates are measured
        with as many images as the prompt has.
        """
        for company in dict.fromkeys((1, len(sizes))):
            found = []
            for size in sizes:
                name = size, key, company
                try:
                    if name not in self.templates:
                        self.templates[name] = self._template(size, process, company)
                except GridError as error:
                    why = f" ({reason})" if reason else ""
                    raise NoGridError(
                        f"An image of {size[0]}x{size[1]} px has no grid here. {error}{why}"
                    ) from None
                found.append(self.templates[name])
            if sum(template.n_tokens for template in found) == n_tokens:
                break
        return found

    def _template(self, size: Size, process: Process, company: int = 1) -> Template:
        """Returns the measured template of an image, with `company` images of its size."""
        # A template is kept; tensors of the caller's inference mode would be of no use later.
        with torch.inference_mode(False), torch.no_grad():
            return self._new_template(size, process, company)

    def _new_template(self, size: Size, process: Process, company: int) -> Template:
        vision = self.model.anatomy.vision
        assert vision is not None
        inputs = process([noise(size)] * company)
        routes = measure_routes(self.model, inputs)
        name = pixel_name(inputs)
        shape = inputs[name].shape

        def pixels(image: Image.Image) -> Tensor:
            made = process([image] * company)[name]
            if made.shape != shape:
                raise GridError(
                    f"The processor cuts images of one size in different ways: {tuple(made.shape)} "
                    f"and {tuple(shape)}. Use token positions instead of regions."
                )
            return made

        if len(_prompt_ids(inputs)) != 1:
            raise GridError(
                f"The processor returned {counted(len(_prompt_ids(inputs)), 'prompt')} for one. "
                "Use token positions instead of regions."
            )
        (positions,) = _image_positions(inputs, self.model.anatomy, routes.pixels)
        patch = vision.patch_size or 1
        template = make_template(
            routes,
            places_of(pixels, size),
            size,
            positions[: len(positions) // company],
            lambda k: patch * max(isqrt(k), 1),
        )
        return replace(template, n_encoder_images=template.n_encoder_images // company)


def _same_patches(rule: TokenGrid, measured: TokenGrid) -> bool:
    """Whether the rule and the measurement give the same encoder rows for each cell."""
    if measured.patches is None:
        return True
    try:
        found = Region.everything(rule.shape).patches_by_cell(rule)
    except GridError:
        return False
    tiles, rows = measured.patches.flatten(0, 1).unbind(-1)
    return not tiles.any() and torch.equal(found.sort(-1).values, rows.sort(-1).values)


def noise(size: Size) -> Image.Image:
    """Returns a picture of noise."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _prompt_ids(inputs: Mapping[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    if ids is None:
        raise NoGridError(
            "These inputs have no input_ids: the image is not among the tokens of a prompt, so no "
            "position shows a part of the image. Use sites of the vision encoder."
        )
    return ids if ids.is_meta else ids.cpu()


def _image_positions(
    inputs: Mapping[str, Any], anatomy: Anatomy, reached: Tensor | None = None
) -> list[Tensor]:
    """Returns the positions of image tokens, prompt by prompt.

    Where the config has no image token, the image tokens are the positions `reached` by the
    pixels of a single prompt.
    """
    ids, token = _prompt_ids(inputs), anatomy.image_token_id
    if token is None and reached is not None:
        return [reached[reached >= 0].unique()]
    if token is None:
        raise NoGridError(
            "The model's config has no image_token_id, so no image can be found in the prompt. Use "
            "token positions instead of regions."
        )
    return [(row == token).nonzero().flatten() for row in ids]


def _grids(
    template: Template, positions: Sequence[Tensor], size: Size, prompt: int, first: int
) -> TokenGrid:
    """Returns the grid of an image, with its thumbnail as `overview` if there is one."""
    (tokens,) = positions
    overview = None
    for view in reversed(template.views):
        overview = _grid(view, tokens, size, prompt, first, overview)
    assert overview is not None
    return overview


def _grid(
    view: View, tokens: Tensor, size: Size, prompt: int, first: int, overview: TokenGrid | None
) -> TokenGrid:
    rows, cols = view.tokens.shape
    side = isqrt(view.patches.shape[2]) if view.patches is not None else 1
    return TokenGrid(
        positions=tokens[torch.from_numpy(view.tokens).to(tokens.device)],
        patch_rows=rows * side,
        patch_cols=cols * side,
        n_prefix=int(view.patches[..., 1].min()) if view.patches is not None else 0,
        image_size=size,
        scale=view.scale,
        offset=view.offset,
        processed_size=view.processed_size,
        prompt=prompt,
        image=first,
        patches=view.patches,
        projected=view.rows,
        overview=overview,
    )


def patch_grids(inputs: Mapping[str, Any], vision: Vision) -> list[tuple[int, int]]:
    """Returns (rows, cols) of encoder patches for each image."""
    if "image_grid_thw" in inputs:
        return [(t * h, w) for t, h, w in inputs["image_grid_thw"].tolist()]
    pixels, patch = inputs[pixel_name(inputs)], vision.patch_size
    if pixels.ndim != 4 or not patch or vision.packed:
        raise GridError(
            f"Pixels of shape {tuple(pixels.shape)} are no [image, 3, height, width] of one "
            "size, so the grids must be measured with the model's processor. Use "
            "prepare(images, texts)."
        )
    return [(pixels.shape[2] // patch, pixels.shape[3] // patch)] * len(pixels)


def _pool(n_tokens: int, patch_grids: Sequence[tuple[int, int]]) -> int:
    """Returns the side of the squares of patches pooled into one token after the encoder."""
    n_patches = sum(rows * cols for rows, cols in patch_grids)
    side = isqrt(n_patches // n_tokens) if n_tokens else 0
    if not side or side**2 * n_tokens != n_patches:
        raise GridError(
            f"The prompts hold {counted(n_tokens, 'image token')} for "
            f"{counted(len(patch_grids), 'image')} of {n_patches} patches in all; expected one "
            "token for every patch, or for every square of patches. Expand the image placeholders "
            "with the model's own processor."
        )
    return side
