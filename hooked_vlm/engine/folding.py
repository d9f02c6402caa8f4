"""Prompts about one image as one row: `[image | question 1 | question 2 | …]`.

Prompts that begin alike, image included, have the same activations there: under a causal mask
no token sees what comes after it.  So a batch of them is folded: what they share is carried once,
and each question follows it, with the positions that it has in its own prompt, under a mask by
which it sees what is shared and itself.  `Fold` says which tokens are the same, `Layout` how those
from one position on lie in rows.  What blocks are called with is fitted to the rows by `FoldedFit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.engine.arguments import Fit, Spread
from hooked_vlm.engine.attempts import GrowthError


GAIN = 0.9
"""Share of a batch's tokens that folding may leave at most; else it is not worth a mask."""


SHARE = 0.5
"""Share of its tokens that a prompt must have in common with another to go in its row."""


class FoldError(GrowthError):
    """Why prompts cannot go in one row."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Which tokens of a batch of prompts, padded on the left, are the same."""

    pads: np.ndarray
    """By prompt, how many positions come before its first token."""
    of: np.ndarray
    """By prompt, the one whose row it goes in (itself, where it is the first there)."""
    shared: np.ndarray
    """By prompt, how many of its first tokens are the same as the first tokens of prompt `of`."""
    length: int

    @classmethod
    def find(cls, hidden: Tensor, ids: Tensor, mask: Tensor | None, kept: int = 1) -> "Fold | None":
        """Returns which prompts begin with the same stream `hidden` before the first block.

        Tokens count as the same where their ids and all bits of their stream are (an image is
        what the encoder made of it).  None where no two prompts share enough, and where some of
        the last `kept` positions are padding: what that gives is another number in a common row.
        """
        pads = _left_pads(ids, mask)
        if pads is None or len(ids) < 2 or pads.max() > ids.shape[1] - kept:
            return None
        # One number for each token is compared on the host, and all of what that finds on the
        # device: so two answers are waited for, however many prompts there are.
        sums = hidden.detach().double().sum(-1)
        said = torch.stack([ids.to(sums), sums]).cpu().numpy()
        length = ids.shape[1]
        tokens = [said[:, b, pads[b] :] for b in range(len(ids))]
        of, shared = np.arange(len(ids)), np.zeros(len(ids), dtype=int)
        firsts: list[int] = []
        # The most padded first: then a shared token is never at an earlier position in `of`.
        for b in sorted(range(len(ids)), key=lambda b: -pads[b]):
            alike = [_common(tokens[b], tokens[first]) for first in firsts]
            best = int(np.argmax(alike)) if alike else 0
            if alike and alike[best] >= SHARE * (length - pads[b]):
                of[b], shared[b] = firsts[best], alike[best]
            else:
                firsts.append(b)
        found = cls(pads, of, shared, length)
        if found.paying_layout(0) is None:
            return None
        return found if bool(found.agree(hidden)) else None

    def paying_layout(self, start: int) -> "Layout | None":
        """Returns `layout(start)` where it has so many tokens fewer that it is worth a mask."""
        layout = self.layout(start)
        tokens = len(self.of) * (self.length - start)
        return layout if layout.prompts.size <= GAIN * tokens else None

    @cached_property
    def same_as(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and position `[batch, pos]` of the token that stands for each."""
        b, p = np.indices((len(self.of), self.length))
        token = p - self.pads[:, None]
        is_shared = (token >= 0) & (token < self.shared[:, None])
        return (
            np.where(is_shared, self.of[:, None], b),
            np.where(is_shared, token + self.pads[self.of][:, None], p),
        )

    @cached_property
    def _layouts(self) -> dict[int, "Layout"]:
        return {}

    def layout(self, start: int) -> "Layout":
        """Returns how the tokens from a position on lie in rows."""
        if start not in self._layouts:
            self._layouts[start] = Layout.of(self, start)
        return self._layouts[start]

    def alike(self, x: Tensor, start: int = 0) -> Tensor:
        """Returns `[batch, pos, ...]`, from `start` on, with shared tokens as in the first."""
        prompts, places = (side[:, start:] for side in self.same_as)
        return x[_index(prompts, x), _index(places - start, x)]

    def agree(self, x: Tensor, start: int = 0) -> Tensor:
        """Returns whether shared tokens of `[batch, pos, ...]`, from `start` on, have one value."""
        return (x == self.alike(x, start)).all()

    def frozen(self, start: int) -> np.ndarray:
        """Returns where a token `[batch, pos]` stands for one before `start` in another prompt.

        That prompt's rows do not carry it, so no cell may change it here.
        """
        prompts, places = self.same_as
        found = np.zeros(prompts.shape, dtype=bool)
        found[prompts[:, :start], places[:, :start]] = True
        return found


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows of a fold: which token is where, and which sees which."""

    fold: Fold
    start: int
    prompts: np.ndarray
    """`[row, column]`: the prompt of the token there; rows are filled up with their last."""
    places: np.ndarray
    """`[row, column]`: its position in that prompt."""
    rows: np.ndarray
    """`[batch, pos]`, from `start` on: the row in which a token is."""
    columns: np.ndarray
    """`[batch, pos]`: its column there."""
    kept_prompts: np.ndarray
    """`[row, key]`: tokens before `start`, whose keys and values are the clean run's."""
    kept_places: np.ndarray
    seen_as: np.ndarray
    """`[row, column, key]`: the position at which a token's own prompt has a key; -1 for none."""
    _sent: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, fold: Fold, start: int) -> "Layout":
        """Lays out the tokens from a position on."""
        # 1. Only the first of tokens that are the same gets a column; the others are read there.
        prompts, places = fold.same_as
        own_prompt, own_place = np.indices(prompts.shape)
        stands = (prompts == own_prompt) & (places == own_place)
        # 2. A row for each image: first the prompt whose tokens the others share, then the others.
        firsts = np.flatnonzero(fold.of == np.arange(len(fold.of)))
        members = [np.flatnonzero(fold.of == first) for first in firsts]
        members = [np.array([f, *m[m != f]]) for f, m in zip(firsts, members, strict=True)]
        # 3. Tokens from `start` on are carried; those before are keys, which the clean run has.
        tokens, kept = ([_tokens(stands, m, part) for m in members] for part in
                        (slice(start, None), slice(0, start)))  # fmt: skip
        carried, n_carried = _filled(tokens)
        before, n_before = _filled(kept)
        # 4. The way back, from every token of every prompt to its column: rows are unfolded by it.
        rows = np.zeros(prompts.shape, dtype=int)
        columns = np.zeros(prompts.shape, dtype=int)
        for row, found in enumerate(tokens):
            rows[found[:, 0], found[:, 1]] = row
            columns[found[:, 0], found[:, 1]] = np.arange(len(found))
        rows, columns = (x[prompts, places][:, start:] for x in (rows, columns))
        # 5. What a mask is made of: tokens of other prompts in the same row must not be seen.
        seen_as = np.concatenate(
            [_seen_as(fold, carried, *keys) for keys in ((before, n_before), (carried, n_carried))],
            axis=2,
        )
        return cls(
            fold, start, carried[..., 0], carried[..., 1], rows, columns,
            before[..., 0], before[..., 1], seen_as,
        )  # fmt: skip

    @property
    def n_rows(self) -> int:
        """Rows for one job."""
        return len(self.prompts)

    @property
    def width(self) -> int:
        """Tokens in a row."""
        return self.prompts.shape[1]

    @cached_property
    def is_even(self) -> bool:
        """Whether all rows have their tokens at the same positions, and see alike."""
        return bool(
            (self.places == self.places[:1]).all() and (self.seen_as == self.seen_as[:1]).all()
        )

    def _at(self, name: str, like: Tensor) -> Tensor:
        """Returns one of the arrays as an index on a tensor's device, sent there once."""
        key = name, like.device
        if key not in self._sent:
            self._sent[key] = _index(getattr(self, name), like)
        return self._sent[key]

    def folded(self, x: Tensor) -> Tensor:
        """Returns `[job * batch, pos, ...]`, from `start` on, as `[job * row, column, ...]`."""
        x = x.unflatten(0, (-1, len(self.fold.of)))
        x = x[:, self._at("prompts", x), self._at("places", x) - self.start]
        return x.flatten(0, 1)

    def unfolded(self, x: Tensor) -> Tensor:
        """Returns `[job * row, column, ...]` as `[job * batch, pos, ...]`."""
        x = x.unflatten(0, (-1, self.n_rows))
        return x[:, self._at("rows", x), self._at("columns", x)].flatten(0, 1)

    def unfolded_keys(self, x: Tensor) -> Tensor:
        """Returns keys or values `[row, head, column, d]` as `[batch, head, pos, d]`."""
        return x[self._at("rows", x), :, self._at("columns", x)].movedim(2, 1)

    def kept_keys(self, x: Tensor) -> Tensor:
        """Returns the clean run's keys or values `[batch, head, pos, d]` that rows begin with."""
        return x[self._at("kept_prompts", x), :, self._at("kept_places", x)].movedim(2, 1)

    @cached_property
    def last(self) -> np.ndarray:
        """`[row, prompt]`: the columns of the prompts' last tokens, filled up with the first's."""
        own = [self.columns[self.rows[:, -1] == row, -1] for row in range(self.n_rows)]
        most = max(map(len, own))
        return np.stack([np.pad(x, (0, most - len(x)), mode="edge") for x in own])

    def mask(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """Returns a block's mask `[batch or 1, head or 1, query, key]` for rows.

        No mask stands for a causal one.
        """
        seen, places = self.seen_as, self.places
        if mask is None:
            shown = (seen >= 0) & (seen <= places[:, :, None])
            shown = shown[:1] if self.is_even else shown
            return torch.from_numpy(shown[:, None]).to(device)
        for_all = len(mask) == 1 and self.is_even
        n_rows = 1 if for_all else self.n_rows
        seen, places, prompts = seen[:n_rows], places[:n_rows], self.prompts[:n_rows]
        if len(mask) == 1:
            prompts = np.zeros_like(prompts)
        by_head = mask.movedim(1, -1)
        taken = by_head[
            _index(prompts[:, :, None], mask),
            _index(places[:, :, None], mask),
            _index(np.maximum(seen, 0), mask),
        ].movedim(-1, 1)
        hidden = torch.from_numpy(seen < 0)[:, None].to(mask.device)
        # Less than the mask's own least number: padding, which sees nothing, is given the mean of
        # its own prompt by some attention, and functions of the user's may read it.
        nothing = False if mask.dtype == torch.bool else -torch.inf
        return taken.masked_fill(hidden, nothing)


def _left_pads(ids: Tensor, mask: Tensor | None) -> np.ndarray | None:
    """Returns how many positions are padding before each prompt; None where others are, too."""
    if mask is None:
        return np.zeros(len(ids), dtype=int)
    if mask.ndim != 2 or mask.shape != ids.shape:
        return None
    real = mask.cpu().numpy() != 0
    pads = real.argmax(1)
    return pads if (real.sum(1) == real.shape[1] - pads).all() else None


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many tokens `[what, pos]` two prompts begin with that are the same."""
    n = min(one.shape[1], other.shape[1])
    same = (one[:, :n] == other[:, :n]).all(0)
    return n if same.all() else int(same.argmin())


def _tokens(stands: np.ndarray, members: np.ndarray, part: slice) -> np.ndarray:
    """Returns prompt and position `[token, 2]` of a row's tokens, prompt by prompt."""
    first = part.start or 0
    found = [np.flatnonzero(stands[b, part]) + first for b in members]
    return np.concatenate(
        [np.stack([np.full(len(p), b), p], axis=1) for b, p in zip(members, found, strict=True)]
    )


def _filled(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of tokens as one array `[row, column, 2]`, and how many are each row's own."""
    counts = np.array([len(row) for row in rows])
    most = counts.max()
    filled = [np.concatenate([row, row[-1:].repeat(most - len(row), axis=0)]) for row in rows]
    return np.stack(filled), counts


def _seen_as(fold: Fold, queries: np.ndarray, keys: np.ndarray, n_own: np.ndarray) -> np.ndarray:
    """Returns at which position each query's prompt has each key `[row, query, key]`, or -1."""
    asking, (owner, place) = queries[..., 0][:, :, None], np.moveaxis(keys, -1, 0)[:, :, None]
    token = place - fold.pads[owner]
    is_shared = (owner == fold.of[asking]) & (token >= 0) & (token < fold.shared[asking])
    found = np.where(owner == asking, place, np.where(is_shared, token + fold.pads[asking], -1))
    # What a row is filled up with is seen by none.
    is_own = np.arange(keys.shape[1]) < n_own[:, None]
    return np.where(is_own[:, None], found, -1)


def _index(where: np.ndarray, like: Tensor) -> Tensor:
    """Returns positions as an index on a tensor's device."""
    return sent(torch.from_numpy(np.ascontiguousarray(where)), like.device)


@dataclass(frozen=True)
class FoldedFit(Fit):
    """How arguments for B prompts change for rows of a fold, as `Fit` for rows of prompts."""

    layout: Layout = field(kw_only=True)

    @property
    def hides_any(self) -> bool:
        """Whether a token is hidden: another question always is."""
        return True

    def require_causal(self) -> None:
        """Raises `FoldError`: a question does not see the questions before it."""
        raise FoldError("its attention takes no mask by query and key")

    def _block_mask(self, mask: Any) -> Any:
        raise FoldError(f"its attention takes a {type(mask).__name__} and no mask of numbers")

    def _causal(self, device: torch.device) -> Tensor | Spread:
        return self._repeated(self.layout.mask(None, device))

    def _mask(self, mask: Tensor) -> Tensor | Spread:
        if mask.ndim != 4:
            raise FoldError("its blocks take no mask by query and key")
        return self._repeated(self.layout.mask(mask, mask.device))

    def _repeated(self, mask: Tensor) -> Tensor | Spread:
        return mask if len(mask) == 1 else Spread(mask.repeat(self.n_jobs, 1, 1, 1), 0)

    def _tensor(self, value: Tensor) -> Tensor | Spread:
        layout = self.layout
        along = [axis for axis, size in enumerate(value.shape) if size == self.length]
        if not along:
            if value.ndim and value.shape[0] == self.batch:
                firsts = value[_index(layout.prompts[:, 0], value)]
                return Spread(firsts.repeat(self.n_jobs, *[1] * (value.ndim - 1)), 0)
            return value
        axis = along[0]
        one_for_all = axis == 0 or value.shape[axis - 1] == 1
        if one_for_all and layout.is_even:
            return value.index_select(axis, _index(layout.places[0], value))
        first = _by_token(value, axis, self.batch)
        if first is None:
            raise FoldError(f"its blocks take {tuple(value.shape)} for prompts of other lengths")
        taken = first[layout._at("prompts", value), layout._at("places", value)]
        taken = taken.repeat(self.n_jobs, *[1] * (taken.ndim - 1))
        return Spread(taken.movedim((0, 1), (axis - 1, axis)), axis - 1)


def _by_token(value: Tensor, axis: int, batch: int) -> Tensor | None:
    """Returns a tensor with positions along an axis as `[batch, pos, ...]`; None for no batch."""
    if axis == 0 or value.shape[axis - 1] not in (1, batch):
        return None
    sizes = [*value.shape[: axis - 1], batch, *value.shape[axis:]]
    return value.expand(sizes).movedim((axis - 1, axis), (0, 1))


def same_for_shared(fold: Fold, name: str, given: Tensor) -> list[Tensor]:
    """Returns whether what a block is called with is one for shared tokens, as truth values.

    Of a mask: whether what is shared sees the same, and nothing that is not shared.
    """
    batch, length = fold.same_as[0].shape
    if given.ndim == 4 and given.shape[-2:] == (length, length):
        return _mask_is_same(fold, given)
    if "attention_mask" in name:
        return []
    along = [axis for axis, size in enumerate(given.shape) if size == length]
    if not along:
        by_prompt = given.ndim and given.shape[0] == batch
        return [(given == given[_index(fold.of, given)]).all()] if by_prompt else []
    found = _by_token(given, along[0], batch)
    return [] if found is None else [fold.agree(found)]


def _mask_is_same(fold: Fold, mask: Tensor) -> list[Tensor]:
    found = []
    least = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    for b, first in enumerate(fold.of.tolist()):
        if b == first:
            continue
        own = slice(int(fold.pads[b]), int(fold.pads[b] + fold.shared[b]))
        theirs = slice(int(fold.pads[first]), int(fold.pads[first] + fold.shared[b]))
        for row, part in ((b, own), (first, theirs)):
            seen = mask[row % len(mask)][:, part] > least
            found.append(~seen[..., : part.start].any() & ~seen[..., part.stop :].any())
        one, other = mask[b % len(mask)][:, own, own], mask[first % len(mask)][:, theirs, theirs]
        found.append((one == other).all())
    return found
