"""What `patched_rows` means: plain torch, written to be read and never tuned.

Everything else in this folder must give what this file gives.  It spends memory freely, several
times what it returns.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.engine.kernels.checks import Asked


def patched_rows(asked: Asked) -> Float[Tensor, "row pos d"]:
    """Returns the rows of a batch, each a clean prompt with tokens replaced and steered.

    Row r starts as prompt `clean_row[r]`.  In this order:

    1. **Patch.**  Where `token_map[r, p]` is not -1, its token p becomes token
       `token_map[r, p]` of source `source_row[r]`.
    2. **Steer.**  Where `steer_at[r, p]`, along w = `directions[direction_row[r]]` with
       a = `strength[r]`: h becomes h + a w (`mode="add"`) or h + a <h, w> w / |w|^2
       (`mode="project"`).  A direction of -1 or a strength of 0 leaves the token alone.

    A token that is only copied keeps its bits.  All arithmetic, sums included, is in float32
    (float64 for float64), and what comes of it is rounded once, to the activations' dtype,
    when it is written.
    """
    rows = asked.clean[asked.clean_row.long()]
    taken = (asked.token_map >= 0)[..., None]
    if bool(taken.any()):
        token = asked.token_map.clamp(min=0).long()
        source = asked.source[asked.source_row.long()[:, None], token]
        rows = torch.where(taken, source, rows)
    if asked.moved is not None:
        rows = torch.where(asked.moved[..., None], _steered(asked, rows.to(asked.wide)), rows)
    rows = rows.to(asked.clean.dtype)
    return rows if asked.out is None else asked.out.copy_(rows)


def _steered(asked: Asked, h: Tensor) -> Tensor:
    assert asked.directions is not None
    assert asked.direction_row is not None
    assert asked.strength is not None
    if not len(asked.directions):
        return h
    w = asked.directions[asked.direction_row.clamp(min=0).long()].to(asked.wide)[:, None]
    a = asked.strength.to(asked.wide)[:, None, None]
    if asked.mode == "project":
        a = a * (h * w).sum(-1, keepdim=True) / (w * w).sum(-1, keepdim=True)
    return h + a * w
