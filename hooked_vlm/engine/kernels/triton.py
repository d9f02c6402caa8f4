"""`patched_rows` as one Triton kernel: every byte of the rows is written once.

One program makes one token.  Which tensor the token comes from is known before anything of it
is loaded, so a token is loaded once, from the clean run or from the source and never from both.
The token's whole width lies in registers while its dot product is formed, so that nothing is
read twice.

Triton comes with CUDA builds of torch.  Without it this file imports, and `can_run` says no.
"""

from functools import cache
from inspect import unwrap
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.engine.kernels.checks import Asked
from hooked_vlm.errors import InterventionError, MissingExtraError


try:
    import triton  # pyright: ignore[reportMissingImports] - not on every machine
    import triton.language as tl  # pyright: ignore[reportMissingImports] - the same
except ImportError:
    triton: Any = None
    tl: Any = None

WARPS = (1, 2, 4, 8, 16)
VECTORS = (1, 4)
"""Least and most 128-bit accesses of a thread to a token: what the tuner may choose between.

One in flight leaves the memory idle between them; more than four, with float32 copies of
everything for the arithmetic, take the registers that other programs could run in.
"""
VECTOR_BYTES = 16
EXACT = {"enable_fp_fusion": False}
"""A product is rounded before it is added, as torch does, so that h + a w has torch's bits."""


def can_run(clean: Tensor) -> bool:
    """Whether the kernel takes such activations, here."""
    return triton is not None and clean.is_cuda and clean.dtype != torch.float64


def patched_rows(asked: Asked) -> Float[Tensor, "row pos d"]:
    """Returns what `reference.patched_rows` does.

    Tokens that are copied and tokens moved by `mode="add"` have its bits; where dot products
    are involved, sums come in another order.
    """
    _check(asked)
    out = asked.new_out()
    rows, pos, d = asked.shape
    arguments = arguments_of(asked, out)
    with torch.cuda.device_of(out):
        if out.is_cuda:
            _tuned()[(rows * pos,)](**arguments, **EXACT)
        else:  # in Triton's interpreter
            kernel[(rows * pos,)](**arguments, num_warps=warps_for(d, out.element_size())[0])
    return out


def warps_for(d: int, element_size: int) -> list[int]:
    """Returns the numbers of warps worth trying for a width, the fewest first.

    >>> warps_for(3584, 2), warps_for(3584, 4), warps_for(64, 4)
    ([4, 8, 16], [8, 16], [1])
    """
    vectors = _block(d) * element_size // VECTOR_BYTES
    least, most = VECTORS
    found = [n for n in WARPS if least <= vectors / (32 * n) <= most]
    return found or [WARPS[0] if vectors < 32 else WARPS[-1]]


def arguments_of(asked: Asked, out: Tensor) -> dict[str, Any]:
    """Returns what the kernel is launched with, by name."""
    steered = asked.moved is not None
    directions = asked.directions
    if directions is not None and directions.stride(-1) != 1:
        # Small, and read by every program: a copy is nothing beside the rows.
        directions = directions.contiguous()
    small = ("token_map", "clean_row", "source_row", "steer_at", "direction_row", "strength")
    given: dict[str, Any] = {name: getattr(asked, name) for name in small}
    given = {name: None if each is None else each.contiguous() for name, each in given.items()}
    large = {"out": out, "clean": asked.clean, "source": asked.source}
    for name, tensor in large.items():
        given[name] = tensor
        for axis, step in zip(("row", "pos", "last"), tensor.stride(), strict=True):
            given[f"{name}_{axis}_step"] = step
    return given | {
        "directions": directions,
        "directions_step": 0 if directions is None else directions.stride(0),
        "n_pos": asked.shape[1],
        "D": asked.shape[2],
        "BLOCK": _block(asked.shape[2]),
        "STEER": asked.mode if steered else "",
        "UNIT": all(tensor.stride(-1) == 1 for tensor in large.values()),
    }


def _block(d: int) -> int:
    """The width of a program: Triton's blocks are powers of two."""
    return 1 << max(0, d - 1).bit_length()


def _check(asked: Asked) -> None:
    if triton is None:
        raise MissingExtraError(
            "patched_rows(by='triton') needs Triton, which is not installed; run "
            "pip install 'hooked-vlm[gpu]', or leave `by` out."
        )
    if asked.clean.dtype == torch.float64:
        raise InterventionError(
            "patched_rows(by='triton') takes float32, float16 and bfloat16, not float64; use "
            "by='reference'."
        )
    # A kernel for the interpreter has been made another way when this file was imported.
    if not asked.clean.is_cuda and isinstance(kernel, triton.JITFunction):
        raise InterventionError(
            f"patched_rows(by='triton') runs on a GPU, and the activations are on "
            f"{asked.clean.device}; leave `by` out, or set TRITON_INTERPRET=1 before Python "
            "starts, to try the kernel out."
        )


@cache
def _tuned() -> Any:
    """The kernel with its tuner: the number of warps is the only thing that it chooses."""
    return triton.autotune(
        configs=[triton.Config({}, num_warps=n) for n in WARPS],
        key=["D", "STEER", "UNIT"],  # and every dtype, by itself
        prune_configs_by={"early_config_prune": _worth_trying},
    )(kernel)


def _worth_trying(configs: list[Any], by_place: dict[str, Any], **by_name: Any) -> list[Any]:
    named = by_place | by_name
    warps = warps_for(named["D"], named["out"].element_size())
    return [config for config in configs if config.num_warps in warps]


kernel: Any = None
"""The kernel, where there is Triton."""

if triton is not None:
    # Shapes are checked before the launch, and Triton reads the source of the function that it
    # is given: the checker that wraps every function under test has to be taken off these two
    # (jaxtyping before 0.3.11 puts it on in spite of `no_type_check`).

    @triton.jit
    @unwrap
    @no_type_check
    def _moved(h, w, a, STEER: tl.constexpr):
        if STEER == "project":
            a = a * tl.sum(h * w, axis=0) / tl.sum(w * w, axis=0)
        return h + a * w

    @triton.jit
    @unwrap
    @no_type_check
    def _write_token(
        out,
        clean,
        source,
        token_map,
        clean_row,
        source_row,
        steer_at,
        directions,
        direction_row,
        strength,
        n_pos,
        out_row_step,
        out_pos_step,
        out_last_step,
        clean_row_step,
        clean_pos_step,
        clean_last_step,
        source_row_step,
        source_pos_step,
        source_last_step,
        directions_step,
        D: tl.constexpr,  # width
        BLOCK: tl.constexpr,  # the power of two from there on
        STEER: tl.constexpr,  # "add", "project" or "" for neither
        UNIT: tl.constexpr,  # whether every last stride is 1
    ):
        # 64 bits: a batch of a few hundred long rows has more elements than 31 bits count.
        token = tl.program_id(0).to(tl.int64)
        row, pos = token // n_pos, token % n_pos
        columns = tl.arange(0, BLOCK)
        there = columns < D

        taken = tl.load(token_map + token).to(tl.int64)
        is_taken = taken >= 0
        clean_at = clean + tl.load(clean_row + row).to(tl.int64) * clean_row_step
        clean_at += pos * clean_pos_step
        source_at = source + tl.load(source_row + row).to(tl.int64) * source_row_step
        source_at += taken * source_pos_step
        clean_columns = columns
        source_columns = columns
        out_columns = columns
        if not UNIT:
            clean_columns = columns.to(tl.int64) * clean_last_step
            source_columns = columns.to(tl.int64) * source_last_step
            out_columns = columns.to(tl.int64) * out_last_step

        if UNIT:
            # One load, from wherever the token is: the choice is one of addresses.
            at = tl.where(is_taken, source_at, clean_at)
            h = tl.load(at + columns, mask=there, other=0.0)
        elif is_taken:
            h = tl.load(source_at + source_columns, mask=there, other=0.0)
        else:
            h = tl.load(clean_at + clean_columns, mask=there, other=0.0)

        if STEER != "":
            h = h.to(tl.float32)
            along = tl.load(direction_row + row).to(tl.int64)
            a = tl.load(strength + row).to(tl.float32)
            if (tl.load(steer_at + token) != 0) & (along >= 0) & (a != 0):
                w = tl.load(directions + along * directions_step + columns, mask=there, other=0.0)
                h = _moved(h, w.to(tl.float32), a, STEER)

        out_at = out + row * out_row_step + pos * out_pos_step
        tl.store(out_at + out_columns, h.to(out.dtype.element_ty), mask=there)

    kernel = _write_token
