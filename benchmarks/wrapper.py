"""What wrapping, hooking, caching and patching cost over the plain transformers model.

    python -m benchmarks.wrapper [MODEL …] [--batch 1] [--repeats 20] [--device cpu]

MODEL is `qwen2-vl` or `gemma-3` (12 blocks of width 512, random weights), a shipped
model, a folder or a hub name; by default the first two and the smallest shipped one, for
which the arithmetic hides least.  Prints a table for each model and batch: milliseconds
of each way to run, and its ratio to the plain pass, with 20th and 80th percentiles.
Every pass is timed next to a plain one, in turns before and after it, and ratios are
taken pair by pair, so that a machine that slows down slows both.  On one thread of a CPU
the time is that in which the process worked, which other processes disturb less; else,
and in the last column, it is the clock's.  First, unless `--no-construction`: how long
wrapping takes for the sizes of published models, and the memory that it takes.  Nothing
is asserted: times are this machine's.

Beside the library's ways stand the same activations taken by bare PyTorch hooks (the
least that it can cost), by transformers' `output_hidden_states`, and, where it is
installed and knows the architecture, by TransformerLens's bridge.
"""

import argparse
import gc
import platform
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks.common.built import LAYERS, REAL, build, make_inputs, on_meta
from benchmarks.common.parts import twin
from benchmarks.throughput import rivals
from benchmarks.throughput.tasks import Cannot
from hooked_vlm import HookedVLM, LastToken, Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.squares import draw


QUESTION = "The color of the square to the left of the green square is "
Ways = dict[str, Callable[[], object]]


def is_residual(name: str) -> bool:
    """Whether a site is the residual stream of a block, in either tower."""
    return "blocks." in name and ".hook_resid_" in name


def load(name: str, device: str) -> HookedVLM:
    """Returns the wrapped model that a name stands for."""
    if name in LAYERS:
        return HookedVLM(build(name).to(device), name=name)
    return HookedVLM.from_pretrained(name, device=device)


def inputs_for(model: HookedVLM, batch: int, other: bool = False) -> Mapping[str, Tensor]:
    """Returns inputs of `batch` equal prompts, or of others that differ from them."""
    if model.processor is None:
        made = make_inputs(model.cfg.model_name, batch, seed=int(other))
        return {key: value.to(model.device) for key, value in made.items()}
    vision = model.require_vision()
    squares = geometry_for(12, vision.patch_size * vision.merge)
    colors = ["red", "green", "blue"]
    picture = draw(colors[::-1] if other else colors, "horizontal", squares)
    return model.prepare([picture] * batch, [QUESTION] * batch)


def ways(model: HookedVLM, batch: int) -> Ways:
    """Returns the things to time, by name; the first is what the others are compared with."""
    inputs, other = inputs_for(model, batch), inputs_for(model, batch, other=True)
    hf_model, tensors = model.hf_model, dict(inputs)
    collecting, eager = _copy(hf_model), _copy(hf_model, "eager")
    middle = model.cfg.n_layers // 2
    site = f"blocks.{middle}.hook_resid_post"
    source = record(model, other, site)
    posts = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    every = [name for name in model.hook_names if is_residual(name)]

    def plain() -> object:
        return hf_model(**tensors)

    def patched(source: Any) -> Callable[[], object]:
        patch = Patch(site, at=LastToken(), source=source)
        return lambda: model.run_with_hooks(inputs, [patch])

    return {
        "transformers, no wrapper": plain,  # against itself: the noise
        "no hooks": lambda: model(inputs),
        "one hook that reads": lambda: model.run_with_hooks(inputs, [(site, look)]),
        "one patch, from a recorded run": patched(source),
        "one patch, its source run included": patched(other),
        "cache: LM residual after every block": lambda: model.run_with_cache(inputs, posts),
        "— bare PyTorch hooks": lambda: by_torch_hooks(model, posts, plain),
        "— `output_hidden_states=True`": lambda: collecting(**tensors, output_hidden_states=True),
        **_transformer_lens(model, tensors),
        "cache: every residual, both towers": lambda: model.run_with_cache(inputs, every),
        "— bare PyTorch hooks, both towers": lambda: by_torch_hooks(model, every, plain),
        "cache: LM attention patterns": lambda: model.run_with_cache(
            inputs, "blocks.*.attn.hook_pattern"
        ),
        "— eager, `output_attentions=True`": lambda: eager(**tensors, output_attentions=True),
        "cache: everything": lambda: model.run_with_cache(inputs),
    }


def look(activation: Any, hook: object) -> None:
    pass


def by_torch_hooks(model: HookedVLM, names: Sequence[str], run: Callable[[], object]) -> object:
    """Returns what flows at some sites, as it flows there, by PyTorch hooks alone."""
    found: dict[str, Tensor] = {}

    def store(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).detach()

    def before(name: str) -> Callable:
        return lambda _, args, kwargs: store(name, args or next(iter(kwargs.values())))

    def after(name: str) -> Callable:
        return lambda _, args, output: store(name, output)

    handles = []
    for name in names:
        site = model.sites[name]
        module = model.hf_model.get_submodule(site.module)
        handles.append(
            module.register_forward_hook(after(name))
            if site.tap == "output"
            else module.register_forward_pre_hook(before(name), with_kwargs=True)
        )
    try:
        return run(), found
    finally:
        for handle in handles:
            handle.remove()


def _copy(hf_model: nn.Module, attention: str | None = None) -> Any:
    """Returns a twin of a model, where asked with another attention."""
    copied = twin(hf_model)
    if attention is not None:
        copied.set_attn_implementation(attention)
    return copied


def _transformer_lens(model: HookedVLM, tensors: Mapping[str, Tensor]) -> Ways:
    """Returns the same LM residuals by TransformerLens's bridge over a copy of the model."""
    try:
        rivals.require("transformer-lens")
    except rivals.MissingRivalError:
        print("TransformerLens is not installed: skipped.\n")
        return {}
    from benchmarks.throughput.rivals.lens import bridged

    try:
        bridge = bridged(_copy(model.hf_model))
    except Cannot as reason:
        print(f"TransformerLens does not take this model: {reason}\n")
        return {}
    given = {name: value for name, value in tensors.items() if name != "input_ids"}

    def residuals() -> object:
        names = [f"blocks.{layer}.hook_out" for layer in range(model.cfg.n_layers)]
        return bridge.run_with_cache(tensors["input_ids"], names_filter=names, **given)

    return {
        "— TransformerLens, no hooks": lambda: bridge(tensors["input_ids"], **given),
        "— TransformerLens, `run_with_cache`": residuals,
    }


# --- time ---------------------------------------------------------------------------------


def pairs(timed: Ways, repeats: int) -> dict[str, np.ndarray]:
    """Returns for each way `[repeat, 2, 2]`: its seconds and those of the plain pass beside it,
    each on the processor and on the wall."""
    plain = next(iter(timed.values()))
    found: dict[str, list] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, run in timed.items():
            beside = _seconds(plain) if repeat % 2 else None
            own = _seconds(run)
            beside = beside or _seconds(plain)
            if repeat:  # the first one warms up
                found[name].append((own, beside))
    return {name: np.array(values) for name, values in found.items()}


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Returns how long a pass takes: seconds of this process's work, and of the clock."""
    with torch.no_grad():
        worked, start = time.process_time(), time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() - worked, time.perf_counter() - start


def time_passes(model: HookedVLM, batch: int, repeats: int) -> str:
    """Returns the table of one model and batch, in Markdown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that patterns run eager attention
        timed = ways(model, batch)
        found = pairs(timed, repeats)
    tensors = inputs_for(model, batch)
    n_parameters = sum(p.numel() for p in model.hf_model.parameters())
    lines = [
        f"**{model.cfg.model_name}**, {n_parameters / 1e6:.0f} M parameters, {model.cfg.n_layers} "
        f"blocks of width {model.cfg.d_model}, batch {batch} x {tensors['input_ids'].shape[1]} "
        f"tokens, {repeats} repeats",
        "",
        "| run | ms | 20–80 % | ratio | 20–80 % | ratio by the clock |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    clock = int(model.device.type != "cpu" or torch.get_num_threads() > 1)
    for name, seconds in found.items():
        low, ms, high = np.quantile(seconds[:, 0, clock], [0.2, 0.5, 0.8]) * 1e3
        ratios = seconds[:, 0] / seconds[:, 1]
        least, ratio, most = np.quantile(ratios[:, clock], [0.2, 0.5, 0.8])
        lines.append(
            f"| {name} | {ms:.1f} | {low:.1f}–{high:.1f} | {ratio:.3f} | {least:.2f}–{most:.2f} "
            f"| {np.median(ratios[:, 1]):.2f} |"
        )
    return "\n".join(lines)


# --- construction -------------------------------------------------------------------------


def construction(name: str) -> str:
    """Returns a row on wrapping a published model on the meta device, for a fresh process."""
    torch.set_num_threads(1)
    built = [_timed(lambda: on_meta(name)) for _ in range(6)]
    hf_model = built[-1][1]
    seconds = float(np.median([taken for taken, _ in built[1:]]))
    first, model = _timed(lambda: HookedVLM(hf_model))
    again = float(np.median([_timed(lambda: HookedVLM(hf_model))[0] for _ in range(5)]))
    n_parameters = sum(p.numel() for p in hf_model.parameters())
    return (
        f"| {name} | {n_parameters / 1e9:.1f} G | {model.cfg.n_layers} + "
        f"{model.require_vision().n_layers} | {len(model.sites)} | {seconds:.2f} s | "
        f"{first:.2f} s | {again:.2f} s | {first / seconds:.2f} | {again / seconds:.2f} |"
    )


def _timed(make: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    made = make()
    return time.perf_counter() - start, made


def memory(name: str) -> str:
    """Returns a row on the memory that wrapping one model takes."""
    hf_model = build(name)
    HookedVLM(hf_model)  # so that modules are imported and sources are read
    before = {n: p.data_ptr() for n, p in hf_model.named_parameters()}
    wrappers = []
    gc.collect()
    resident = _resident()
    with _traced() as traced:
        wrappers.append(HookedVLM(hf_model))
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    size -= traced
    wrappers += [HookedVLM(hf_model) for _ in range(9)]
    gc.collect()
    grown = _resident() - resident
    moved = sum(p.data_ptr() != before[n] for n, p in hf_model.named_parameters())
    n_sites = len(wrappers[0].sites)
    weights = sum(p.nbytes for p in hf_model.parameters())
    return (
        f"| {name} | {weights / 1e6:.0f} MB in {len(before)} tensors | {moved} | "
        f"{n_sites} | {size / 1e3:.0f} kB | {size / n_sites / 1e3:.1f} kB | {grown / 1e4:.0f} kB |"
    )


@contextmanager
def _traced() -> Iterator[int]:
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def _resident() -> int:
    """Returns the bytes of memory that this process has in use; 0 where psutil is missing."""
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss


def print_construction() -> None:
    print(
        "| model | parameters | blocks | sites | built on `meta` | wrapped, first time | again "
        "| ratio, first | again |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in REAL:
        # A process of its own, so that no source of a module has been read before.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            print(pool.submit(construction, name).result(), flush=True)
    print(
        "\n| model | weights | moved | sites | Python objects | for a site | resident, each of 10 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in LAYERS:
        print(memory(name), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*LAYERS, "tiny-qwen2-vl"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-construction", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.device}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n",
        flush=True,
    )
    if not arguments.no_construction:
        print_construction()
    for name in arguments.models:
        model = load(name, arguments.device)
        for batch in arguments.batch:
            print(f"\n{time_passes(model, batch, arguments.repeats)}", flush=True)


if __name__ == "__main__":
    main()
