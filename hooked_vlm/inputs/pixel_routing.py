"""Measures which position of the prompt each pixel reaches, for any layout.

Processors tile, pad, pool, insert separators and append thumbnails in different ways.
Instead of a rule for every family, the route of a pixel is measured on the model.  With the
vision encoder's attention switched off (`attn_out` is zero in every block), no information
moves between patches, so a visual token depends only on its own pixels.

Position p of the prompt gets weight 1 where bit b of p is set, and weight 0 otherwise.  The
gradient of the weighted sum, divided by the gradient of the unweighted sum, is bit b of the
position that a pixel reaches.  One forward pass and log2(positions) backward passes give the
positions of all pixels, exactly, in any dtype.  A pixel that reaches several positions (a
Q-former, a resampler) gives a ratio other than 0 and 1, and is marked `SEVERAL`.

The rows of the encoder and the projector are measured in the same way.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooked_vlm.anatomy.model import Anatomy
from hooked_vlm.anatomy.parts import is_linear
from hooked_vlm.errors import GridError, HookedVLMError, NoGradientError
from hooked_vlm.hooks.checkpointing import evaluating, is_checkpointed
from hooked_vlm.hooks.names import PROJECTOR, VISION, site_path
from hooked_vlm.hooks.patch_order import VisionActivation, each
from hooked_vlm.hooks.sites import Site


NOWHERE, SEVERAL = -1, -2
_SURE = 0.05
"""Largest distance of a gradient ratio from 0 or 1 that counts as a rounding error."""


@runtime_checkable
class Wrapped(Protocol):
    """The parts of a HookedVLM that preparing inputs needs."""

    hf_model: nn.Module
    processor: Any
    anatomy: Anatomy
    sites: dict[str, Site]

    @property
    def device(self) -> torch.device: ...

    def run_with_cache(
        self, inputs: Mapping[str, Any], names_filter: Any, **kwargs: Any
    ) -> Any: ...

    def without_hooks(self) -> AbstractContextManager[None]: ...


@contextmanager
def measuring(without_hooks: AbstractContextManager[None]) -> Iterator[None]:
    """Runs a measurement that is cached: without the user's hooks, and with gradients.

    Tensors made in the caller's inference mode have no gradient in here either: copy them.
    """
    with without_hooks, torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(frozen=True, eq=False)
class Routes:
    """For each element of the pixel tensor, and each row of a site, the position it reaches.

    Positions count through the whole batch (prompt times length plus position).  `NOWHERE`
    marks elements that reach no position (padding, class tokens), `SEVERAL` those that reach
    more than one.
    """

    pixels: Int[Tensor, "..."]
    rows: dict[str, list[Int[Tensor, " _"]]]
    """By site, then by image in the encoder's order."""


@dataclass(eq=False)
class _Capture:
    """A hook function that keeps a site's values as part of the graph, call by call."""

    tensors: list[Tensor] = field(default_factory=list)

    def __call__(self, value: Any, hook: Any) -> Any:
        kept = [v.clone() for v in value]  # image by image, a tensor or a list
        self.tensors += kept
        return kept if isinstance(value, list) else torch.stack(kept)


def attention_sites(model: Wrapped) -> list[str]:
    """Returns the sites through which information moves between the encoder's patches."""
    return _in_encoder(model, "hook_attn_out", "hook_cross_attn_out")


def _in_encoder(model: Wrapped, *leaves: str) -> list[str]:
    """Returns the sites of the encoder's blocks with these names that can be written."""
    return [
        name
        for name, site in model.sites.items()
        if site_path(name).tower == VISION and site_path(name).leaf in leaves and not site.read_only
    ]


def holds_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether the inputs contain an image or a video."""
    return bool(_pixel_names(inputs))


def holds_images(inputs: Mapping[str, Any]) -> bool:
    """Whether the inputs contain an image; the pixels of a video are none."""
    return any("video" not in name for name in _pixel_names(inputs))


def _pixel_names(inputs: Mapping[str, Any]) -> list[str]:
    named = [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim > 1
        and ("pixel" in name or "patch" in name or "image" in name)
        and "embeds" not in name
    ]
    return sorted(named, key=lambda name: ("pixel" not in name, "image" not in name, name))


def pixel_name(inputs: Mapping[str, Any]) -> str:
    """Returns the name of the tensor that holds the pixels; raises `GridError` without one."""
    found = _pixel_names(inputs)
    if not found:
        raise GridError(
            "These inputs hold no pixels, so there is no image to find in the prompt. Give inputs "
            "with pixel_values."
        )
    return found[0]


def measure_routes(model: Wrapped, inputs: Mapping[str, Any]) -> Routes:
    """Returns the prompt positions that pixels, encoder rows and projected tokens reach.

    Raises `GridError` when the encoder's attention cannot be switched off, or when no
    position of the prompt depends on a pixel (cross-attention).  Raises `NoGradientError` when
    a layer between pixels and prompt has no gradient (a quantised layer).  The user's hooks do
    not run.
    """
    attention = attention_sites(model)
    if not attention:
        raise GridError(
            "The vision encoder has no attention that can be switched off (it is convolutional, or "
            "of an unknown kind), so the route of a pixel cannot be measured. Use token positions "
            "instead of regions."
        )
    captures = {
        name: _Capture()
        for name in (f"{VISION}.blocks.0.hook_resid_pre", f"{PROJECTOR}.hook_out")
        if name in model.sites
    }
    try:
        with evaluating(model.hf_model):
            found = _reached(model, inputs, attention, captures)
    except HookedVLMError:
        raise
    except (ValueError, IndexError, TypeError) as error:
        raise GridError(
            f"The model refuses what its processor made: {str(error).strip()[:120]}. Its "
            "config.json and the processor's files are not of one model."
        ) from error
    except RuntimeError as error:  # torch raises it for an operation without a derivative
        raise NoGradientError(
            "The route of a pixel could not be measured by its gradient: "
            f"{str(error).strip()[:200]}{_remedy(model.hf_model)}"
        ) from error
    sites, start = {}, 1
    for name, capture in captures.items():
        rows = found[start : start + len(capture.tensors)]
        sites[name] = [_of_rows(row) for row in rows]
        start += len(capture.tensors)
    return Routes(found[0], sites)


def _reached(
    model: Wrapped,
    inputs: Mapping[str, Any],
    attention: list[str],
    captures: Mapping[str, _Capture],
) -> list[Tensor]:
    """Returns the positions that the pixels reach, then those that captured rows reach."""
    key = pixel_name(inputs)
    if is_checkpointed(model.hf_model):
        raise NoGradientError(
            "The route of a pixel cannot be measured, because blocks inside torch's "
            "checkpoint_wrapper run again in a backward pass. Measure it before they are wrapped."
        )
    # MLPs do not mix patches; they are switched off only to save time in the backward passes.
    off = [(name, _zero) for name in [*attention, *_in_encoder(model, "hook_mlp_out")]]
    with measuring(model.without_hooks()):
        given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        pixels = given[key].detach().requires_grad_(True)
        residual, _ = model.run_with_cache(
            {**given, key: pixels},
            "hook_embed",
            stop_at_layer=0,
            fwd_hooks=[*off, *captures.items()],
        )
        captured = [t for capture in captures.values() for t in capture.tensors]
        lost = not all(tensor.requires_grad for tensor in (residual, *captured))
        if lost and _packed(model.hf_model):
            raise _no_gradient()
        found = positions_reached(residual, [pixels, *captured])
    if bool((found[0] == NOWHERE).all()) and _packed(model.hf_model):
        raise _no_gradient()
    return found


def _no_gradient() -> NoGradientError:
    return NoGradientError(
        "The route of a pixel cannot be measured, because quantised layers pass no gradient on. "
        "Load the model without quantisation to measure it."
    )


def _remedy(model: nn.Module) -> str:
    if any(p.is_inference() for p in (*model.parameters(), *model.buffers())):
        return " Load the model outside torch.inference_mode(): its weights have no gradient."
    return ""


def _packed(model: nn.Module) -> bool:
    """Whether a linear map of the model has packed weights, which have no gradient."""
    return any(
        is_linear(part) and not any(p.is_floating_point() for p in part.parameters())
        for part in model.modules()
    )


def _zero(value: VisionActivation, hook: Any) -> VisionActivation:
    return each(torch.zeros_like, value)


def positions_reached(residual: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """Returns, element by element, the flat position that each source reaches."""
    # A random projection gives one number per position whose gradient is not zero by chance.
    weights = torch.randn(residual.shape[-1], generator=torch.Generator().manual_seed(0))
    per_position = (residual.float() * weights.to(residual.device)).sum(-1).flatten()
    index = torch.arange(len(per_position), device=residual.device)

    def gradients(total: Tensor) -> list[Tensor]:
        if not total.requires_grad:
            raise GridError(
                "No position of the prompt depends on a pixel of the image. Use sites of the "
                "vision encoder."
            )
        found = torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(s) if g is None else g.detach()
            for s, g in zip(sources, found, strict=True)
        ]

    whole = gradients(per_position.sum())
    if all(not g.any() for g in whole):
        raise GridError(
            "No position of the prompt depends on a pixel of the image: the language model reads "
            "the image by cross-attention. Use sites of the vision encoder."
        )
    # One backward pass for each bit of the position.
    positions = [torch.zeros_like(g, dtype=torch.long) for g in whole]
    several = [torch.zeros_like(g, dtype=torch.bool) for g in whole]
    for bit in range(max(len(per_position) - 1, 1).bit_length()):
        part = gradients((per_position * ((index >> bit) & 1)).sum())
        for i, (g, p) in enumerate(zip(whole, part, strict=True)):
            ratio = p.double() / g.double()
            one = ratio > 0.5
            several[i] |= (ratio - one.double()).abs() > _SURE
            positions[i] += one.long() << bit
    return [
        p.masked_fill(s, SEVERAL).masked_fill(g == 0, NOWHERE)
        for p, s, g in zip(positions, several, whole, strict=True)
    ]


def _of_rows(elements: Int[Tensor, "row ..."]) -> Int[Tensor, " row"]:
    """Returns the position that each row reaches: the one on which all its features agree.

    Features that reach no position are ignored.
    """
    rows = elements.flatten(1)
    high = rows.max(dim=1).values
    low = rows.masked_fill(rows == NOWHERE, torch.iinfo(torch.long).max).min(dim=1).values
    agreed = (low == high) | (high == NOWHERE)
    return torch.where(agreed, high, SEVERAL)
