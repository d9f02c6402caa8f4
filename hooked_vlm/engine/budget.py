"""How many rows go through in one pass: as many as a memory budget holds."""

from typing import Any

from hooked_vlm.anatomy.devices import free_bytes


SHARE = 0.5
"""Of the free memory, where no budget is given."""
UNKNOWN = 2**31
"""Bytes, where a device does not say how much is free."""
MOST = 512
"""Rows beyond which a batch wins nothing."""
CACHED = 9 * 2**20
"""Bytes of a pass's widest activation beyond which a CPU waits for its memory instead."""


def row_bytes(model: Any, length: int, start: int, keep: int, itemsize: int) -> int:
    """Returns about how many bytes one more prompt of `length` takes in a pass from `start` on.

    The widest moment counts: in attention (scores included, which a fused kernel does not
    write out) or in the feed-forward part, beside the residual stream and its copy, and the
    logits of the `keep` last positions.
    """
    cfg = model.cfg
    n = length - start
    heads, wide = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    attention = (
        n * (2 * heads + 2 * wide) + 2 * length * max(wide, heads) + n * length * cfg.n_heads
    )
    feed_forward = 3 * n * (cfg.d_mlp or 4 * cfg.d_model)
    stream = 4 * n * cfg.d_model
    return itemsize * (stream + max(attention, feed_forward)) + 8 * keep * cfg.d_vocab


def rows_within(
    model: Any, length: int, start: int, keep: int, itemsize: int, budget: int | None
) -> int:
    """Returns how many rows a budget in bytes holds (None: half of what is free), at least one.

    On a CPU no more than its caches hold: a matrix product of a thousand rows is as fast a row
    as one of ten thousand, and what stands between two products is several times faster.
    """
    if budget is None:
        free = free_bytes(model.device)
        budget = UNKNOWN if free is None else int(free * SHARE)
    rows = min(MOST, budget // row_bytes(model, length, start, keep, itemsize))
    if model.device.type == "cpu":
        widest = (length - start) * (model.cfg.d_mlp or 4 * model.cfg.d_model) * itemsize
        rows = min(rows, CACHED // widest)
    return max(1, rows)
