"""The tools: how each takes a model, and the values of its jobs beside those of plain torch."""

import copy
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.common.parts import twin
from benchmarks.jobs import JOBS, Cannot, world
from benchmarks.jobs.counted import MODULES
from benchmarks.throughput import tasks
from hooked_vlm import HookedVLM


TOLERANCE = 1e-4
"""Of the largest value; a larger difference is a wrong value."""
Verdict = dict[str, Any]


def wrapped(tool: str, model: HookedVLM) -> Any:
    """Returns a tool's model around modules of its own; raises `Cannot` where it takes none."""
    hf_model, processor = model.hf_model, model.processor
    if tool == "ours":
        return model
    if tool == "plain":
        return twin(hf_model)
    if tool == "nnsight":
        from nnsight import TransformersModel  # type: ignore[import-not-found]

        return TransformersModel(
            twin(hf_model),
            processor=processor,
            tokenizer=processor.tokenizer,
            task="image-text-to-text",
        )
    from benchmarks.throughput.rivals.lens import bridged

    try:  # weights of its own: jobs change them
        return bridged(copy.deepcopy(hf_model), processor.tokenizer)
    except tasks.Cannot as reason:
        raise Cannot(str(reason)) from reason


def values(tool: str, job: str, w: world.World) -> tuple[Tensor, ...]:
    """Returns what a job gives, in a new and empty folder."""
    module = importlib.import_module(f"benchmarks.jobs.{MODULES[tool]}")
    with tempfile.TemporaryDirectory() as folder:
        found = getattr(module, job)(w.of(wrapped(tool, w.model), Path(folder)))
    return tuple(x.detach() for x in (found if isinstance(found, tuple) else (found,)))


def verdict(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Verdict:
    """Returns the largest difference and the largest value, and whether the one is small enough.

    >>> import torch
    >>> one = torch.ones(2)
    >>> verdict((one,), (one,))["kind"], verdict((2 * one,), (one,))["kind"]
    ('right', 'wrong')
    """
    shapes = [tuple(x.shape) for x in found], [tuple(x.shape) for x in right]
    if shapes[0] != shapes[1]:
        return {"kind": "wrong", "why": f"shapes {shapes[0]} instead of {shapes[1]}"}
    worst = max(
        (
            (float((x - y).abs().max()), float(y.abs().max()))
            for x, y in zip(found, right, strict=True)
        ),
        key=lambda pair: pair[0] / max(pair[1], 1e-30),
    )
    kind = "right" if worst[0] <= TOLERANCE * worst[1] else "wrong"  # NaN is wrong
    return {"kind": kind, "difference": worst[0], "of": worst[1]}


def judged(tool: str, job: str, w: world.World, right: tuple[Tensor, ...]) -> Verdict:
    """Returns the verdict on a tool's value; an error of another tool is its answer."""
    try:
        return verdict(values(tool, job, w), right)
    except Cannot as reason:
        return {"kind": "cannot", "why": str(reason)}
    except Exception as error:
        if tool == "ours":
            raise
        return {"kind": "cannot", "why": f"{type(error).__name__}: {error}"[:120]}


def refusal(tool: str, w: world.World) -> str:
    """Returns why a tool does not take a model; empty where it does."""
    try:
        wrapped(tool, w.model)
    except Cannot as reason:
        return str(reason)
    return ""


def judgements(tools: list[str], model: str) -> Iterator[tuple[str, str, Verdict]]:
    """Yields `(tool, job, verdict)` on one model, each job compared with plain torch's value."""
    with tempfile.TemporaryDirectory() as folder:
        w = world.world(model, Path(folder))
    refused = {tool: refusal(tool, w) for tool in tools}
    for job in JOBS:
        right = values("plain", job, w)
        for tool in tools:
            if refused[tool]:
                yield tool, job, {"kind": "refused", "why": refused[tool]}
            else:
                yield tool, job, judged(tool, job, w, right)
