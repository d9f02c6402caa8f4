"""Times of one tool's runs beside another's, in turns, and the memory that each takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.throughput.ours import Ours
from benchmarks.throughput.peak import peak_bytes
from benchmarks.throughput.tasks import Task


def measured_runs(what: Any, ours: Any, other: Any, repeats: int) -> dict[str, Any]:
    """Returns times of both in turns, their ratio, and how far their answers are apart."""
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    answers: dict[str, Tensor] = {}
    for turn in range(repeats + 1):  # the first warms up
        pair = [("ours", ours), ("rival", other)]
        for who, tool in pair if turn % 2 else pair[::-1]:
            seconds, answers[who] = timed(lambda tool=tool: tool.run(what))
            if turn:
                times[who].append(seconds)
    ratios = [r / o for o, r in zip(times["ours"], times["rival"], strict=True)]
    a, b = answers["ours"].float(), answers["rival"].float()
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ours_s": statistics.median(times["ours"]),
        "rival_s": statistics.median(times["rival"]),
        "difference": float((a - b).abs().max() / b.abs().max()),
    }


def measured(task: Task, ours: Ours, other: Any, repeats: int) -> dict[str, Any]:
    """Returns what `measured_runs` does of a task, how ours did it, and what the rival took."""
    row = measured_runs(task, ours, other, repeats)
    with torch.no_grad():
        peak = peak_bytes(lambda: other.run(task))
    return {
        **row,
        "rival_peak": peak,
        "alone": alone(task, ours, other, repeats),
        "patches_per_s": len(task.cells) * len(task.clean["input_ids"]) / row["ours_s"],
        "operations_per_s": ours.planned(task).planned / row["ours_s"],
        "cells": len(task.cells),
        "how": ours.note,
    }


def own(task: Task, ours: Ours) -> dict[str, Any]:
    """Returns what ours takes, whoever the rival is."""
    plan = ours.planned(task)
    with torch.no_grad():
        return {
            "executed_over_floor": plan.planned / plan.floor,
            "loop_over_floor": ours.loop_operations(task) / plan.floor,
            "ours_peak": peak_bytes(lambda: ours.run(task)),
            "ours_one_by_one_peak": peak_bytes(lambda: ours.run(task, memory=1)),
        }


def alone(task: Task, ours: Ours, other: Any, repeats: int) -> float | None:
    """Returns the ratio of times without clean and source runs, for a tool that can keep them."""
    if not hasattr(other, "keeping") or any(cell.stream == "vision" for cell in task.cells):
        return None
    ratios = []
    with torch.no_grad(), other.keeping():
        other.run(task)
        for _ in range(repeats):
            # By itself: what ours shares of the encoder any pass of the model would find.
            with ours.keeping():
                ours.run(task)
                mine, _ = timed(lambda: ours.run(task))
            theirs, _ = timed(lambda: other.run(task))
            ratios.append(theirs / mine)
    return statistics.median(ratios)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Returns the clock's seconds of a run, and what it returned."""
    with torch.no_grad():
        _wait()
        start = time.perf_counter()
        found = run()
        _wait()
        return time.perf_counter() - start, found.cpu()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
