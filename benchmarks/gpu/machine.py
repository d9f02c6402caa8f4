"""Part 0: what the machine does at best, which is what everything else is held against."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.common.machine import machine
from benchmarks.gpu.given import Given


def run(given: Given) -> None:
    """Notes the machine, the rates of a copy and of products, and what a launch and a wait cost."""
    for name, value in machine().items():
        given.note(name, value)
    if given.on_gpu:
        card = torch.cuda.get_device_properties(0)
        given.note("memory, bytes", card.total_memory)
        given.note("compute capability", f"{card.major}.{card.minor}")
        given.note("free memory, bytes", torch.cuda.mem_get_info()[0])
    given.note("copy, B/s", copied(given))
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("fp32", torch.float32, "highest"),
        ("TF32", torch.float32, "high"),
    ):
        given.note(f"product {name}, FLOP/s", multiplied(given, dtype, precision))
    given.note("launch, s", launched(given))
    given.note("wait, s", waited(given))


def copied(given: Given) -> float:
    """Returns the bytes a second that a copy reads and writes, on random numbers."""
    n = 2**18 if given.tiny else 2**30
    source = torch.randint(0, 256, (n,), dtype=torch.uint8, device=given.device)
    target = torch.empty_like(source)
    return 2 * n / best(given, lambda: target.copy_(source))


def multiplied(given: Given, dtype: torch.dtype, precision: str) -> float:
    """Returns the operations a second of a square product of random numbers.

    Zeros would draw less power, and so run at higher clocks.
    """
    n = 64 if given.tiny else 8192
    a, b = (torch.randn(n, n, device=given.device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return 2 * n**3 / best(given, lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(before)


def launched(given: Given) -> float:
    """Returns the host's seconds for one small operation, with the device never waited for."""
    x, n = torch.zeros(8, device=given.device), 100 if given.tiny else 2000
    times = []
    for _ in range(5):
        settle(given)
        start = time.perf_counter()
        for _ in range(n):
            x.add_(1)
        times.append((time.perf_counter() - start) / n)
        settle(given)
    return statistics.median(times[1:])


def waited(given: Given) -> float:
    """Returns the seconds of a small operation whose result the host reads."""
    x, n = torch.zeros(8, device=given.device), 20 if given.tiny else 500
    start = time.perf_counter()
    for _ in range(n):
        x.add_(1)
        x[0].item()
    return (time.perf_counter() - start) / n


def best(given: Given, run: Callable[[], object]) -> float:
    """Returns the median seconds of a run, after some that warm up."""
    times = []
    for _ in range(3 if given.tiny else 13):
        settle(given)
        start = time.perf_counter()
        run()
        settle(given)
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 4 :])


def settle(given: Given) -> None:
    """Waits for what the device was asked for."""
    if given.on_gpu:
        torch.cuda.synchronize()
