"""The Triton kernel's semantics: in its interpreter everywhere, on the GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.kernel_cases import LAYOUTS, arguments, assert_close, is_exact, laid_out
from hooked_vlm.engine.kernels import patched_rows, way_for
from hooked_vlm.errors import InterventionError


pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install '.[test]')")

TESTS = Path(__file__).parents[2]


def test_the_kernel_is_the_definition_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    ran = subprocess.run(
        [*command, str(TESTS / "helpers" / "interpreted_kernels.py")],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "5 passed" in ran.stdout, ran.stdout


def test_a_compiled_kernel_refuses_tensors_of_the_cpu():
    row, clean = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 8)
    place = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(InterventionError, match="TRITON_INTERPRET=1"):
        patched_rows(clean, clean, place, clean_row=row, source_row=row, by="triton")
    with pytest.raises(InterventionError, match="not float64"):
        wide = clean.double()
        patched_rows(wide, wide, place, clean_row=row, source_row=row, by="triton")


@pytest.mark.gpu
@given(arguments(), st.booleans(), st.sampled_from(LAYOUTS))
@settings(max_examples=100, deadline=None)
def test_the_kernel_is_the_definition_on_the_gpu(given, is_wide, layout):
    moved: dict[str, Any] = dict(given)
    if is_wide:  # a real model's width, in several 128-bit accesses a thread
        for name in {"clean", "source", "directions", "out"} & given.keys():
            moved[name] = torch.cat([given[name]] * 64, dim=-1)
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in moved.items()}
    moved |= {name: laid_out(moved[name], layout) for name in ("clean", "source")}
    rows = patched_rows(**moved)
    assert way_for(moved["clean"]) == "triton"
    assert_close(rows, moved)
    if is_exact(moved):
        assert torch.equal(rows, patched_rows(**{**moved, "out": None}, by="reference"))


@pytest.mark.gpu
def test_rows_beyond_31_bits_of_elements_are_reached():
    pos, d = 4096, 4096
    rows = 2**31 // (pos * d) + 1
    clean = torch.zeros(1, pos, d, dtype=torch.bfloat16, device="cuda")
    row = torch.zeros(rows, dtype=torch.int64, device="cuda")
    taken = torch.zeros(rows, pos, dtype=torch.int64, device="cuda")
    found = patched_rows(clean, clean + 1, taken, clean_row=row, source_row=row)
    assert float(found[-1].float().mean()) == 1
