"""How many rows go through in one pass: a declared number of positions."""

from collections.abc import Iterable
from typing import Any

import torch


PASS_TOKENS = 2**14
"""Positions of all rows of a pass together, where no other number is given.

Fixed, and not taken from the memory that is free at the moment: passes of other shapes have other
last bits, and results must not depend on who else uses the machine.  Matrix products of so many
rows are as fast a row as larger ones; blocks of a 7B model take 2.3 GB for them in bfloat16."""
MOST = 512
"""Rows beyond which a batch wins nothing."""
CACHED = 9 * 2**20
"""Bytes of a pass's widest activation beyond which a CPU waits for its memory instead."""

RESERVING = ("cuda",)
"""Devices whose allocator keeps the blocks that were freed, and makes smaller ones of them."""

LEAST = 2**28
"""Bytes of a pass below which no block is kept for it: the allocator then asks for few."""


def row_bytes(
    model: Any, length: int, start: int, keep: int, itemsize: int, *, scores: bool = True
) -> int:
    """Returns about how many bytes one more prompt of `length` takes in a pass from `start` on.

    The widest moment counts: in attention (with its `scores`, which a fused kernel does not
    write out) or in the feed-forward part, beside the residual stream and its copy, and the
    logits of the `keep` last positions.
    """
    cfg = model.cfg
    n = length - start
    heads, wide = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    attention = n * (2 * heads + 2 * wide) + 2 * length * max(wide, heads)
    attention += scores * n * length * cfg.n_heads
    feed_forward = 3 * n * (cfg.d_mlp or 4 * cfg.d_model)
    stream = 4 * n * cfg.d_model
    return itemsize * (stream + max(attention, feed_forward)) + 8 * keep * cfg.d_vocab


def rows_within(
    model: Any,
    length: int,
    start: int,
    keep: int,
    itemsize: int,
    *,
    pass_tokens: int = PASS_TOKENS,
    memory: int | None = None,
) -> int:
    """Returns how many rows of the positions from `start` on a pass has, at least one.

    They have `pass_tokens` positions together, and take `memory` bytes where that is given.  On a
    CPU there are no more than its caches hold: a matrix product of a thousand rows is as fast a row
    as one of ten thousand, and what stands between two products is several times faster.
    """
    rows = min(MOST, pass_tokens // (length - start))
    if memory is not None:
        rows = min(rows, memory // row_bytes(model, length, start, keep, itemsize))
    if model.device.type == "cpu":
        widest = (length - start) * (model.cfg.d_mlp or 4 * model.cfg.d_model) * itemsize
        rows = min(rows, CACHED // widest)
    return max(1, rows)


def reserve(devices: Iterable[torch.device], n_bytes: int) -> None:
    """Has the allocator of each device keep one block of so many bytes for a pass.

    A pass's rows, and with them all that blocks make of them, grow where more cells join.  Without
    it each of these tensors is larger than any block that was freed, and the allocator asks the
    device for one after the other.  A part of a large block can be of any size.
    """
    if n_bytes < LEAST:
        return
    for device in devices:
        if device.type in RESERVING:
            try:
                torch.empty(n_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                continue  # in pieces it may still be there
