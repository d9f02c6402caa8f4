"""Cuts attention between background and objects in a vision encoder, and random keys as well."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import projected
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.hooks.names import VISION
from hooked_vlm.stimuli.geometry import Layout


CUTS = {
    "background -> objects": "attention from background to objects",
    "objects -> other objects": "attention between objects",
    "objects -> background": "attention from objects to background",
}
"""Queries and the keys that they lose, and the same in words."""


@dataclass(frozen=True)
class Encoder:
    """The attention of a vision encoder over the patches of a picture."""

    sites: tuple[str, ...]
    """The attention scores of the blocks that reach the projector."""
    prefix: int
    """Class tokens and registers before the patches."""
    side: int
    """Patches on a side of a visual token."""


def whole_attention(setting: Setting) -> Encoder:
    """Returns the attention of the setting's vision encoder.

    Raises `CannotRunError` where a block has no attention scores, or where they do not cover all
    patches of a picture (windows, tiles).
    """
    model = setting.model
    n_blocks = model.anatomy.vision.last_read + 1
    sites = [f"{VISION}.blocks.{layer}.attn.hook_attn_scores" for layer in range(n_blocks)]
    missing = [site for site in sites if site not in model.sites]
    if missing or not sites:
        raise CannotRunError(
            f"This vision encoder has no attention scores at {missing[0] if missing else VISION}, "
            "which this experiment cuts. Use a model whose vision encoder is a transformer with "
            "softmax attention."
        )
    calls: dict[str, list[list[tuple[int, ...]]]] = {site: [] for site in sites}

    def note(scores: Any, hook: Any) -> None:
        calls[hook.name].append([tuple(part.shape[-2:]) for part in scores])

    pictures = setting.stimuli.items()[:2]
    projected(setting, pictures, [(site, note) for site in sites])
    prefix, tokens = model.anatomy.vision.n_prefix, setting.geometry.shape[0]
    first = [shape[0] for call in calls[sites[0]] for shape in call]
    side = round(max(0, max(first, default=0) - prefix) ** 0.5) // tokens
    n = prefix + (side * tokens) ** 2
    for site, shapes in calls.items():
        if side < 1 or shapes != [[(n, n)] * len(pictures)]:
            found = ", ".join(f"{q}x{k}" for call in shapes for q, k in call[:3]) or "none"
            raise CannotRunError(
                f"For {len(pictures)} pictures, the attention scores at {site} are {found[:60]}; "
                "expected is one square for each picture, over all of its patches. Use a model "
                f"whose vision encoder attends without windows and tiles, and has {tokens}x{tokens}"
                " visual tokens of whole patches."
            )
    return Encoder(tuple(sites), prefix, side)


def cut_pairs(
    layout: Layout, axis: str, cut: str, prefix: int, side: int
) -> Bool[np.ndarray, "query key"]:
    """Returns which pairs of a query and a key a cut removes, over a picture's patches.

    >>> from hooked_vlm.stimuli.geometry import geometry_for
    >>> cut_pairs(geometry_for(6, 8), "horizontal", "background -> objects", 1, 2).sum(1).max()
    np.int64(12)
    """
    owner = _owners(layout, axis, prefix, side)
    query, key = owner[:, None], owner[None]
    if cut == "background -> objects":
        return (query < 0) & (key >= 0)
    if cut == "objects -> other objects":
        return (query >= 0) & (key >= 0) & (query != key)
    return (query >= 0) & (key < 0)


def _owners(layout: Layout, axis: str, prefix: int, side: int) -> np.ndarray:
    """Returns the place of each patch's object, -1 in the background and before the patches."""
    owner = np.full(layout.shape, -1)
    for place in range(3):
        owner[layout.object_region(axis, place).mask] = place
    return np.concatenate([np.full(prefix, -1), np.kron(owner, np.ones((side, side), int)).ravel()])


def random_pairs(
    cut: Bool[np.ndarray, "query key"], rng: np.random.Generator
) -> Bool[np.ndarray, "query key"] | None:
    """Returns as many pairs of each query as a cut has, among others; None where there are fewer.

    No pair is a query with itself.
    """
    others = ~cut & ~np.eye(len(cut), dtype=bool)
    sizes = cut.sum(1)
    if (others.sum(1) < sizes).any():
        return None
    found = np.zeros_like(cut)
    for size in np.unique(sizes[sizes > 0]):
        rows = np.flatnonzero(sizes == size)
        drawn = rng.random((len(rows), cut.shape[1]), dtype=np.float32)
        drawn[~others[rows]] = 2  # after all others
        keys = np.argpartition(drawn, size - 1, axis=1)[:, :size]
        found[rows[:, None], keys] = True
    return found


def cutting(
    masks: Mapping[str, Bool[np.ndarray, "#image query key"]],
) -> list[tuple[str, Callable[[Any, Any], Any]]]:
    """Returns hooks that mask attention scores `[image, head, query, key]`, by site.

    Packed encoders may give a list of scores by image.
    """

    def cut(scores: Any, hook: Any) -> Any:
        mask = torch.from_numpy(masks[hook.name])[:, None]
        if isinstance(scores, list):
            each = mask.expand(len(scores), *mask.shape[1:])
            return [_masked(part, own) for part, own in zip(scores, each, strict=True)]
        return _masked(scores, mask)

    return [(site, cut) for site in masks]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask.to(scores.device), torch.finfo(scores.dtype).min)
