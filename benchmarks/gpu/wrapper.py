"""Part 8: what the wrapper, a hook and a cache cost, as ratios to the plain model's pass."""

import warnings

import numpy as np
import torch

from benchmarks.gpu.given import Given
from benchmarks.gpu.workload import dtype_for, inputs_on, setting_for
from benchmarks.wrapper import by_torch_hooks, is_residual, look, pairs


NAME = "Qwen2-VL-7B"


def run(given: Given) -> None:
    """Notes medians of ratios, each pass beside a plain one."""
    setting = setting_for(NAME, given.tiny)
    model = setting.build(given.device, dtype_for(given.tiny))
    inputs = inputs_on(given, model, setting, 1, 0)
    hf_model = model.hf_model
    middle = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    names = [name for name in model.hook_names if is_residual(name)]

    def plain() -> object:
        return hf_model(**inputs)

    ways = {
        "plain": plain,  # against itself: the noise
        "no hooks": lambda: model(inputs),
        "one hook that reads": lambda: model.run_with_hooks(inputs, [(middle, look)]),
        "cache of residuals": lambda: model.run_with_cache(inputs, names),
        "bare hooks": lambda: by_torch_hooks(model, names, plain),
        "cache of attention patterns": lambda: model.run_with_cache(
            inputs, "blocks.*.attn.hook_pattern"
        ),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that patterns run eager attention
        found = pairs(ways, 1 if given.tiny else 7)
    clock = 1  # what the wall shows, and not the processor
    ratios = {
        name: float(np.median(seconds[:, 0, clock] / seconds[:, 1, clock]))
        for name, seconds in found.items()
    }
    given.note("plain pass, s", float(np.median(found["plain"][:, 0, clock])))
    given.note("plain ÷ plain", ratios["plain"])
    for name in ("no hooks", "one hook that reads", "cache of attention patterns"):
        given.note(f"{name} ÷ plain", ratios[name])
    given.note(
        "cache of residuals ÷ bare hooks", ratios["cache of residuals"] / ratios["bare hooks"]
    )
