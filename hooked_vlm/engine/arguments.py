"""A block's arguments, made for B prompts of P positions, fitted to rows of a growing batch.

Blocks are called with positions, rotary embeddings and masks beside the residual stream.  Which
axis of an argument is the batch and which the positions is read off its shape; where that is
ambiguous the control of such passes (`proofs`) tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.caches import is_cache, mask_parameter
from hooked_vlm.anatomy.source import carrier
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.masks import fitted, is_block_mask, is_causal_alone, sees_later


@dataclass(frozen=True)
class Fit:
    """How arguments change: more rows, and only the last positions."""

    batch: int
    length: int
    n_jobs: int
    start: int
    """The first position that rows carry."""
    made: dict[Any, tuple[Any, Tensor]] = field(default_factory=dict, compare=False)
    """What was fitted before: blocks are called with the same masks and positions."""

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns keyword arguments for the rows; caches are left out."""
        return {n: self._named(n, value) for n, value in given.items() if not is_cache(value)}

    def positional(self, given: tuple) -> tuple:
        """Returns positional arguments for the rows."""
        return tuple(self._named("", value) for value in given)

    def _named(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            is_mask = "attention_mask" in name or _is_square(value, self.length)
            if id(value) not in self.made:
                fitted = self._mask(value) if is_mask else self._tensor(value)
                self.made[id(value)] = value, fitted  # a tensor that is held keeps its id
            return self.made[id(value)][1]
        if isinstance(value, tuple | list):
            return type(value)(self._named(name, part) for part in value)
        if isinstance(value, dict):
            return {key: self._named(name, part) for key, part in value.items()}
        if is_block_mask(value):
            return self._block_mask(value)
        return value

    def _block_mask(self, mask: Any) -> Any:
        return fitted(mask, self.batch, self.n_jobs, self.start)

    def causal(self, device: torch.device) -> Tensor:
        """Returns the mask that stands for none, where rows do not carry all positions."""
        if device not in self.made:
            self.made[device] = None, self._causal(device)
        return self.made[device][1]

    def require_causal(self) -> None:
        """Raises `GrowthError` unless each row sees all keys before it, and no other."""

    def _causal(self, device: torch.device) -> Tensor:
        return causal_mask(self.start, self.length, device)

    def _mask(self, mask: Tensor) -> Tensor:
        if mask.ndim == 4:
            mask = mask[:, :, self.start :]
        return self._rows(mask, 0)

    def _tensor(self, value: Tensor) -> Tensor:
        along = [axis for axis, size in enumerate(value.shape) if size == self.length]
        if not along:
            whole = value.ndim and value.shape[0] == self.batch
            return self._rows(value, 0) if whole else value
        axis = along[0]
        value = value.narrow(axis, self.start, self.length - self.start)
        return self._rows(value, axis - 1) if axis else value

    def _rows(self, value: Tensor, axis: int) -> Tensor:
        """Repeats the prompts along an axis, once for each job."""
        # Integers by token (which are of an image) are an index, which torch does not broadcast.
        per_token = self.batch == 1 and value.ndim < 4 and not value.is_floating_point()
        if value.shape[axis] == 1 and not per_token:
            return value  # torch broadcasts it to all rows
        if value.shape[axis] != self.batch:
            return value
        repeats = [1] * value.ndim
        repeats[axis] = self.n_jobs
        return value.repeat(repeats)


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
    if needs_mask and mask_of(args, kwargs, fit.length) is None:
        if is_causal_alone(block):
            fit.require_causal()
        elif (name := mask_parameter(block)) is None:
            raise GrowthError("its blocks take no attention mask")
        else:
            named[name] = fit.causal(rows.device)
    return (rows, *fit.positional(args[1:])) if args else (), named
