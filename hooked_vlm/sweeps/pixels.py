"""Attribution of a score to the pixels of the pictures: gradients, integrated or not.

The encoder's input is a tensor of pixels: images `[…, channel, row, col]`, or the patches of all
images packed into one sequence.  Its attributions become a map of each image in raster order, and
sums over the cells of the image's `TokenGrid`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.anatomy.source import signature_of
from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.arguments.kinds import Count, Model
from hooked_vlm.errors import GridError, HookedVLMError, InterventionError, counted
from hooked_vlm.hooks.gradients import explained, frozen, require_differentiable
from hooked_vlm.hooks.patch_order import PackedLayout, layout_of_call, to_images
from hooked_vlm.hooks.stand_ins import uncached
from hooked_vlm.inputs.pixel_routing import pixel_name
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.sweeps.attribution import owners_of
from hooked_vlm.sweeps.gradients import Metric, one_score, require_unhooked, wide
from hooked_vlm.sweeps.integrated import broadcasts


_REMEDY = "A metric must not write into its logits: take logits.clone()."


@dataclass(frozen=True, eq=False, repr=False)
class PixelAttribution(OneLine):
    """What each pixel adds to a score, over what the baseline's pixels give."""

    values: Tensor
    """In the shape of the model's own tensor of pixels."""
    maps: tuple[Float[Tensor, "_ _"], ...]
    """One for each image (each tile of a tiled one) in the encoder's order, in raster order and
    summed over channels: by pixel, or by patch where `by_patch`.  Images of padding have none."""
    cells: tuple[Float[Tensor, "_ _"], ...]
    """One for each picture that has a `TokenGrid`, in the order of prompts: sums over its cells."""
    by_patch: bool
    """Whether maps have an entry for each patch: where pixels are in one is not known."""
    score: Float[Tensor, " batch"]
    """The metric of the run."""
    baseline_score: Float[Tensor, " batch"]
    """The metric of the run with the baseline's pixels."""
    gap: Float[Tensor, " batch"]
    """What the values miss of the difference of the two scores, by prompt; 0 if complete."""
    steps: int
    """Number of points on the line; 1 for the plain gradient."""


@checked(InterventionError, but=("baseline",))
def pixel_attribution(
    model: Model,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    integrated: bool = True,
    baseline: Any = "zero",
    steps: Count = 32,
    **forward_kwargs: Any,
) -> PixelAttribution:
    """Returns the attribution of a score to the pixels of the pictures.

    `metric` takes logits and returns a score `[batch]`.  With `integrated=False` it is the gradient
    times the pixels less the baseline, from one backward pass; else integrated gradients with
    `steps` of them.  A baseline is `"zero"` (of the processed pixels: the grey that a processor
    maps to zero), `"mean"` of each channel (of each feature, where patches are packed), a tensor
    that broadcasts to the pixels, or other inputs whose pixels have the same shape.

    The thumbnail of a picture cut into tiles is in `maps` and not in `cells`.

    Raises `GridError` for inputs without pixels, and `InterventionError` as `integrated_gradients`
    does.  Source: Sundararajan, Taly and Yan (2017).

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> found = pixel_attribution(model, inputs, lambda logits: logits[:, -1, 5], steps=2)
    >>> found.maps[0].shape, found.cells[0].shape, inputs.grid.shape
    (torch.Size([64, 96]), torch.Size([4, 6]), (4, 6))
    """
    require_unhooked(model)
    require_differentiable(model.hf_model, "attribution", InterventionError)
    name = pixel_name(inputs)
    pixels = inputs[name].detach()
    base = _pixel_baseline(pixels, name, baseline)
    delta = wide(pixels) - wide(base)
    run = _Run(model, inputs, name, one_score(metric), forward_kwargs)
    # 1. The gradient at points of the line from the baseline to the picture.
    points = [(step + 0.5) / steps for step in range(steps)] if integrated else [1.0]
    total = torch.zeros_like(delta)
    for point in points:
        total += wide(run.gradient((wide(base) + point * delta).to(pixels.dtype)))
    values = delta * total / len(points)
    score, base_score = run.score(pixels), run.baseline_score(base)
    # 2. Maps of the images, and sums over prompts and cells.
    by_image = _Images(model, inputs, pixels, run.layout)
    maps = by_image.maps(values)
    sums = torch.stack([m.sum() for m in maps]).to(score)
    owner = by_image.owners(len(score)).to(score.device)
    gap = score - base_score - torch.zeros_like(score).index_add_(0, owner, sums)
    cells = tuple(by_image.folded(grid, maps) for grid in by_image.grids)
    by_patch = by_image.by_patch
    return PixelAttribution(values, maps, cells, by_patch, score, base_score, gap, len(points))


class _Run:
    """Runs of a model on pixels that take the place of its inputs' own."""

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        name: str,
        metric: Metric,
        forward_kwargs: Mapping[str, Any],
    ) -> None:
        self.model, self.inputs, self.name, self.metric = model, inputs, name, metric
        self.options = {**uncached(model.hf_model), **forward_kwargs}
        self.layout: PackedLayout | None = None
        """The order of packed patches, once it has run."""

    def score(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return wide(self._run(pixels))

    def baseline_score(self, pixels: Tensor) -> Tensor:
        try:
            return self.score(pixels)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, HookedVLMError):
                raise
            raise InterventionError(
                "The model does not run on the baseline's pixels: "
                f"{str(error).splitlines()[0][:160]} Some models take a picture of zeros for "
                "padding. Use baseline='mean' or another picture."
            ) from error

    def gradient(self, pixels: Tensor) -> Tensor:
        model = self.model
        with torch.enable_grad(), model.turn(), frozen(model.hf_model):
            leaf = pixels.detach().requires_grad_(True)
            with explained(InterventionError, _REMEDY):
                score = self._run(leaf)
                if not score.requires_grad:
                    raise InterventionError(
                        "No gradient gets from the score to the pixels: the metric has none (take "
                        "no argmax, .item() or .detach()), or the model passes none on (quantised "
                        "layers). Compare runs with other pictures instead."
                    )
                (found,) = torch.autograd.grad(score.sum(), [leaf], allow_unused=True)
        if found is None:
            raise InterventionError(
                "The score does not depend on the pixels, as far as gradients tell. Check that the "
                "metric reads positions after the picture."
            )
        return found

    def _run(self, pixels: Tensor) -> Tensor:
        vision = self.model.require_vision() and self.model.anatomy.vision
        if self.layout is not None or vision is None or not vision.packed:
            return self._scored(pixels)
        encoder = self.model.hf_model.get_submodule(vision.path)
        signature = signature_of(type(encoder).forward)

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            arguments = signature.bind(module, *args, **kwargs).arguments
            self.layout = layout_of_call(module, arguments, vision)

        handle = encoder.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            return self._scored(pixels)
        finally:
            handle.remove()

    def _scored(self, pixels: Tensor) -> Tensor:
        given = {**self.inputs, self.name: pixels}
        with self.model.eager():
            return self.metric(self.model.forward(given, **self.options))


def _pixel_baseline(pixels: Tensor, name: str, baseline: Any) -> Tensor:
    """Returns a baseline in the shape of the pixels; padding images keep their zeros."""
    real = _is_real(pixels)
    if isinstance(baseline, str) and baseline == "zero":
        return torch.zeros_like(pixels)
    if isinstance(baseline, str) and baseline == "mean":
        kept = 1 if pixels.ndim > 3 else -1
        rows = wide(pixels.flatten(0, -4)[real] if pixels.ndim > 3 else pixels.flatten(0, -2))
        axes = [axis for axis in range(rows.ndim) if axis != kept % rows.ndim]
        given: Any = rows.mean(axes)
        given = given[:, None, None] if pixels.ndim > 3 else given
    else:
        given = baseline.get(name) if isinstance(baseline, Mapping) else baseline
    if broadcasts(given, pixels):
        whole = given.to(pixels.device, pixels.dtype).expand_as(pixels)
        if bool(real.all()):
            return whole
        keep = real.reshape(*pixels.shape[:-3], 1, 1, 1)
        return torch.where(keep, whole, 0)
    raise InterventionError(
        f"baseline={shown(baseline)} does not fit {name} of shape {tuple(pixels.shape)}. Give "
        "'zero', 'mean', a tensor that broadcasts to it, or inputs with a picture of equal size."
    )


def _is_real(pixels: Tensor) -> Tensor:
    """Returns which images are no padding: processors pad prompts of fewer tiles with zeros."""
    if pixels.ndim < 5:
        n_images = pixels.shape[:-3].numel() if pixels.ndim == 4 else 1
        return torch.ones(n_images, dtype=torch.bool, device=pixels.device)
    return pixels.flatten(0, -4).flatten(1).any(1)


class _Images:
    """The images in a tensor of pixels, in the encoder's order, and the grids of the pictures."""

    def __init__(
        self, model: Any, inputs: Mapping[str, Any], pixels: Tensor, layout: PackedLayout | None
    ) -> None:
        self.model, self.inputs, self.layout = model, inputs, layout
        self.shape, self.real = pixels.shape, _is_real(pixels)
        self.patch_size: int = model.require_vision().patch_size or 1
        self.axes: tuple[int, ...] | None = None
        if pixels.ndim < 4 and layout is not None:
            self.axes = _patch_axes(model, pixels.shape[-1])
        self.by_patch = pixels.ndim < 4 and self.axes is None
        try:
            self.grids = [grid for row in model.grids(inputs) for grid in row]
        except GridError:
            self.grids = []

    def maps(self, values: Tensor) -> tuple[Tensor, ...]:
        """Returns a map of each image in raster order."""
        if values.ndim > 3:
            images = values.flatten(0, -4).sum(1)[self.real]
            if self.layout is None:
                return tuple(images)
            side = self.patch_size  # images of different sizes are padded to one
            sizes = [(rows * side, cols * side) for _, rows, cols in self.layout.shapes]
            return tuple(m[:h, :w] for m, (h, w) in zip(images, sizes, strict=True))
        if self.layout is None:  # patches by image, in raster order
            patches = values if values.ndim == 3 else values[None]
            return tuple(_squared(patch.sum(-1)) for patch in patches)
        rows = values.flatten(0, -2)
        images = to_images(rows, self.layout.order("patches", len(rows)))
        return tuple(map(self._map_of_patches, images, self.layout.shapes))

    def _map_of_patches(self, image: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Returns the patches of one image, each as a picture if its axes are known."""
        frames, height, width = shape
        side = round((len(image) / (frames * height * width)) ** 0.5)  # grids of merged patches
        sizes = {"t": frames, "h": height * side, "w": width * side}
        grid = rearrange(image, "(t h w) feature -> t h w feature", **sizes).sum(0)
        if self.axes is None:
            return grid.sum(-1)
        grid = grid.unflatten(-1, self.axes).flatten(2, -3).sum(2)  # over channels and frames
        return rearrange(grid, "h w row col -> (h row) (w col)")

    def owners(self, batch: int) -> Tensor:
        """Returns the prompt of each image."""
        n_images = len(self.layout.shapes) if self.layout else int(self.real.sum())
        if len(self.shape) > 4 and self.shape[0] == batch:  # by prompt
            return torch.arange(batch).repeat_interleave(len(self.real) // batch)[self.real.cpu()]
        return owners_of(self.model, self.inputs, "image patch", n_images, batch)

    def folded(self, grid: TokenGrid, maps: Sequence[Tensor]) -> Tensor:
        """Returns the sums of maps over the cells of a picture's grid."""
        tiles = 1 if grid.patches is None else int(grid.patches[..., 0].max()) + 1
        if grid.image + tiles > len(maps):
            raise InterventionError(
                f"The pixels hold {counted(len(maps), 'image')}, and the grid of a picture needs "
                f"{grid.image + tiles}: this model leaves images out in a way that is not known. "
                "Attribute to vision_projector.hook_out instead."
            )
        if grid.patches is None:
            image = maps[grid.image]
            if not self.by_patch:  # without the padding that fills a batch
                width, height = grid.processed_size
                image = image[:height, :width]
            return _pooled(image, grid.rows, grid.cols)
        # The encoder's rows of each cell, in all tiles of the picture.
        side = 1 if self.by_patch else self.patch_size
        by_tile = [
            _pooled(m, m.shape[0] // side, m.shape[1] // side).flatten()
            for m in maps[grid.image : grid.image + tiles]
        ]
        width = max(map(len, by_tile))
        every = torch.stack([nn.functional.pad(tile, (0, width - len(tile))) for tile in by_tile])
        tile, patch = grid.patches.to(every.device).unbind(-1)
        return every[tile, patch - grid.n_prefix].sum(-1)


def _squared(patches: Tensor) -> Tensor:
    """Returns patches as a map: a square where their number is one."""
    side = round(len(patches) ** 0.5)
    return patches.reshape(side, side) if side * side == len(patches) else patches[None]


def _patch_axes(model: Any, n_features: int) -> tuple[int, ...] | None:
    """Returns the axes of a packed patch: those that the patch embedding's convolution reads."""
    path = model.anatomy.vision.patch_embed
    module = model.hf_model.get_submodule(path) if path else nn.Module()
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            axes = tuple(part.weight.shape[1:])
            if torch.Size(axes).numel() == n_features:
                return axes
    return None


def _pooled(image: Tensor, rows: int, cols: int) -> Tensor:
    """Returns the sums of a map over a grid of equal cells."""
    for axis, cells in ((0, rows), (1, cols)):
        n = image.shape[axis]
        cell = torch.arange(n, device=image.device) * cells // n
        shape = [*image.shape]
        shape[axis] = cells
        image = image.new_zeros(shape).index_add_(axis, cell, image)
    return image
