"""`patched_rows` in plain torch on a CPU: one gather from a table of all tokens.

Clean and source tokens are put one behind the other, which makes "this one or that one" a
single index.  The table is small where rows are many (every row of a prompt shares its tokens),
and `index_select` copies whole tokens straight to their places.

Interchanges and steering add to a token a sum of few vectors, the basis's and the directions'.
The dot products that this takes are of tokens in the table, so each is formed once, not once
for each row; in float64, because an interchange subtracts two of them that may be large and
nearly equal.  Interchanged tokens that several rows share (one pair under many strengths) are
made once, too, and put into the table.  What remains is done block by block, while a block is
still in the cache.

docs/measured/kernels.md says what else was measured: clone and `index_put`, `torch.where`,
`torch.compile`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.engine.kernels.checks import Asked


BLOCK_BYTES = 2**20
"""What a thread makes at a time where tokens are computed: a core's own cache."""
TABLE_SHARE = 0.5
"""A table of up to this share of the rows' tokens is worth making to copy from."""


def patched_rows(asked: Asked) -> Float[Tensor, "row pos d"]:
    """Returns what `reference.patched_rows` does.

    Tokens that are copied and tokens moved by `mode="add"` have its bits; dot products are
    summed in float64 and are nearer to the truth.
    """
    out = asked.new_out()
    flat = out if out.is_contiguous() else out.new_empty(out.shape)
    is_taking = bool((asked.token_map >= 0).any())
    in_span = asked.basis is not None and is_taking
    if not in_span and asked.moved is None and is_taking and not _pays(asked):
        _copy_twice(asked, out)
        return out
    tokens = flat.view(-1, asked.shape[2])
    table = _Table.interchanged(asked) if in_span else None
    in_span = in_span and table is None
    table = table or _Table.of(asked, is_taking)
    if in_span or asked.moved is not None:
        _compute(asked, table, tokens, in_span)
    else:
        torch.index_select(table.tokens, 0, table.index, out=tokens)
    return out if flat is out else out.copy_(flat)


@dataclass(frozen=True, eq=False)
class _Table:
    tokens: Tensor
    """`[n, d]`: all clean tokens, then all source tokens."""
    clean: Tensor
    """`[row * pos]`: the number of each written token's clean token."""
    index: Tensor
    """`[row * pos]`: the number of the token that is there once it is patched."""

    @classmethod
    def of(cls, asked: Asked, is_taking: bool) -> "_Table":
        n_clean, n_source = (x.shape[0] * x.shape[1] for x in (asked.clean, asked.source))
        _, pos, d = asked.shape
        clean = asked.clean_row.long()[:, None] * pos + torch.arange(pos)
        if not is_taking:
            return cls(asked.clean.reshape(n_clean, d), clean.flatten(), clean.flatten())
        is_same = asked.source is asked.clean
        tokens = asked.clean.new_empty(n_clean + (0 if is_same else n_source), d)
        # copy_ takes any strides; reshape would copy what is not contiguous a second time.
        tokens[:n_clean].view(asked.clean.shape).copy_(asked.clean)
        if not is_same:
            tokens[n_clean:].view(asked.source.shape).copy_(asked.source)
        first = asked.source_row.long()[:, None] * asked.source.shape[1]
        source = first + asked.token_map + (0 if is_same else n_clean)
        index = torch.where(asked.token_map < 0, clean, source)
        return cls(tokens, clean.flatten(), index.flatten())

    @classmethod
    def interchanged(cls, asked: Asked) -> "_Table | None":
        """Returns a table of interchanged tokens, where enough rows share theirs to be worth it.

        In half precision they would be rounded before they are steered: not there.
        """
        if asked.clean.dtype != asked.wide:
            return None
        leaders, leader = torch.unique(_leaders(asked), return_inverse=True)
        if len(leaders) > TABLE_SHARE * len(leader):
            return None
        assert asked.basis is not None
        n_clean, pos, d = asked.clean.shape[0] * asked.clean.shape[1], *asked.shape[1:]
        maps = asked.token_map[leaders].long()
        row, place = (maps >= 0).nonzero(as_tuple=True)
        old = asked.clean[asked.clean_row.long()[leaders[row]], place]
        new = asked.source[asked.source_row.long()[leaders[row]], maps[row, place]]
        # Differences in float64: they may be of large numbers that are nearly equal.
        inside = (new.double() - old.double()) @ asked.basis.double().T
        tokens = asked.clean.new_empty(n_clean + len(old), d)
        tokens[:n_clean].view(asked.clean.shape).copy_(asked.clean)
        basis = asked.basis.to(asked.wide)
        torch.addmm(old, inside.to(asked.wide), basis, out=tokens[n_clean:])
        clean = asked.clean_row.long()[:, None] * pos + torch.arange(pos)
        made = n_clean - 1 + (maps >= 0).flatten().cumsum(0).view(maps.shape)
        index = torch.where(asked.token_map < 0, clean, made[leader])
        return cls(tokens, clean.flatten(), index.flatten())

    def dots(self, vectors: Tensor, used: Tensor) -> Tensor:
        """Returns products `[n, vector]` of tokens with a few vectors, in float64.

        Only tokens whose numbers are in `used` (many times, it may be) have any.
        """
        columns = vectors.double().T
        products = columns.new_zeros(len(self.tokens), len(vectors))
        is_used = torch.zeros(len(self.tokens), dtype=torch.bool)
        is_used[used] = True
        numbers = is_used.nonzero()[:, 0]
        size = _block(self)
        scratch = columns.new_empty(min(size, len(numbers)), len(columns))
        for part in numbers.split(size):
            wide = scratch[: len(part)].copy_(self.tokens.index_select(0, part))
            products[part] = wide @ columns
        return products


def _compute(asked: Asked, table: _Table, out: Tensor, in_span: bool) -> None:
    """Writes all tokens, block by block, and adds to some of them."""
    changes = _Changes.of(asked, table, in_span)
    start = table.clean if in_span else table.index
    size = _block(table)
    number = changes.places // size
    counts = torch.bincount(number, minlength=-(-len(out) // size)).tolist()
    here = (changes.places - number * size).split(counts)
    # Made once: memory that is new in every block costs more than what is computed in it.
    scratch = out.new_empty(max(counts, default=0), out.shape[1], dtype=asked.wide)
    for block, index, places, change in zip(
        out.split(size), start.split(size), here, changes.sums(number, counts, scratch), strict=True
    ):
        torch.index_select(table.tokens, 0, index, out=block)
        if not len(places):
            continue
        if block.dtype == change.dtype:
            block.index_add_(0, places, change)
        else:
            old = block.index_select(0, places)
            block.index_copy_(0, places, change.add_(old).to(block.dtype))


@dataclass(frozen=True, eq=False)
class _Changes:
    """What is added to which written tokens: a direction's multiple, a sum of the basis's rows."""

    places: Tensor
    """`[place]`, rising: numbers of written tokens."""
    directions: Tensor | None = None
    basis: Tensor | None = None
    along: Tensor | None = None
    """`[place]`: which direction."""
    weights: Tensor | None = None
    """`[place, 1]`: how much of it."""
    inside: Tensor | None = None
    """`[place, axis]`: how much of each of the basis's rows."""

    @classmethod
    def of(cls, asked: Asked, table: _Table, in_span: bool) -> "_Changes":
        changed = (asked.token_map >= 0) if in_span else None
        moved = asked.moved
        touched = changed if moved is None else moved if changed is None else changed | moved
        assert touched is not None
        places = touched.flatten().nonzero()[:, 0]
        basis = inside = None
        if in_span:
            assert asked.basis is not None
            taken, kept = table.index[places], table.clean[places]
            products = table.dots(asked.basis, torch.cat([taken, kept]))
            # Zero where nothing is taken.
            inside = products[taken] - products[kept]
            basis = asked.basis.to(asked.wide)
        directions = along = weights = None
        if moved is not None:
            assert asked.directions is not None
            assert asked.direction_row is not None
            row = places // asked.shape[1]
            along = asked.direction_row.clamp(min=0).long()[row]
            weights = _weights(asked, table, places, along, inside).to(asked.wide)[:, None]
            directions = asked.directions.to(asked.wide)
        inside = None if inside is None else inside.to(asked.wide)
        return cls(places, directions, basis, along, weights, inside)

    def sums(self, number: Tensor, counts: list[int], scratch: Tensor) -> Iterator[Tensor]:
        """Yields what is added in one block after another, `[place, d]`, in the same memory.

        `number` says which block a place is in, `counts` how many places each has.
        """
        steers = self._multiples(number)
        inside = repeat(None) if self.inside is None else self.inside.split(counts)
        for count, own in zip(counts, inside, strict=False):
            out, filled = scratch[:count], 0
            while steers is not None and filled < count:
                weights, direction = next(steers)
                torch.mul(weights, direction, out=out[filled : filled + len(weights)])
                filled += len(weights)
            if own is not None and self.basis is not None:
                if steers is None:
                    torch.mm(own, self.basis, out=out)
                else:
                    out.addmm_(own, self.basis)
            yield out

    def _multiples(self, number: Tensor) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Returns places' weights and direction, as long as both direction and block stay.

        There is one direction a row, so that is a few times a block.
        """
        if self.along is None or self.weights is None or self.directions is None:
            return None
        key = number * len(self.directions) + self.along
        kinds, lengths = key.unique_consecutive(return_counts=True)
        rows = self.directions.unbind()
        which = (kinds % len(self.directions)).tolist()
        return zip(self.weights.split(lengths.tolist()), (rows[k] for k in which), strict=True)


def _weights(
    asked: Asked, table: _Table, places: Tensor, along: Tensor, inside: Tensor | None
) -> Tensor:
    """Returns how much of its direction is added at each place, in float64, 0 where none is."""
    assert asked.directions is not None
    assert asked.strength is not None
    assert asked.moved is not None
    a = asked.strength.double()[places // asked.shape[1]]
    if asked.mode == "project":
        vectors = asked.directions.double()
        start = (table.index if inside is None else table.clean)[places]
        products = table.dots(asked.directions, start)[start, along]
        if inside is not None:  # the token has been interchanged by then
            assert asked.basis is not None
            turned = asked.basis.double() @ vectors.T
            products = products + (inside @ turned).gather(1, along[:, None])[:, 0]
        a = a * products / vectors.square().sum(1)[along]
    return a.where(asked.moved.flatten()[places], 0.0)


def _leaders(asked: Asked) -> Tensor:
    """Returns, by row, the first row of the same prompt and source, if it takes the same tokens."""
    number = torch.arange(len(asked.clean_row))
    pair = asked.clean_row.long() * len(asked.source) + asked.source_row.long()
    kinds, kind = torch.unique(pair, return_inverse=True)
    first = number.new_full((len(kinds),), len(number)).scatter_reduce(0, kind, number, "amin")
    first = first[kind]
    return first.where((asked.token_map == asked.token_map[first]).all(1), number)


def _block(table: _Table) -> int:
    """How many tokens are made at a time."""
    bytes_each = table.tokens.shape[1] * table.tokens.element_size()
    return max(1, BLOCK_BYTES * torch.get_num_threads() // bytes_each)


def _pays(asked: Asked) -> bool:
    """Whether rows are many enough to make a table first."""
    rows, pos, _ = asked.shape
    tokens = sum(x.shape[0] * x.shape[1] for x in (asked.clean, asked.source))
    return tokens <= TABLE_SHARE * rows * pos


def _copy_twice(asked: Asked, out: Tensor) -> None:
    """Writes whole rows and then over them: less work than a table where rows are few."""
    torch.index_select(asked.clean, 0, asked.clean_row, out=out)
    row, pos = (asked.token_map >= 0).nonzero(as_tuple=True)
    source, token = asked.source_row.long()[row], asked.token_map.long()[row, pos]
    out.index_put_((row, pos), asked.source[source, token])
