"""Reads colours and places off the encoders of the study, at the cells of objects.

    python -m training.places --out training/runs

A linear probe is fitted to the visual token under an object's middle, before the projector, on
pictures of squares as the models are taught on.  It reads the object's colour, and the column and
the row of the token.  Beside each encoder stands one with the first weights of its seed: position
embeddings alone may tell where a token is.  A frozen encoder whose tokens do not tell colours and
places apart cannot be made up for by a language model.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hooked_vlm.analysis.probes import Examples, held_out_accuracy, split_by_image
from training.batches import Encoder, normalised, packed_patches
from training.build import MERGE, PATCH, build_processor
from training.recipes import N_TOKENS
from training.study import EXTRA_COLORS, GEOMETRY, LAYOUT, fresh_model, take_encoder
from training.tasks import Scene, training_scene, training_triples


PICTURES = 400
FILE = "encoder.safetensors"
CELL = PATCH * MERGE
READ: dict[str, Callable[[Scene, int], Any]] = {
    "colour": lambda scene, place: scene.triple[place],
    "column": lambda scene, place: _cell(scene, place)[0],
    "row": lambda scene, place: _cell(scene, place)[1],
}


def _cell(scene: Scene, place: int) -> tuple[int, int]:
    """Returns column and row of the token under an object's middle."""
    x0, y0, x1, y1 = scene.boxes[place]
    return (x0 + x1) // 2 // CELL, (y0 + y1) // 2 // CELL


def tokens_of(visual: Any, scenes: list[Scene]) -> Tensor:
    """Returns the encoder's tokens `[picture, row, column, d]`, before the projector.

    Each is the mean over the patches that the projector merges.
    """
    images = np.stack([scene.render(GEOMETRY.canvas) for scene in scenes])
    patches = packed_patches(normalised(images))
    grid = torch.tensor([[1, *[N_TOKENS * MERGE] * 2]] * len(scenes))
    with torch.no_grad():
        hidden = visual(patches, grid_thw=grid).last_hidden_state
    cells = rearrange(hidden, "(b n m) d -> b n m d", b=len(scenes), m=MERGE * MERGE).mean(2)
    return rearrange(cells, "b (y x) d -> b y x d", y=N_TOKENS)


def read(visual: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Returns a row for each label: held-out accuracy of its probe, over pictures, and chance.

    Chance is the share of the most frequent label among the pictures that are tested.
    """
    rng, triples = random.Random(f"places/{seed}"), training_triples()
    scenes = [training_scene(rng, triples, GEOMETRY, EXTRA_COLORS) for _ in range(PICTURES)]
    tokens = torch.cat([tokens_of(visual, scenes[i : i + 40]) for i in range(0, PICTURES, 40)])
    things = [(i, place) for i in range(PICTURES) for place in range(len(scenes[i].boxes))]
    X = torch.stack([tokens[i, y, x] for i, k in things for x, y in [_cell(scenes[i], k)]])
    train, test = split_by_image(PICTURES, seed=seed)
    rows = []
    for label, of in READ.items():
        _, y = np.unique([of(scenes[i], place) for i, place in things], return_inverse=True)
        examples = Examples(X, y, np.array([i for i, _ in things]), np.arange(len(things)))
        fitted, held_out = examples.of_images(train), examples.of_images(test)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
        probe.fit(fitted.X, fitted.y)
        accurate = held_out_accuracy(probe, held_out, seed=seed)
        chance = np.bincount(held_out.y).max() / len(held_out.y)
        numbers = {"accuracy": accurate.estimate, "low": accurate.low, "high": accurate.high}
        rows.append({"label": label, **numbers, "chance": chance, "n": len(test)})
    return rows


def encoder_of(seed: int, weights: Path | None) -> Any:
    """Returns an encoder with the first weights of a seed, or with those of a file."""
    processor = build_processor(LAYOUT, GEOMETRY.canvas, is_fixed=True)
    model = fresh_model(Encoder(processor), seed, 1)
    if weights is not None:
        take_encoder(model, weights)
    return model.model.visual.eval()


def main() -> None:
    """Reads every finished encoder of a folder and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    rows = []
    for about in sorted(out.glob("encoders/*/training.json")):
        seed = json.loads(about.read_text())["seed"]
        for name, file in (("first weights", None), ("trained", about.parent / FILE)):
            found = read(encoder_of(seed, file), seed)
            rows += [{"encoder": about.parent.name, "weights": name, **row} for row in found]
    if not rows:
        raise SystemExit(f"'{out}/encoders' has no finished encoder: python -m training.study.")
    print(pd.DataFrame(rows).round(3).to_string(index=False))  # noqa: T201


if __name__ == "__main__":
    main()
