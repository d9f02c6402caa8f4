"""The one pass over memory that makes a batch of patched and steered rows.

`reference.py` defines the result in plain torch; `triton.py` computes it faster, on a GPU.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.engine.kernels import reference, triton
from hooked_vlm.engine.kernels.checks import Asked, check
from hooked_vlm.errors import InterventionError, did_you_mean


WAYS = {"reference": reference.patched_rows, "triton": triton.patched_rows}
"""Every implementation, by the name that `by` takes."""


def patched_rows(
    clean: Float[Tensor, "prompt pos d"],
    source: Float[Tensor, "source source_pos d"],
    token_map: Int[Tensor, "row pos"],
    *,
    clean_row: Int[Tensor, " row"],
    source_row: Int[Tensor, " row"],
    steer_at: Bool[Tensor, "row pos"] | None = None,
    directions: Float[Tensor, "direction d"] | None = None,
    direction_row: Int[Tensor, " row"] | None = None,
    strength: Float[Tensor, " row"] | None = None,
    mode: str = "add",
    out: Float[Tensor, "row pos d"] | None = None,
    by: str | None = None,
    check_values: bool = True,
) -> Float[Tensor, "row pos d"]:
    """Returns rows of a batch, each a clean prompt with tokens replaced and then steered.

    `hooked_vlm.engine.kernels.reference.patched_rows` is the definition.  Activations are float32,
    float16 or bfloat16 (float64 by plain torch), with any strides; there is no backward pass.

    Args:
        token_map: -1 keeps the clean token, any other number is the source position to take.
        clean_row: which prompt a row starts as.
        source_row: which source it takes tokens from.
        steer_at: which tokens move along the row's direction; with it come the next three.
        directions: in `clean`'s dtype or in float32.
        direction_row: which direction; -1 for none.
        strength: how far; 0 leaves tokens as they are.
        mode: `"add"`, h + a w, or `"project"`, h + a <h, w> w / |w|^2.
        out: where to write; it must not share memory with what is read.
        by: `"triton"` or `"reference"`; None chooses by device.
        check_values: whether to look at index ranges and vectors, not at shapes alone.

    Raises:
        InterventionError: what was given does not fit together, or cannot run by that way.

    >>> clean, source = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    >>> rows = patched_rows(
    ...     clean,
    ...     source,
    ...     torch.tensor([[-1, 2, -1]]),
    ...     clean_row=torch.tensor([0]),
    ...     source_row=torch.tensor([0]),
    ... )
    >>> rows[0].tolist()
    [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    asked = Asked(
        clean, source, token_map, clean_row, source_row, steer_at, directions, direction_row,
        strength, mode, out,
    )  # fmt: skip
    check(asked, check_values)
    if by is not None and by not in WAYS:
        raise InterventionError(
            f"patched_rows(by={by!r}) is not known; use one of {', '.join(WAYS)}, or None to "
            f"choose by device.{did_you_mean(by, WAYS)}"
        )
    if not token_map.numel():
        return asked.new_out()
    if not len(source):  # nothing is taken from it, but its rows must have something to point at
        asked = replace(asked, source=clean)
    with torch.no_grad():
        return WAYS[by or way_for(clean)](asked)


def way_for(clean: Tensor) -> str:
    """Returns how activations like these are patched: by device, and by what is installed."""
    return "triton" if triton.can_run(clean) else "reference"
