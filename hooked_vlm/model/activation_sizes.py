"""Computes the number of values at each site from sizes only; the model does not run.

A site's size is a width (features, heads), from its module or the config, times a number of
rows (positions, patches, visual tokens, or pairs of them), from the inputs.  Widths are read
once for a model.  Numbers of rows are computed once for each inputs, and only when needed.
A number that the inputs do not determine (the length of a cross-attention's source) is None.

Assumptions: prompts are as long as their ids, the encoder runs once for all images, and the
projector reads the encoder's output, folded in any way.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.parts import is_linear
from hooked_vlm.anatomy.sizes import EncoderConfig, HookedVLMConfig, StackConfig
from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.hooks.names import VISION, site_path
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.pixel_routing import holds_pixels, pixel_name


Rows = Literal[
    "position",
    "pair",
    "place",
    "bare_patch",
    "patch",
    "patch_pair",
    "window_pair",
    "token",
    "feature",
    "window",
    "source",
    "unknown",
]
"""The kinds of rows; the last three have no known number."""


@dataclass(frozen=True)
class Width:
    """The number of values in one row of a site."""

    per: Rows
    """The kind of a row: the name of a property of `Counts`."""
    numbers: int
    inside: bool
    """Whether the site is in the vision encoder or the projector."""


class Footprint:
    """The widths of a model's sites."""

    def __init__(
        self,
        hf_model: nn.Module,
        sites: Mapping[str, Site],
        cfg: HookedVLMConfig | EncoderConfig,
        vision: Vision | None,
    ) -> None:
        self.hf_model, self.sites, self.cfg, self.vision = hf_model, sites, cfg, vision
        self.full_layers = _full_layers(hf_model, vision)
        every = {**sites, **getattr(sites, "more", {})}
        self.widths = {
            name: Width(
                self._per(s) if (numbers := self._numbers(s)) else "unknown",
                numbers,
                site_path(name).is_vision,
            )
            for name, s in every.items()
        }
        self._summed: tuple[list[str], dict[Rows, tuple[int, int]]] = ([], {})
        self._bound = self.summed(list(every))

    def summed(self, names: Sequence[str]) -> dict[Rows, tuple[int, int]]:
        """Returns the sums of the sites' widths, by kind of row.

        Each is a pair: in the language model, and in the vision encoder or projector.
        Successive runs often use the same sites, so the last result is cached.
        """
        names = list(names)
        if names == self._summed[0]:
            return self._summed[1]
        found: dict[Rows, list[int]] = {}
        for name in names:
            width = self.widths[name]
            found.setdefault(width.per, [0, 0])[width.inside] += width.numbers
        self._summed = names, {per: (text, vision) for per, (text, vision) in found.items()}
        return self._summed[1]

    def at_most(self, inputs: Mapping[str, Any]) -> int:
        """Returns an upper bound of the number of values at all sites together.

        It reads only shapes, so it takes microseconds and does not wait for a GPU.  Sites of
        unknown size are left out.
        """
        batch, pos = _prompts(self.hf_model, inputs) or (0, 0)
        images, patches = _pixels(inputs, self.vision)
        rows = images * (patches + (self.vision.n_prefix if self.vision else 0))
        square = rows * rows // max(images, 1)
        read = len(self.vision.read_layers or (0,)) if self.vision else 0
        bounds = {
            "position": batch * pos,
            "pair": batch * pos**2,
            "token": max(batch * pos, rows),
            "feature": rows * read * (self.cfg.vision.d_model if self.cfg.vision else 0),
            "patch_pair": square,
            "window_pair": square,
        }
        return sum(sum(both) * bounds.get(per, rows) for per, both in self._bound.items())

    def _per(self, site: Site) -> Rows:
        axes = site.axes.split()
        square = axes[-2:] == ["query", "key"]
        if "source" in axes or (square and ".cross_attn." in site.name):
            return "source"
        if site.by_prompt:
            return "pair" if square else "position"
        if axes[0] == "window":
            return "window"
        if square:
            layer = site_path(site.name).layer
            whole = self.full_layers is None or layer in self.full_layers
            return "patch_pair" if whole else "window_pair"
        if axes[0] == "1":
            return "place"
        if site.name == f"{VISION}.hook_patch_embed":
            return "bare_patch"
        if axes[-1] == "d_features":
            return "feature"
        return "token" if "token" in axes else "patch"

    def _numbers(self, site: Site) -> int:
        axes = site.axes.split()
        tower = site.stack(self.cfg)
        if axes[-2:] == ["query", "key"]:
            return self._heads(site) or tower.n_heads
        if axes[-1] == "d_features":
            return 1
        if site.computed:
            return site.heads * self.cfg.d_model if site.heads else 1
        found = self._linear(site)
        if found:
            return found
        if site.part in ("rot_q", "rot_k", "v"):
            heads = tower.n_heads if site.part == "rot_q" else tower.n_key_value_heads
            return self._beside(site, tower) or heads * tower.d_head
        sizes = {"d_mlp": tower.d_mlp, "d_vocab": getattr(self.cfg, "d_vocab", 0)}
        sizes |= {"d_vision": tower.d_model, "d_model": self.cfg.d_model}
        return sizes.get(axes[-1]) or tower.d_model

    def _beside(self, site: Site, tower: StackConfig) -> int:
        """Returns the width of rotated queries and keys, or of values, from related linear maps."""
        if site.part != "v":
            same = self.sites.get(f"{_inside(site)}hook_{site.part[-1]}")
            return self._linear(same) if same else 0
        z = self.sites.get(f"{_inside(site)}hook_z")
        if z is None or not z.heads:
            return 0
        n_heads = tower.n_key_value_heads if "kv_head" in site.axes else z.heads
        return self._linear(z) // z.heads * n_heads

    def _heads(self, site: Site) -> int:
        z = self.sites.get(f"{_inside(site)}hook_z")
        return z.heads if z else 0

    def _linear(self, site: Site) -> int:
        """Returns the width of a linear map's site, or 0 where the module is no linear map."""
        module: Any = self.hf_model.get_submodule(site.module)
        if site.tap not in ("input", "output") or not is_linear(module):
            return 0
        if isinstance(site.layout, tuple):
            return site.layout[1] - site.layout[0]
        width = int(module.in_features if site.tap == "input" else module.out_features)
        return width // {"3hd": 3, "h3d": 3, "h2d": 2}.get(site.layout, 1)


class Counts:
    """The numbers of rows of each kind for some inputs; None where they are not determined."""

    def __init__(self, footprint: Footprint, inputs: Mapping[str, Any]) -> None:
        self._of, self._inputs = footprint, inputs

    def __getitem__(self, per: Rows) -> int | None:
        """Returns the number of rows of a kind; 0 for image rows without an image."""
        return getattr(self, per, None)

    @cached_property
    def position(self) -> int | None:
        """Positions of all prompts, including padding."""
        shape = _prompts(self._of.hf_model, self._inputs)
        return None if shape is None else shape[0] * shape[1]

    @cached_property
    def pair(self) -> int | None:
        """Pairs of a query position and a key position."""
        shape = _prompts(self._of.hf_model, self._inputs)
        return None if shape is None else shape[0] * shape[1] ** 2

    @cached_property
    def bare_patch(self) -> int:
        """Patches of all images."""
        return sum(frames * patches for frames, patches in self._images)

    @cached_property
    def patch(self) -> int:
        """Rows of the encoder: patches and the tokens before them."""
        return self.bare_patch + self._prefix * len(self._images)

    @cached_property
    def place(self) -> int:
        """Rows of the encoder for one image."""
        return self._images[0][1] + self._prefix if self._images else 0

    @cached_property
    def patch_pair(self) -> int:
        """Pairs of encoder rows that attend to each other: those of one frame."""
        return sum(frames * (patches + self._prefix) ** 2 for frames, patches in self._images)

    @cached_property
    def window_pair(self) -> int | None:
        """Pairs of rows in one attention window."""
        lengths = _window_lengths(self._of, self._grid) if self._images else ()
        return None if lengths is None else sum(length**2 for length in lengths)

    @cached_property
    def token(self) -> int:
        """Visual tokens."""
        ids, token = self._inputs.get("input_ids"), getattr(self._of.cfg, "image_token_id", None)
        if not self._images:
            return 0
        found = int((ids == token).sum()) if isinstance(ids, Tensor) and token is not None else 0
        return found or self.patch // (self._of.vision.merge if self._of.vision else 1) ** 2

    @cached_property
    def feature(self) -> int:
        """Number of values that the projector reads."""
        vision = self._of.vision
        if vision is None or not self._images:
            return 0
        config = getattr(self._of.hf_model, "config", None)
        # The option with which transformers' configs exclude the class token.
        cut = getattr(config, "vision_feature_select_strategy", None) == "default"
        rows = self.patch - (len(self._images) if cut else 0)
        return rows * vision.d_model * len(vision.read_layers or (0,))

    @cached_property
    def _prefix(self) -> int:
        return self._of.vision.n_prefix if self._of.vision else 0

    @cached_property
    def _grid(self) -> Tensor | None:
        """Frames, rows and columns of patches of each image, where the inputs have them."""
        vision = self._of.vision
        if vision is None or not vision.packed:
            return None
        video = holds_pixels(self._inputs) and "video" in pixel_name(self._inputs)
        found = next((n for n in self._inputs if _GRID.search(n) and ("video" in n) == video), None)
        if found is None or not len(self._inputs[found]):
            return None
        grid = torch.as_tensor(self._inputs[found]).cpu().long()
        grid = grid.reshape(len(grid), -1)
        grid = grid // vision.patch_size if "image_sizes" in found else grid
        return grid if grid.shape[1] == 3 else torch.cat([torch.ones_like(grid[:, :1]), grid], 1)

    @cached_property
    def _images(self) -> list[tuple[int, int]]:
        """Frames, and patches of a frame, of each image."""
        images, patches = _pixels(self._inputs, self._of.vision)
        if not images or self._grid is None:
            return [(1, patches)] * images
        found = [(frames, rows * cols) for frames, rows, cols in self._grid.tolist()]
        total = sum(frames * n for frames, n in found)
        told_merged = images == 1 and total and not patches % total  # merged
        return [(frames, n * (patches // total)) for frames, n in found] if told_merged else found


def _inside(site: Site) -> str:
    """Returns the prefix of a site's name that it shares with the other sites of its module."""
    return site.name.rpartition("hook_")[0]


def _prompts(hf_model: nn.Module | None, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the number of prompts, and their length for the decoder."""
    config = getattr(hf_model, "config", None)
    names = ("decoder_input_ids", "decoder_inputs_embeds")
    if not getattr(config, "is_encoder_decoder", False):
        names = (*names, "input_ids", "inputs_embeds")
    found = next((inputs[n] for n in names if isinstance(inputs.get(n), Tensor)), None)
    return None if found is None or found.ndim < 2 else (found.shape[0], found.shape[1])


def _pixels(inputs: Mapping[str, Any], vision: Vision | None) -> tuple[int, int]:
    """Returns the number of images, and the patches of each; packed images count as one."""
    name = pixel_name(inputs) if holds_pixels(inputs) else None
    if name is None and _prompts(None, inputs) is None:  # an encoder may use another name
        floats = (n for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point())
        name = next(floats, None)
    if vision is None or name is None:
        return 0, 0
    shape = inputs[name].shape
    if len(shape) >= 4 and vision.patch_size:
        side = vision.patch_size
        return shape[:-3].numel(), (shape[-2] // side) * (shape[-1] // side)
    together = vision.packed or len(shape) < 3
    return (1, shape[:-1].numel()) if together else (shape[0], shape[1])


_GRID = re.compile(r"grid_t?hws?$|target_sizes$|image_sizes$")


def _full_layers(hf_model: nn.Module, vision: Vision | None) -> frozenset[int] | None:
    """Returns the vision blocks without attention windows; None if no block has windows."""
    if vision is None or not vision.packed:
        return None
    encoder = hf_model.get_submodule(vision.path)
    if "window_index" not in forward_source(type(encoder).forward):
        return None
    return frozenset(getattr(encoder, "fullatt_block_indexes", ()))


def _window_lengths(footprint: Footprint, grid: Tensor | None) -> list[int] | None:
    """Returns the number of patches in each attention window, computed by transformers."""
    if footprint.vision is None or grid is None:
        return None
    encoder: Any = footprint.hf_model.get_submodule(footprint.vision.path)
    try:
        from transformers.vision_utils import get_vision_window_index

        _, bounds = get_vision_window_index(
            grid,
            spatial_merge_size=encoder.spatial_merge_size,
            window_size=encoder.window_size,
            patch_size=encoder.patch_size,
            kwargs={},
        )
    except (ImportError, AttributeError, TypeError):
        return None
    return torch.as_tensor(bounds).unique_consecutive().diff().tolist()
