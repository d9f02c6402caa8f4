"""Compares what `hooked-vlm plan` predicts with the operations that torch counts in real runs.

    python -m benchmarks.planned [--model tiny-qwen2-vl] [--pairs 4] [EXPERIMENT …]

Each experiment runs alone on the CPU, with few pairs and items.  Operations of the model count,
those of probes do not.  Control passes (once for each kind of sweep) are in the counts and not in
the prediction; with so few pairs they are a large part.
"""

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hooked_vlm import HookedVLM, shared_runs
from hooked_vlm.errors import CannotRunError, HookedVLMWarning
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.options import Config, specialise
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.report.planned import plan_run


FEW = {"items": "2", "images": "16", "alphas": "0,4", "controls": "1", "random_cuts": "1"}
"""Options of experiments, so that they are quick."""
SMALL = {"settings": "squares,shapes", "ks": "2", "gaps": "0", "by": "none"}


def counted(model: HookedVLM, name: str, config: Config, options: Mapping[str, str]) -> float:
    """Returns the operations of the model, and of nothing else, in a run of an experiment."""
    experiment = registry.select(name)
    own = specialise(experiment.config, config, options, experiment.config().setting)
    total, forward = 0, model.hf_model.forward

    @wraps(forward)
    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            try:
                return forward(*args, **kwargs)
            finally:  # a pass that ends after the encoder does so by an exception
                total += counter.get_total_flops()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)
        for setting in own.used_settings or ("squares",):  # grids are measured by gradients
            bound = Setting.of(model, Config(setting=setting))
            bound.inputs(bound.stimuli.items()[:2])
        model.hf_model.forward = counting
        try:
            with shared_runs(model):
                experiment.run(model, own, _nothing)
        finally:
            del model.hf_model.forward
    return float(total)


def _nothing(_done: int, _total: int) -> None:
    """Reports no progress."""


def main() -> None:
    """Prints a row for each experiment."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT")
    given = parser.parse_args()
    names = given.experiments or list(
        dict.fromkeys(member.split(":")[0] for member in registry.SUITES["reproduce"])
    )
    # torch counts no operations of fused attention on the CPU.
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = HookedVLM.from_pretrained(given.model, **how)
    config = Config(pairs=given.pairs)
    print("| experiment | predicted, GFLOP | counted, GFLOP | predicted / counted |")
    print("|---|---:|---:|---:|")
    for name in names:
        known = {field.name for field in fields(registry.select(name).config)}
        options = {key: value for key, value in {**FEW, **SMALL}.items() if key in known}
        plan = plan_run(name, given.model, config=config, options=options)
        try:
            found = counted(model, name, config, options)
        except CannotRunError as error:
            print(f"| {name} | {plan.operations / 1e9:.1f} | {str(error)[:60]} | |", flush=True)
            continue
        ratio = plan.operations / found if found else float("nan")
        row = f"{plan.operations / 1e9:.1f} | {found / 1e9:.1f} | {ratio:.2f} |"
        print(f"| {name} | {row}", flush=True)


if __name__ == "__main__":
    main()
