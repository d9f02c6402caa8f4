"""A block's arguments, made for B prompts of P positions, fitted to rows of a growing batch.

Blocks are called with positions, rotary embeddings and masks beside the residual stream.  Which
axis of an argument is the batch and which the positions is read off its shape; where that is
ambiguous the control of such passes (`proofs`) tells.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.caches import is_cache, mask_parameter
from hooked_vlm.anatomy.source import carrier
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.masks import fitted, is_block_mask, is_causal_alone, sees_later


@dataclass(frozen=True)
class Spread:
    """An argument for all jobs of a pass, with the axis on which their prompts follow another."""

    whole: Tensor
    axis: int

    def of_first(self, n_jobs: int, of: int) -> Tensor:
        """Returns the part of the first `n_jobs` of the `of` jobs that it is for."""
        size = self.whole.shape[self.axis] // of * n_jobs
        return self.whole.narrow(self.axis, 0, size).contiguous()


@dataclass(eq=False)
class _Fitted:
    value: Any
    """What it was made of: held, so that its id stays its own."""
    whole: Tensor | Spread | None = None
    uses: int = 0
    part: tuple[int, Tensor] | None = None
    """Of how many jobs a part is wanted, and that."""


class Made:
    """What was fitted to the rows of a pass: blocks are called with the same masks and positions.

    It is made once for all jobs; of what goes with jobs, those that have joined take a part.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, _Fitted] = {}

    def once(
        self, key: Any, value: Any, make: Callable[[], Tensor | Spread], n_joined: int, of: int
    ) -> Tensor:
        """Returns what `make` returns, for the first `n_joined` of the `of` jobs it is for."""
        found = self.kept.setdefault(key, _Fitted(value))
        found.uses += 1
        if found.whole is None:
            found.whole = make()
        if not isinstance(found.whole, Spread):
            return found.whole
        if found.part is None or found.part[0] != n_joined:
            found.part = n_joined, found.whole.of_first(n_joined, of)
        return found.part[1]

    def drop_single(self) -> None:
        """Drops what one block was given so far: it may be that block's alone."""
        for found in self.kept.values():
            if found.uses < 2 and found.value is not None:
                found.whole = found.part = None


@dataclass(frozen=True)
class Fit:
    """How arguments change: more rows, and only the last positions."""

    batch: int
    length: int
    n_jobs: int
    """Of a pass, once all have joined."""
    start: int
    """The first position that rows carry."""
    made: Made = field(default_factory=Made, compare=False)
    n_joined: int | None = field(default=None, kw_only=True)
    """Jobs that have joined so far; None: all."""

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns keyword arguments for the rows; caches are left out."""
        return {n: self._named(n, value) for n, value in given.items() if not is_cache(value)}

    def positional(self, given: tuple) -> tuple:
        """Returns positional arguments for the rows."""
        return tuple(self._named("", value) for value in given)

    def _named(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            is_mask = "attention_mask" in name or _is_square(value, self.length)
            make = self._mask if is_mask else self._tensor
            return self._once(id(value), value, lambda: make(value))
        if isinstance(value, tuple | list):
            return type(value)(self._named(name, part) for part in value)
        if isinstance(value, dict):
            return {key: self._named(name, part) for key, part in value.items()}
        if is_block_mask(value):
            return self._block_mask(value)
        return value

    def _block_mask(self, mask: Any) -> Any:
        # It holds a function of the row's number and has no part for fewer rows: made anew.
        n_jobs = self.n_jobs if self.n_joined is None else self.n_joined
        return fitted(mask, self.batch, n_jobs, self.start)

    def causal(self, device: torch.device) -> Tensor:
        """Returns the mask that stands for none, where rows do not carry all positions."""
        return self._once(device, None, lambda: self._causal(device))

    def _once(self, key: Any, value: Any, make: Callable[[], Tensor | Spread]) -> Tensor:
        """Returns what is made once for a pass, for the jobs that have joined."""
        n_joined = self.n_jobs if self.n_joined is None else self.n_joined
        return self.made.once(key, value, make, n_joined, self.n_jobs)

    @property
    def hides_any(self) -> bool:
        """Whether a causal mask hides a key from a position of the rows."""
        return self.length - self.start > 1

    def require_causal(self) -> None:
        """Raises `GrowthError` unless each row sees all keys before it, and no other."""

    def _causal(self, device: torch.device) -> Tensor | Spread:
        return causal_mask(self.start, self.length, device)

    def _mask(self, mask: Tensor) -> Tensor | Spread:
        if mask.ndim == 4:
            mask = mask[:, :, self.start :]
        return self._rows(mask, 0)

    def _tensor(self, value: Tensor) -> Tensor | Spread:
        along = [axis for axis, size in enumerate(value.shape) if size == self.length]
        if not along:
            whole = value.ndim and value.shape[0] == self.batch
            return self._rows(value, 0) if whole else value
        axis = along[0]
        value = value.narrow(axis, self.start, self.length - self.start)
        return self._rows(value, axis - 1) if axis else value

    def _rows(self, value: Tensor, axis: int) -> Tensor | Spread:
        """Repeats the prompts along an axis, once for each job."""
        # Integers by token (which are of an image) are an index, which torch does not broadcast.
        per_token = self.batch == 1 and value.ndim < 4 and not value.is_floating_point()
        if value.shape[axis] == 1 and not per_token:
            return value  # torch broadcasts it to all rows
        if value.shape[axis] != self.batch:
            return value
        repeats = [1] * value.ndim
        repeats[axis] = self.n_jobs
        return Spread(value.repeat(repeats), axis)


def mask_of(args: tuple, kwargs: Mapping[str, Any], length: int) -> Any:
    """Returns the attention mask that a block was called with, by name or not.

    That is a tensor, a `BlockMask`, or None.
    """
    named = [value for name, value in kwargs.items() if "attention_mask" in name]
    square = [x for x in (*args[1:], *kwargs.values()) if _is_square(x, length)]
    found = (*named, *square)
    return next((x for x in found if isinstance(x, Tensor) or is_block_mask(x)), None)


def _is_square(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == (length, length)


def causal_mask(start: int, length: int, device: torch.device) -> Tensor:
    """Returns which keys the positions from `start` on see: `[1, 1, query, key]`, boolean."""
    queries = torch.arange(start, length, device=device)
    return (torch.arange(length, device=device) <= queries[:, None])[None, None]


def is_closed(mask: Any, start: int) -> bool:
    """Whether no position before `start` sees one from `start` on.

    Then their keys and values are the clean run's whatever happens after.  No mask: causal.
    """
    if mask is None or start == 0:
        return True
    if is_block_mask(mask):
        return not sees_later(mask, start)
    if mask.ndim != 4:
        return True  # by prompt: which keys are padding, under a causal kernel
    corner = mask[:, :, :start, start:]
    if mask.dtype == torch.bool:
        return not bool(corner.any())
    return bool((corner <= torch.finfo(mask.dtype).min / 2).all())


def fitted_call(
    block: nn.Module,
    fit: Fit,
    rows: Tensor,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    needs_mask: bool,
) -> tuple[tuple, dict[str, Any]]:
    """Returns what to call a block with for rows, from what the model calls it with for prompts.

    `needs_mask` says that a causal mask has to stand where the block is given none.

    Raises `GrowthError` for a block that takes no mask, where it needs one.
    """
    named = fit.arguments(kwargs)
    stream = carrier(block, args, kwargs)
    if stream is not None:
        named[stream] = rows
    # The last position alone sees all keys, and without a mask attention has its fastest kernels.
    if needs_mask and fit.hides_any and mask_of(args, kwargs, fit.length) is None:
        if is_causal_alone(block):
            fit.require_causal()
        elif (name := mask_parameter(block)) is None:
            raise GrowthError("its blocks take no attention mask")
        else:
            named[name] = fit.causal(rows.device)
    return (rows, *fit.positional(args[1:])) if args else (), named
