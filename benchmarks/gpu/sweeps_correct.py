"""Part 3: sweeps of the shipped models beside bare PyTorch hooks, and beside the CPU.

The engine must be the growing batch in whatever order sweeps come, with every implementation of
attention that there is.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from benchmarks.common.parts import twin
from benchmarks.gpu.given import Given
from benchmarks.gpu.turns import apart
from benchmarks.throughput.hook_loop import HookLoop
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.timed import SHIPPED, Timed
from hooked_vlm import HookedVLM, zoo
from hooked_vlm.engine.noise import BOUNDS


SWEEPS = ("final_token", "strip", "object", "alpha", "head", "vision")
GROWING = "growing"


def run(given: Given) -> None:
    """Notes for each attention, model and order: engines, and how far answers are apart."""
    models = [Timed.of(shipped, "") for shipped in SHIPPED]
    tasks = [timed.tasks(SWEEPS, 1 if given.tiny else 4) for timed in models]
    pairs = zip(models, tasks, strict=True)
    on_cpu = [answers_on_cpu(*pair) if given.on_gpu else {} for pair in pairs]
    for attention, dtype, n_sweeps in implementations(given):
        for timed, all_tasks, there in zip(models, tasks, on_cpu, strict=True):
            some = all_tasks[:n_sweeps]
            try:
                copied(timed.model, attention, dtype)
            except (ValueError, ImportError) as reason:  # transformers says what it does not have
                said = str(reason).splitlines()[0]
                given.note(f"{timed.name}, {attention}", "not supported", note=said[:200])
                continue
            for order in (some, some[::-1]):
                label = f"{timed.name}, {attention}, {order[0].name} first"
                if dtype != torch.float32:
                    label = f"{timed.name}, {attention} bf16, {order[0].name} first"
                if given.left < 5:
                    given.note(label, "not run: too little time left")
                    continue
                try:
                    compared(given, label, timed, attention, dtype, order, there)
                except Exception as error:  # noqa: BLE001 - one attention says nothing of the next
                    said = f"{type(error).__name__}: {error}".splitlines()[0]
                    given.note(f"{label}: runs", said[:200], correct=False)


def implementations(given: Given) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yields implementations of attention, with a dtype that each takes and a number of sweeps."""
    yield "sdpa", torch.float32, 2 if given.tiny else len(SWEEPS)
    yield "eager", torch.float32, 2 if given.tiny else 4
    if given.on_gpu:
        yield "sdpa", torch.bfloat16, 4
        if is_torch_flex_attn_available():
            yield "flex_attention", torch.float32, 2
        if is_flash_attn_2_available():  # last: a failed assertion on the device ends the process
            yield "flash_attention_2", torch.bfloat16, 4


def compared(
    given: Given,
    label: str,
    timed: Timed,
    attention: str,
    dtype: torch.dtype,
    order: Sequence[Task],
    on_cpu: dict[str, Tensor],
) -> None:
    """Notes what a new wrapper does with sweeps in an order."""
    copies = [copied(timed.model, attention, dtype) for _ in range(2)]
    ours = Ours(HookedVLM(copies[0], timed.model.processor, name=timed.name))
    loop = HookLoop(copies[1])
    engines, hooks, cpu = [], [0.0], [0.0]
    for task in order:
        task = in_dtype(task, dtype)
        with torch.no_grad():
            found, bare = ours.run(task), loop.run(task).float().cpu()
        engines.append(f"{task.name}: {ours.note}")
        hooks.append(apart(found, bare))
        if task.name in on_cpu:  # less what bare hooks on this device are apart from the CPU
            there = on_cpu[task.name]
            cpu.append(max(0.0, apart(found, there) - apart(bare, there)))
    growing = [note.split(": ")[1].split(" ")[0] == GROWING for note in engines]
    slow = "; ".join(note for note, fast in zip(engines, growing, strict=True) if not fast)
    # On a CPU small models may be faster another way.
    correct = all(growing) if given.on_gpu else None
    shown = f"{sum(growing)} of {len(growing)}"
    given.note(f"{label}: growing", shown, correct=correct, note=slow[:300])
    bound = BOUNDS[dtype]
    worst = worst_of(hooks)
    note = f"at most {bound:.0e}"
    given.note(f"{label}: apart from bare hooks", worst, correct=worst <= bound, note=note)
    if on_cpu:
        worst = worst_of(cpu)
        what = f"{label}: further from the CPU than bare hooks"
        given.note(what, worst, correct=worst <= bound, note=note)


def worst_of(found: Sequence[float]) -> float:
    """Returns the largest; infinity where one is no number."""
    return max(float("inf") if x != x else x for x in found)


def copied(model: HookedVLM, attention: str, dtype: torch.dtype) -> Any:
    """Returns modules of their own with the same weights, with some attention and dtype."""
    if dtype == model.cfg.dtype:
        made: Any = twin(model.hf_model)
    else:  # a twin's weights are the model's own, and would change with it
        made = copy.deepcopy(model.hf_model).to(dtype)
    made.set_attn_implementation(attention)
    return made


def in_dtype(task: Task, dtype: torch.dtype) -> Task:
    """Returns a task with pixels in a dtype."""
    clean, source = (
        {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        for inputs in (task.clean, task.source)
    )
    return Task(task.name, clean, source, task.cells, task.zeroed, task.removed)


def answers_on_cpu(timed: Timed, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Returns the answers of bare hooks on the CPU, by sweep."""
    found = {}
    loop = HookLoop(zoo.load(timed.name)[0])  # as it is loaded: on the CPU, in float32
    for task in tasks:
        clean, source = (
            {name: x.cpu() for name, x in inputs.items()} for inputs in (task.clean, task.source)
        )
        moved = Task(task.name, clean, source, task.cells, task.zeroed, task.removed)
        with torch.no_grad():
            found[task.name] = loop.run(moved)
    return found
