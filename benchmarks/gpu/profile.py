"""Part 9: a strip sweep from inside: how busy the device is, what waits for it, and memory."""

import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.dispatched import Dispatched
from benchmarks.gpu.given import Given
from benchmarks.gpu.workload import (
    dtype_for,
    pairs_for,
    setting_for,
    sweep_name,
    tasks_for,
    tools_for,
)


NAME = "Qwen2-VL-7B"
LINES = 12


def run(given: Given) -> None:
    """Notes the share of time in which the device works, waits by line, and the allocator."""
    setting, pairs = setting_for(NAME, given.tiny), pairs_for(NAME, given.tiny, given.questions)[-1]
    model = setting.build(given.device, dtype_for(given.tiny))
    (task,) = tasks_for(given, model, setting, ("strip",), pairs)
    ours, what = tools_for(model)["ours"], sweep_name(f"{NAME} strip", pairs, given.questions)
    with torch.no_grad():
        if given.on_gpu:
            allocated = allocations()
        ours.run(task)
        if given.on_gpu:
            given.note(
                f"{what}: allocations from the driver, first sweep", allocations() - allocated
            )
        note_busy(given, what, lambda: ours.run(task))
        with Dispatched(given.device) as found:
            ours.run(task)
    given.note(f"{what}: dispatched operations", found.operations)
    given.note(f"{what}: waits of this library", found.own)
    given.note(f"{what}: waits of transformers", found.waits - found.own)
    for line, n in found.lines.most_common(LINES):
        given.note(f"{what}: waits at {line}", n)
    if given.on_gpu:
        stats = torch.cuda.memory_stats()
        for key in ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries"):
            given.note(f"{what}: {key}", stats[key])


def note_busy(given: Given, what: str, run: Any) -> None:
    """Notes the share of the wall's time in which kernels run, and those that take most of it."""
    activities = [ProfilerActivity.CUDA] if given.on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        run()
        if given.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    kind = DeviceType.CUDA if given.on_gpu else DeviceType.CPU
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == kind
    )
    given.note(f"{what}: share of time busy", union(spans) / 1e6 / seconds)
    if given.on_gpu:
        by_kernel = sorted(
            found.key_averages(), key=lambda each: each.self_device_time_total, reverse=True
        )
        for each in by_kernel[:LINES]:
            share = each.self_device_time_total / 1e6 / seconds
            given.note(f"{what}: share of {each.key[:60]}", share)


def union(spans: list[tuple[float, float]]) -> float:
    """Returns the length that spans, by their start, cover together.

    >>> union([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    covered, until = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def allocations() -> int:
    """Returns how often the allocator has asked the driver for memory."""
    stats = torch.cuda.memory_stats()
    return int(stats.get("num_device_alloc", stats.get("segment.all.allocated", 0)))
