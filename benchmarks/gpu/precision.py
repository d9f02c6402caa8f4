"""Part 7: float32 with and without TF32: the engine that runs, its error and its seconds."""

import torch

from benchmarks.gpu.given import Given
from benchmarks.gpu.sweep_speed import LATE, note_engine
from benchmarks.gpu.turns import apart, in_turns
from benchmarks.gpu.workload import TOOLS, setting_for, tasks_for, tools_for
from hooked_vlm import HookedVLM
from hooked_vlm.engine.noise import BOUNDS


NAME = "Qwen2-VL-7B"
WAYS = {"fp32": "highest", "TF32": "high"}


def run(given: Given) -> None:
    """Notes a strip sweep on one pair in both ways; errors are against bare hooks in float32."""
    setting = setting_for(NAME, given.tiny)
    model = setting.build(given.device, torch.float32)
    (task,) = tasks_for(given, model, setting, ("strip",), 1)
    before, exact = torch.get_float32_matmul_precision(), None
    try:
        for label, precision in WAYS.items():
            torch.set_float32_matmul_precision(precision)
            what = f"{NAME} strip, {label}"
            # A new wrapper, so that every way is verified anew.
            tools = tools_for(HookedVLM(model.hf_model, name=model.cfg.model_name))
            runs = {who: lambda tool=tools[who]: tool.run(task) for who in TOOLS[:2]}
            with torch.no_grad():
                found = in_turns(given, runs, given.left / 4, 3)
            if not found.n:
                given.note(what, LATE)
                return
            for who in TOOLS[:2]:
                given.note(f"{what}: {who}, s", found.median(who))
            given.note(f"{what}: careful ÷ ours", found.ratio("careful", "ours"))
            note_engine(given, what, tools["ours"])
            exact = found.answers["careful"] if exact is None else exact
            bare = apart(found.answers["careful"], exact)
            given.note(f"{what}: bare hooks, apart from fp32", bare)
            most = BOUNDS[torch.float32] + 4 * bare
            given.note(
                f"{what}: ours, apart from fp32", apart(found.answers["ours"], exact), most=most
            )
    finally:
        torch.set_float32_matmul_precision(before)
