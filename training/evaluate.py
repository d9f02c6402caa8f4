"""Measures how often a shipped model answers right.

    python -m training.evaluate tiny-qwen2-vl

Three sets of pictures, each asked in all four directions, the question being the first
turn as in the paper: the paper's layout with every colour triple, the paper's layout with
the triples that training never showed, and layouts that training never showed with those
triples.  An answer is right when the most probable next token of the whole vocabulary,
in lower case and stripped, is the target (protocol 2.4).  Intervals are Wilson's, at 95 %.

Then the other settings, always on triples that training never showed: squares, shapes and
objects, on white, on photographs and scattered (which training never showed either), in the paper's
words and in a second phrasing; and on which side of one object another is, in the words
of COCO-spatial, without a system message.
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
from PIL import Image
from transformers import AutoModelForImageTextToText

from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import Interval, wilson
from hooked_vlm.inputs.without_torchvision import load_processor
from hooked_vlm.stimuli.geometry import Geometry, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import AXIS_OF, DIRECTIONS, OPTIONS, SIDES, side_prompt
from hooked_vlm.stimuli.settings import SCATTERED, SETTINGS, stimulus_set
from hooked_vlm.stimuli.squares import COLORS
from hooked_vlm.zoo import available, load
from training.batches import Batch, Encoder
from training.build import MERGE, PATCH
from training.scenes import held_out_objects
from training.tasks import Scene, Turn, canonical_scene, held_out_triples, jittered_scene
from training.train import answer_logits, first_answers


SETS = ("paper's layout", "unseen triples", "unseen triples and layouts")
CANVAS = 192
"""Of pictures for a model that takes any size."""
TOKEN_PX = PATCH * MERGE
LAYOUTS_PER_TRIPLE = 5


@dataclass(frozen=True)
class Row:
    """The accuracy of a model on one set of pictures in one direction."""

    pictures: str
    direction: str
    accuracy: Interval


def tokens_of(processor: Any) -> int:
    """Returns the visual tokens on a side of the pictures that a model is asked about.

    >>> tokens_of(load("tiny-gemma-3")[1])
    12
    """
    size = processor.image_processor.size
    least, most = (size.get(f"{name}_edge") for name in ("shortest", "longest"))
    canvas = size.get("height") or (int(least**0.5) if least == most else CANVAS)
    return canvas // TOKEN_PX


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
    geometry, encoder = geometry_for(tokens_of(processor), TOKEN_PX), Encoder(processor)
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


def held_out(name: str, direction: str) -> list[Question]:
    """Returns a setting's items of a direction whose triples training never showed."""
    reserved = held_out_objects() if name.startswith("objects") else held_out_triples()
    return [q for q in stimulus_set(name).items((direction,)) if q.entities in reserved]


def evaluate_settings(model: Any, processor: Any, batch: int = 40) -> list[Row]:
    """Returns the accuracies of every setting and wording, by direction, on unseen triples."""
    n_tokens, encoder = tokens_of(processor), Encoder(processor)
    geometry, rows = geometry_for(n_tokens, TOKEN_PX), []
    for name in (*SETTINGS, *SCATTERED):
        for other_words in (False, True):
            stimuli = stimulus_set(name, other_words=other_words)
            layout = stimuli.layout(n_tokens, TOKEN_PX)
            label = stimuli.title + (", other words" if other_words else "")
            for direction in DIRECTIONS:
                asked = [
                    (stimuli.picture(q, layout), stimuli.prompt(q), q.target)
                    for q in held_out(name, direction)
                ]
                rows.append(_asked(model, encoder, label, direction, asked, batch, system=True))
    for style in SIDES:
        for axis, direction in (("horizontal", "left"), ("vertical", "above")):
            asked = []
            stimuli = stimulus_set("objects")
            for q in held_out("objects", direction)[::2]:
                one, other = (0, 1) if len(asked) % 4 < 2 else (2, 1)
                picture = stimuli.picture(q, geometry)
                for swapped in (False, True):
                    text = side_prompt(q.entities[one], q.entities[other], axis, style, swapped)
                    asked.append((picture, text, OPTIONS[axis][int(one > other)]))
            label = f"Objects, side by {style}"
            words = " or ".join(OPTIONS[axis])
            rows.append(_asked(model, encoder, label, words, asked, batch, system=False))
    return rows


def _asked(
    model: Any,
    encoder: Encoder,
    label: str,
    direction: str,
    asked: Sequence[tuple[Image.Image, str, str]],
    batch: int,
    system: bool,
) -> Row:
    right = 0
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        images = np.stack([np.asarray(picture) for picture, _, _ in part])
        turns = [[(text, answer)] for _, text, answer in part]
        made = encoder.batch(turns, images, [system] * len(part))
        with torch.no_grad():
            logits, _ = answer_logits(model, Batch(made.inputs, first_answers(made)))
        given = top_answer(logits, encoder.tokenizer)
        right += sum(a == normalise(t) for a, (_, _, t) in zip(given, part, strict=True))
    return Row(label, direction, wilson(right, len(asked)))


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
    print()  # noqa: T201
    print(table(evaluate_settings(model, processor)))  # noqa: T201


if __name__ == "__main__":
    main()
