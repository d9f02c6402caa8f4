"""Images that the vision encoder runs on in experiments of the paper, with sharing and without.

    python -m benchmarks.encodings [--model tiny-qwen2-vl] [--pairs 10] [--json FILE]

Each experiment runs twice, by itself and inside `shared_runs`; `distinct` counts images by their
pixels.  Below stands what an image costs at published sizes, counted and not run.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.built import on_meta
from hooked_vlm import HookedVLM, shared_runs
from hooked_vlm.engine.fingerprints import content_of
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.options import Config
from hooked_vlm.hooks.stand_ins import encoder_of
from hooked_vlm.report.job import Job, own
from hooked_vlm.sweeps.plan import costs_of


TEXT = 40
"""Positions of a prompt beside its image."""
EXPERIMENTS = (
    "final-token",
    "strip-swap",
    "swap-under-ablation",
    "ordering-ablation",
    "redundancy",
)


@dataclass
class Count:
    """Images of an experiment."""

    encoded: int = 0
    distinct: set[Any] = field(default_factory=set)


@contextmanager
def counting(encoder: nn.Module) -> Iterator[Count]:
    """Counts an encoder's images; its own forward on the class, where a stand-in finds it."""
    count, kind = Count(), type(encoder)
    forward = kind.forward

    @wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = images_of(args, kwargs)
        count.encoded += len(found)
        count.distinct.update(content_of(image) for image in found)
        return forward(self, *args, **kwargs)

    kind.forward = run  # type: ignore[method-assign]
    try:
        yield count
    finally:
        kind.forward = forward  # type: ignore[method-assign]


def images_of(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the pixels of each image in a call; images of one size, one after the other."""
    pixels = args[0] if args else kwargs["pixel_values"]
    grid = kwargs.get("grid_thw")
    return list(pixels.chunk(len(pixels if grid is None else grid)))


def costs() -> Iterator[str]:
    """Yields operations for an image and for the language model's pass, at the paper's canvases."""
    for name, side in (("Qwen2-VL-7B", 12), ("Gemma-3-4b", 16)):
        model = HookedVLM(on_meta(name), name=name)
        vision = model.cfg.vision
        assert vision is not None
        config: Any = model.hf_model.config
        ids = torch.full((1, side * side + TEXT), 100)
        ids[:, 4 : 4 + side * side] = config.image_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.anatomy.vision and model.anatomy.vision.packed:
            inputs["image_grid_thw"] = torch.tensor([[1, 2 * side, 2 * side]])
            inputs["pixel_values"] = torch.zeros(4 * side * side, 6 * vision.patch_size**2)
        else:
            inputs["pixel_values"] = torch.zeros(
                1, 3, vision.image_size or 0, vision.image_size or 0
            )
        found, length = costs_of(model, inputs), ids.shape[1]
        passed = found.rows(1, length, length)
        yield (
            f"{name}: {found.vision / 1e12:.1f} TFLOP for an image, {passed / 1e12:.1f} for the "
            f"language model's pass over {length} positions ({found.vision / passed:.1f} times)"
        )


def main() -> None:
    """Prints one line for each experiment."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = HookedVLM.from_pretrained(given.model)
    encoder = encoder_of(model)
    assert encoder is not None
    found = {}
    print("| experiment | images without sharing | with | distinct |\n|---|---:|---:|---:|")
    for name in EXPERIMENTS:
        (step,) = registry.steps(name)
        config = own(Job(name, given.model, Path(), config=Config(pairs=given.pairs)), step)
        counts = []
        for sharing in (nullcontext(), shared_runs(model)):
            with warnings.catch_warnings(), counting(encoder) as count, sharing:
                warnings.simplefilter("ignore")
                step.experiment.run(model, config, lambda *_: None)
            counts.append(count)
        row = [*(count.encoded for count in counts), len(counts[0].distinct)]
        found[name] = dict(zip(("alone", "shared", "distinct"), row, strict=True))
        print(f"| {name} | {' | '.join(f'{n:,}' for n in row)} |", flush=True)
    for said in costs():
        print(said)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
