"""What wrapping, caching and patching cost over the plain transformers forward pass.

    python benchmarks/hook_overhead.py [MODEL] [--repeats 30] [--batch 8]

Prints, for each way of running the same batch, the median time of one forward pass with
its 20th and 80th percentiles, and the ratio of the medians to the plain pass.  Ways are
interleaved, so that a machine that slows down slows all of them.  Nothing is asserted:
times are this machine's, and small models make overheads look large.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

from hooked_vlm import HookedVLM, Patch
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.squares import draw


QUESTION = "The color of the square to the left of the green square is "


def ways(model: HookedVLM, batch: int) -> dict[str, Callable[[], object]]:
    """Returns the things to time, by name; the first is what the others are compared with."""
    assert model.cfg.vision is not None
    squares = geometry_for(12, model.cfg.vision.patch_size * model.cfg.vision.merge)
    clean = draw(["red", "green", "blue"], "horizontal", squares)
    mirror = draw(["blue", "green", "red"], "horizontal", squares)
    inputs = model.prepare([clean] * batch, [QUESTION] * batch)
    other = model.prepare([mirror] * batch, [QUESTION] * batch)
    tensors = dict(inputs)
    residuals = "blocks.*.hook_resid_post"
    patterns = "blocks.*.attn.hook_pattern"
    patch = Patch(1, at=squares.strip_region("horizontal", 0), source=other)
    return {
        "transformers": lambda: model.hf_model(**tensors),
        "wrapped, no hooks": lambda: model(inputs),
        "one hook that reads": lambda: model.run_with_hooks(inputs, [("hook_embed", _look)]),
        "cache: residuals of all layers": lambda: model.run_with_cache(inputs, residuals),
        "cache: attention patterns of all layers": lambda: model.run_with_cache(inputs, patterns),
        "cache: everything": lambda: model.run_with_cache(inputs),
        "one patch, its source run included": lambda: model.run_with_hooks(inputs, [patch]),
    }


def _look(activation: torch.Tensor, hook: object) -> None:
    pass


def seconds(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Returns the times of each way, one for every repeat, after one run to warm up."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            with torch.no_grad():
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-qwen2-vl")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model = HookedVLM.from_pretrained(arguments.model, device=arguments.device)
    found = seconds(ways(model, arguments.batch), arguments.repeats)
    plain = float(np.median(next(iter(found.values()))))
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.repeats} repeats, "
        f"{model.device}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{'':<42}{'median ms':>9}{'p20':>9}{'p80':>9}{'ratio':>8}")
    for name, times in found.items():
        low, middle, high = np.quantile(times, [0.2, 0.5, 0.8]) * 1e3
        print(
            f"{name:<42}{middle:>6.1f} ms{low:>6.1f} ms{high:>6.1f} ms{middle / 1e3 / plain:>8.2f}"
        )


if __name__ == "__main__":
    main()
