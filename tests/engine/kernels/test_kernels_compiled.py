"""What the fused kernel becomes on sm_80 and sm_90: compiled here, without a GPU, and read."""

import importlib
from typing import Any

import pytest
import torch

from hooked_vlm.engine.kernels.triton import warps_for


pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install '.[test]')")

WIDTHS = (3584, 2560)  # Qwen2-VL-7B, Gemma-3-4b
DTYPES = (torch.bfloat16, torch.float32)
ALL = [
    (arch, d, dtype, work)
    for arch in (80, 90)
    for d, dtype in zip(WIDTHS, DTYPES, strict=True)
    for work in ("patch", "add", "project")
]


@pytest.fixture(scope="module")
def code() -> Any:
    return importlib.import_module("benchmarks.kernels.compiled").compiled


@pytest.mark.parametrize(("arch", "d", "dtype", "work"), ALL)
def test_tokens_move_in_128_bits_and_next_to_nothing_is_spilled(code, arch, d, dtype, work):
    for warps in warps_for(d, dtype.itemsize):
        found = code(arch, d, dtype, work, warps)
        # A compiler may keep a number or two on the stack (Triton 3.7.1: 8 bytes a thread in one of
        # these kernels, 3 %); a token, or a part of one, it must not.
        assert found.local == 0
        assert found.stack_share <= 0.05
        assert found.stack or not {"LDL", "STL"} & set(found.sass.split())
        assert found.registers <= 128
        assert found.occupancy >= 0.25
        wide = found.accesses
        # What is narrower is one number for the whole token: its map, rows, direction.
        narrow = {kind: n for kind, n in wide.items() if not kind.endswith(" 128")}
        assert set(narrow) <= {"ld 64", "ld 32", "ld 8"}
        assert sum(narrow.values()) <= 6
        assert found.wide_in_sass["STG"] == -(-d * dtype.itemsize // (16 * 32 * warps))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_patch_reads_each_byte_that_it_writes_once(code, arch, dtype):
    d = WIDTHS[DTYPES.index(dtype)]
    for warps in warps_for(d, dtype.itemsize):
        found = code(arch, d, dtype, "patch", warps)
        assert found.bytes_per_byte == 2
        assert found.shared <= 1024  # what sm_90 keeps for itself
        assert found.wide_in_sass["LDG"] == found.wide_in_sass["STG"]
        assert found.occupancy == 1


@pytest.mark.parametrize("work", ["add", "project"])
def test_arithmetic_reads_a_token_and_its_direction_once(code, work):
    for warps in warps_for(3584, 2):
        assert code(90, 3584, torch.bfloat16, work, warps).bytes_per_byte == 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_products_are_rounded_before_they_are_added(code, dtype):
    ptx = code(80, 3584, dtype, "add", 16).ptx
    assert "fma" not in ptx
    assert "mul.f32" in ptx or "mul.rn.f32" in ptx
    if dtype != torch.float32:
        assert "cvt.rn" in ptx  # to the nearest; the interpreter cuts


def test_few_numbers_of_warps_are_tried():
    assert warps_for(3584, 2) == [4, 8, 16]
    for d in (1, 64, 128, 896, 1152, 2048, 3584, 5120, 8192, 32768):
        for size in (2, 4):
            assert 1 <= len(warps_for(d, size)) <= 3
