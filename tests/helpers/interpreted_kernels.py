"""The Triton kernel in Triton's interpreter; `test_kernels_triton.py` runs this file.

It needs a process of its own: whether a kernel is compiled or interpreted is settled when it is
imported, by TRITON_INTERPRET.
"""

import os
from functools import partial

import pytest
import torch
from hypothesis import given, settings

from helpers.kernel_cases import arguments, assert_close, is_exact
from hooked_vlm.engine.kernels import patched_rows, triton
from hooked_vlm.engine.kernels.checks import Asked


assert os.environ.get("TRITON_INTERPRET") == "1", (
    "run tests/engine/kernels/test_kernels_triton.py instead"
)


@given(arguments())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_kernel_is_the_definition(given):
    rows = patched_rows(**given, by="triton")
    # The interpreter cuts bfloat16 off where GPUs round: one step off, not half of one.
    is_cut = rows.dtype == torch.bfloat16
    assert_close(rows, given, roundings=2.02 if is_cut else 1.01)
    if "mode" not in given or (is_exact(given) and not is_cut):
        assert torch.equal(rows, patched_rows(**{**given, "out": None}, by="reference"))
    if "out" in given:
        assert rows.data_ptr() == given["out"].data_ptr()


@pytest.mark.parametrize("at", [0, -1])
def test_a_kernel_writes_its_rows_and_nothing_beside_them(at):
    around = torch.full((4, 3, 24), torch.nan)
    out = around[1:3, :, 4:20]
    clean, one = torch.randn(2, 3, 16), torch.tensor([0, 1])
    patched_rows(
        clean, clean, torch.full((2, 3), at), clean_row=one, source_row=one, out=out, by="triton"
    )
    assert not out.isnan().any()
    assert int((~around.isnan()).sum()) == out.numel()


@pytest.mark.parametrize(("d", "dtype"), [(3584, torch.bfloat16), (8, torch.float32)])
def test_the_tuner_tries_few_and_launches_the_kernel(d, dtype, monkeypatch):
    """As on a GPU, but for the clock: here more warps count as faster."""
    clean, one = torch.randn(2, 3, d).to(dtype), torch.tensor([0, 1])
    asked = Asked(clean, clean + 1, torch.tensor([[0, -1, 2]] * 2), one, one)
    out = torch.full((2, 3, d), torch.nan, dtype=dtype)
    # Triton 3.3 looks for a GPU's clock when a tuner is made without one.
    with_clock = partial(triton.triton.autotune, do_bench=lambda *_args, **_kwargs: [])
    monkeypatch.setattr(triton.triton, "autotune", with_clock)
    tuner, tried = triton._tuned.__wrapped__(), []
    monkeypatch.setattr(triton, "_tuned", lambda: tuner)

    def bench(*_args, config, **_meta):
        tried.append(config.num_warps)
        return [1 / config.num_warps]

    monkeypatch.setattr(tuner, "_bench", bench)
    tuner[(6,)](**triton.arguments_of(asked, out), **triton.EXACT)
    few = triton.warps_for(d, dtype.itemsize)
    assert tried == few or (len(few) == 1 and not tried)  # one alone need not be timed
    assert tuner.best_config.num_warps == few[-1]
    assert torch.equal(out, patched_rows(**{**vars(asked), "out": None}, by="reference"))
