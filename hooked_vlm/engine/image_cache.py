"""Images that were encoded before: a vision encoder that runs for new ones alone.

For the length of a block the encoder's forward is stood in for.  It takes the images of a call
apart, runs the encoder on those that it has not seen, one at a time, and puts together what
comes of them: so an image is encoded once, whatever batches it comes in, and its numbers do not
depend on which images were there before it.

Which arguments go by image is read off their shapes, and how outputs are put together is found
out by trying: once for each size of images the encoder runs on a whole batch too, and everything
it returns must be what its images by themselves give, concatenated along some axis.
Where it is not (an encoder whose images see each other), batches count as a whole.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.anatomy.source import signature_of
from hooked_vlm.anatomy.vision import grid_argument
from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.fingerprints import (
    content_of,
    remember,
    shapes_of,
    ways_of_attending,
)
from hooked_vlm.hooks.stand_ins import copied, encoder_of, standing_in


BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By dtype, how far images by themselves may be from the batch, over the spread of its tokens."""
MOST = 128
"""Images, or tiles, of a batch beyond which it counts as a whole: some encoders take patches so."""

Call = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments."""


@runtime_checkable
class Store(Protocol):
    """Keeps values under keys, as long as it likes."""

    def get(self, key: Hashable) -> Any: ...
    def keep(self, key: Hashable, value: Any) -> None: ...


class Kept:
    """A store for one pass."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def get(self, key: Hashable) -> Any:
        """Returns what was kept under a key, or None."""
        return self._found.get(key)

    def keep(self, key: Hashable, value: Any) -> None:
        """Keeps a value under a key."""
        self._found[key] = value


@contextmanager
def encoding_once(model: Any, store: Store, *, repeated_only: bool = False) -> Iterator[None]:
    """Lets a model's vision encoder run once for each image, for the length of a `with` block.

    With `repeated_only` images go through together as ever where none is there twice.

    It runs as ever where what is kept would be another thing: in training, where gradients are
    wanted, and while anything is attached inside of it.
    """
    encoder = encoder_of(model) if hasattr(model, "anatomy") else None  # else an encoder itself
    if encoder is None:
        yield
        return
    stand_in = _StandIn(model, encoder, store, repeated_only)

    @wraps(stand_in.own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return stand_in.run(args, kwargs)

    with standing_in(encoder, forward):
        yield


class _StandIn:
    """Answers the calls of one encoder."""

    def __init__(self, model: Any, encoder: nn.Module, store: Store, repeated_only: bool) -> None:
        self.model, self.encoder, self.store = model, encoder, store
        self.repeated_only = repeated_only
        self.own = encoder.forward
        self.inside = [module for module in encoder.modules() if module is not encoder]
        self.forwards = [vars(module).get("forward") for module in self.inside]
        self.path = model.anatomy.vision.path

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns what the encoder returns for a call, or would within rounding."""
        if self._must_run(args, kwargs):
            return self.own(*args, **kwargs)
        calls = self._by_image(args, kwargs)
        if self.repeated_only and not _repeats(calls):
            return self.own(*args, **kwargs)
        if len(calls) > 1:
            axes = self._axes((args, kwargs), calls)
            if axes is not None:
                return joined([self._once(call) for call in calls], axes)
        return copied(self._once((args, kwargs)))

    def _must_run(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether something is attached inside the encoder, or gradients are wanted of it."""
        return (
            self.model.hf_model.training
            or (torch.is_grad_enabled() and self._is_differentiated(args, kwargs))
            or any(map(self._is_inside, self.model.hooked_sites))
            or not self._is_bare()
        )

    def _is_inside(self, site: str) -> bool:
        return f"{self.model.sites[site].module}.".startswith(f"{self.path}.")

    def _is_differentiated(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        given = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return any(x.requires_grad for x in (*self.encoder.parameters(), *given))

    def _is_bare(self) -> bool:
        """Whether modules inside the encoder are as they were when the block was entered."""
        for module, forward in zip(self.inside, self.forwards, strict=True):
            if vars(module).get("forward") is not forward:
                return False
            for fn in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                # transformers leaves hooks of its own, which collect what the encoder returns.
                if not str(getattr(fn, "__module__", "")).startswith("transformers."):
                    return False
        return True

    def _by_image(self, args: tuple, kwargs: dict[str, Any]) -> list[Call]:
        """Returns a call for each image (or tile); one alone where that cannot be told."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        sizes = self._sizes(args, kwargs)
        if not 1 < len(sizes) <= MOST:
            return [(args, kwargs)]
        columns = [_split(leaf, sizes) for leaf in leaves]
        return [pytree.tree_unflatten(list(row), spec) for row in zip(*columns, strict=True)]

    def _sizes(self, args: tuple, kwargs: dict[str, Any]) -> list[int]:
        """Returns how many rows of pixels each image has."""
        named = signature_of(type(self.encoder).forward).bind(self.encoder, *args, **kwargs)
        pixels = _pixels(args, kwargs)
        if pixels is None:
            return []
        grid = named.arguments.get(grid_argument(self.encoder) or "")
        if grid is None or len(grid) == len(pixels):
            return [1] * len(pixels)
        each = torch.as_tensor(grid)
        sizes = [int(n) for n in each.prod(-1).tolist()] if each.ndim == 2 else []
        return sizes if sum(sizes) in pixels.shape else []

    def _changed(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """Returns a call whose images are no longer the same."""
        pixels = _pixels(args, kwargs)
        assert pixels is not None  # else no image is distinguished
        axis = list(pixels.shape).index(sum(self._sizes(args, kwargs)))
        ramp = torch.linspace(0, 1, pixels.shape[axis]).to(pixels)
        changed = pixels + ramp.view(-1, *[1] * (pixels.ndim - axis - 1))
        return pytree.tree_map(lambda x: changed if x is pixels else x, (args, kwargs))

    def _run(self, call: Call) -> Any:
        """Returns what the encoder returns for a call."""
        args, kwargs = call
        return self.own(*args, **kwargs)

    def _once(self, call: Call) -> Any:
        """Returns what the encoder returned for a call the first time; not to be written to."""
        key = ("encoded", content_of(call), ways_of_attending(self.encoder))
        found = self.store.get(key)
        if found is None:
            # In a tuple: what was returned may be nothing.
            found = (copied(self._run(call)),)
            self.store.keep(key, found)
        return found[0]

    def _axes(self, whole: Call, calls: Sequence[Call]) -> Sequence[int | None] | None:
        """Returns the axis along which images lie, for every part of the output, if they do."""
        # However many there are: what two images do not tell each other, more do not either.
        shapes = frozenset(shapes_of(call) for call in calls)
        kind = ("images apart", shapes, ways_of_attending(self.encoder))

        def find_out() -> Sequence[int | None] | None:
            tried, encode = (whole, calls), self._once
            if len({content_of(call) for call in calls}) == 1:
                # The same image several times tells nothing about others: made-up ones do.
                made_up = self._changed(*whole)
                tried, encode = (made_up, self._by_image(*made_up)), self._run

            def find_axes() -> Sequence[int | None] | None:
                return axes_of(self._run(tried[0]), [encode(call) for call in tried[1]])

            try:
                return attempt(find_axes, "images could not be encoded one by one")
            except GrowthError:  # an encoder may raise anything where it is given a part
                return None

        return remember(self.model, kind, find_out)


def _pixels(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns what an encoder is called with for its images: the first tensor of real numbers."""
    tensors = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    return next((x for x in tensors if x.is_floating_point() and x.ndim), None)


def _repeats(calls: Sequence[Call]) -> bool:
    """Whether an image may be there twice, by the sums of pixels: one answer from a device."""
    pixels = [
        [x.double().sum() for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
        for call in calls
    ]
    sums = torch.stack([torch.stack(own).sum() for own in pixels if own]) if pixels else None
    return sums is not None and len(set(sums.tolist())) < len(calls)


def _split(leaf: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """Returns an argument's part for each image; all of it, where it does not go by image."""
    if isinstance(leaf, Tensor) and leaf.ndim:
        if sum(sizes) in leaf.shape:
            return leaf.split(list(sizes), list(leaf.shape).index(sum(sizes)))
        if len(leaf) == len(sizes):
            return leaf.split(1)
    return (leaf,) * len(sizes)


def axes_of(whole: Any, parts: Sequence[Any]) -> tuple[int | None, ...] | None:
    """Returns the axis along which parts make up a whole, for each of its leaves, if they do.

    None for a leaf stands for one that all have alike.
    """
    leaves, spec = pytree.tree_flatten(whole)
    flat = [pytree.tree_flatten(part) for part in parts]
    if any(other != spec for _, other in flat):
        return None
    axes = []
    for leaf, *own in zip(leaves, *(found for found, _ in flat), strict=True):
        axis = _axis_of(leaf, own)
        if axis == -1:
            return None
        axes.append(axis)
    return tuple(axes)


def _axis_of(whole: Any, parts: Sequence[Any]) -> int | None:
    """Returns a leaf's axis, None where all have it alike, and -1 where it is neither."""
    if not isinstance(whole, Tensor):
        return None if all(part == whole for part in parts) else -1
    if all(part.shape == whole.shape and torch.equal(part, whole) for part in parts):
        return None
    for axis in range(whole.ndim):
        rest = [part.shape[:axis] + part.shape[axis + 1 :] for part in parts]
        if any(shape != whole.shape[:axis] + whole.shape[axis + 1 :] for shape in rest):
            continue
        if sum(part.shape[axis] for part in parts) == whole.shape[axis] and _is_near(
            torch.cat(list(parts), axis), whole
        ):
            return axis
    return -1


def _is_near(found: Tensor, whole: Tensor) -> bool:
    if not whole.is_floating_point():
        return torch.equal(found, whole)
    wide = torch.promote_types(whole.dtype, torch.float32)
    x, y = found.to(wide), whole.to(wide)
    # What all tokens have in common would make any of them look near to any other.
    spread = (y - y.flatten(0, -2).mean(0)).norm() if y.ndim > 1 else y.norm()
    return bool((x - y).norm() <= BOUNDS.get(whole.dtype, 1e-1) * spread)


def joined(outputs: Sequence[Any], axes: Sequence[int | None]) -> Any:
    """Returns outputs for single images as one for all of them, in memory of its own."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    leaves = [
        copied(column[0]) if axis is None else torch.cat(column, axis)
        for axis, *column in zip(axes, *(found for found, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(leaves, flat[0][1])
