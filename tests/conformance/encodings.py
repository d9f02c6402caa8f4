"""Which architectures' images may be encoded by themselves, and what sharing them changes.

    python tests/conformance/encodings.py [model_type ...]

Two images in a batch, three batches that have images in common, inside `shared_runs` and without.
"""

import sys
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, beside the tests it shares

import torch
import transformers

from conformance.exceptions import NOT_SERVED
from conformance.suite import _lengthen, build, image_size, picture
from conformance.tiny import architectures
from hooked_vlm import shared_runs


BATCHES = ((0, 1), (1, 2), (0, 1))


@torch.no_grad()
def shared(model_type: str) -> tuple[bool, float]:
    """Returns whether images were taken one by one, and how far off logits are by it at most."""
    model = build(model_type)
    size = image_size(model)
    batches = []
    for seeds in BATCHES:
        pictures = [picture(*size, seed=seed) for seed in seeds]
        batches.append(model.prepare(pictures, ["What is this?"] * 2))
        _lengthen(batches[-1])
        batches[-1].tensors.pop("labels", None)
    plain = [model(inputs) for inputs in batches]
    with shared_runs(model) as runs:
        found = [model(inputs) for inputs in batches[:2]]
        by_image = runs.reused > 0  # as wholes, the two have nothing in common
        found.append(model(batches[2]))
    off = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, plain, strict=True)]
    return by_image, max(off)


def main() -> None:
    """Prints a line for each architecture, and how many there are of each kind."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or [name for name in architectures() if name not in NOT_SERVED]
    found = {}
    for name in names:
        found[name] = shared(name)
        by_image, off = found[name]
        print(
            f"{name}: {'by image' if by_image else 'batches whole'}, off by {off:.1e}", flush=True
        )
    worst = max(off for _, off in found.values())
    print(
        f"{sum(ok for ok, _ in found.values())} of {len(found)} by image; off by {worst:.1e} most"
    )


if __name__ == "__main__":
    main()
