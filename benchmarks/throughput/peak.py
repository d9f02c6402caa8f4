"""The most memory that a run takes beside what was there before it.

On a GPU the allocator says so.  On Linux the kernel keeps the largest resident size of a process,
and sets it back when asked; memory that the C library has kept for itself is given back first,
so that one tool's leftovers are not taken for another's thrift.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Returns the bytes at a run's worst moment, or None where nobody keeps count.

    It runs twice: what a first run leaves behind for good is not the second one's.
    """
    run()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _REFS.write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None
    kept = run()  # what it returns counts, for everyone
    found = _resident("VmHWM") - before
    del kept
    return max(0, found)


def _resident(name: str) -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
