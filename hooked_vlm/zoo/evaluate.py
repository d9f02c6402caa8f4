"""Measures how often a shipped model answers Squares right.

    python -m hooked_vlm.zoo.evaluate tiny-qwen2-vl

Three sets of pictures, each asked in all four directions, the question being the first
turn as in the paper: the paper's layout with every colour triple, the paper's layout with
the triples that training never showed, and layouts that training never showed with those
triples.  An answer is right when the most probable next token of the whole vocabulary,
in lower case and stripped, is the target (protocol 2.4).  Intervals are Wilson's, at 95 %.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from hooked_vlm.processors import load_processor
from hooked_vlm.scoring import normalise, top_answer
from hooked_vlm.statistics import Interval, wilson
from hooked_vlm.stimuli.geometry import Geometry, geometry_for
from hooked_vlm.stimuli.prompts import AXIS_OF, DIRECTIONS
from hooked_vlm.stimuli.squares import COLORS
from hooked_vlm.zoo import available, load
from hooked_vlm.zoo.batches import Batch, Encoder
from hooked_vlm.zoo.build import MERGE, PATCH
from hooked_vlm.zoo.tasks import (
    Scene,
    Turn,
    canonical_scene,
    held_out_triples,
    jittered_scene,
)
from hooked_vlm.zoo.train import answer_logits, first_answers


SETS = ("paper's layout", "unseen triples", "unseen triples and layouts")
N_TOKENS = 12
LAYOUTS_PER_TRIPLE = 5


@dataclass(frozen=True)
class Row:
    """The accuracy of a model on one set of pictures in one direction."""

    pictures: str
    direction: str
    accuracy: Interval


def scenes(pictures: str, direction: str, geometry: Geometry, seed: int = 0) -> list[Scene]:
    """Returns the pictures of a set: 120, 24 or 120 of them."""
    axis, held_out = AXIS_OF[direction], sorted(held_out_triples())
    if pictures == SETS[0]:
        return [canonical_scene(triple, axis, geometry) for triple in permutations(COLORS, 3)]
    if pictures == SETS[1]:
        return [canonical_scene(triple, axis, geometry) for triple in held_out]
    rng = random.Random(f"{seed}/{direction}")
    return [
        jittered_scene(rng, triple, axis, geometry.canvas, unseen=True)
        for triple in held_out
        for _ in range(LAYOUTS_PER_TRIPLE)
    ]


def question(scene: Scene, direction: str) -> Turn:
    """Returns the question about the middle square in a direction, and its answer."""
    before, after = scene.relations()[:2]
    return before if direction in ("left", "above") else after


def answers(
    model: Any, encoder: Encoder, asked: Sequence[Turn], pictures: Sequence[Scene], canvas: int
) -> list[str]:
    """Returns a model's one-token answers to questions, each the first about its picture."""
    images = np.stack([scene.render(canvas) for scene in pictures])
    batch = encoder.batch([[turn] for turn in asked], images)
    with torch.no_grad():
        logits, _ = answer_logits(model, Batch(batch.inputs, first_answers(batch)))
    return top_answer(logits, encoder.tokenizer)


def evaluate(model: Any, processor: Any, batch: int = 40, seed: int = 0) -> list[Row]:
    """Returns the accuracies of all sets and directions."""
    geometry, encoder = geometry_for(N_TOKENS, PATCH * MERGE), Encoder(processor)
    rows = []
    for pictures in SETS:
        for direction in DIRECTIONS:
            shown = scenes(pictures, direction, geometry, seed)
            asked = [question(scene, direction) for scene in shown]
            given: list[str] = []
            for start in range(0, len(shown), batch):
                part = slice(start, start + batch)
                given += answers(model, encoder, asked[part], shown[part], geometry.canvas)
            right = sum(a == normalise(turn[1]) for a, turn in zip(given, asked, strict=True))
            rows.append(Row(pictures, direction, wilson(right, len(shown))))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns accuracies as a Markdown table."""
    lines = ["| pictures | direction | n | accuracy [95 %] |", "|---|---|---|---|"]
    lines += [f"| {r.pictures} | {r.direction} | {r.accuracy.n} | {r.accuracy} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "model", help=f"one of {', '.join(available())}, or a folder that train wrote"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the unseen layouts")
    arguments = parser.parse_args()
    if Path(arguments.model).is_dir():
        model = AutoModelForImageTextToText.from_pretrained(
            arguments.model, dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()
        processor = load_processor(arguments.model, local_files_only=True)
    else:
        model, processor = load(arguments.model)
    print(table(evaluate(model, processor, seed=arguments.seed)))  # noqa: T201


if __name__ == "__main__":
    main()
