"""A growing batch beside a model of an allocator that caches blocks."""

import importlib
import json
from typing import Any

import pytest
import torch

from hooked_vlm.engine import budget


@pytest.fixture(scope="module")
def allocator() -> Any:
    return importlib.import_module("benchmarks.allocator")


def test_the_model_splits_and_merges_as_torchs_allocator_does(allocator: Any) -> None:
    caching, mib = allocator.Caching(), allocator.MIB
    first = caching.take(30 * mib)
    caching.give(*first)
    parts = [caching.take(10 * mib) for _ in range(3)]  # of the block that was freed
    assert caching.reserved == 30 * mib and len(caching.segments) == 1
    for part in parts:
        caching.give(*part)
    assert [block.size for block in caching.segments[0][1]] == [30 * mib]
    caching.take(31 * mib)  # no free block is as large
    assert caching.reserved == 62 * mib  # in steps of 2 MiB
    caching.take(100)
    assert caching.reserved == 64 * mib and len(caching.segments) == 3


def test_one_block_is_kept_for_a_pass_that_grows(
    allocator: Any, monkeypatch: Any, capsys: Any, tmp_path: Any
) -> None:
    """Without `reserve` each block's tensors are larger than all that were freed."""
    file = tmp_path / "a.json"
    monkeypatch.setitem(allocator.SIZES, "12x256", (12, 256))
    monkeypatch.setattr(budget, "LEAST", 0)
    wanted = ["--pairs", "4", "--size", "12x256", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["allocator", *wanted])
    allocator.main()
    found = json.loads(file.read_text())
    grown, kept = found["as it grows"], found["one block kept"]
    assert len(grown["sizes"]) > 12  # one for each number of rows, at least
    assert kept["requests"] < 0.8 * grown["requests"]
    assert kept["reserved"] < 0.8 * grown["reserved"]
    assert "| one block kept |" in capsys.readouterr().out


def test_a_block_that_does_not_fit_is_not_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(budget, "RESERVING", ("cpu",))

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "empty", full)
    budget.reserve([torch.device("cpu")], 2**40)
