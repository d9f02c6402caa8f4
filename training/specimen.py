"""Trains a recipe of the study larger, for a model that ships.

    python -m training.specimen captions --study training/runs --out specimen

It begins as a model of the study: the recipe's, with 12 blocks in the language model, is taken from
the study's folder or trained there.  Its training then goes on with pictures of 12x12 visual tokens
instead of 6x6 and the recipe's ingredients.  An encoder that is trained by itself goes on by itself
with the larger pictures first.  The run resumes; the folder has the model in bfloat16, its
processor, log and `training.json`, which is written last.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from training.batches import Encoder
from training.build import build_processor
from training.loop import Loop, Schedule
from training.recipes import RECIPES, SEEDS, EncoderTraining, Recipe
from training.study import (
    LAYOUT,
    about_run,
    accuracy,
    fresh_model,
    rates_of,
    take_encoder,
    train_encoder,
    train_model,
    trained_encoder,
    training_loss,
)
from training.train import Stage, carry_over, save_all


BLOCKS = 12
STAGE = Stage(12, 400, 0.005, 1e-3)
"""On the larger pictures."""
ENCODER_STEPS = 400
"""Of an encoder that is trained by itself, on the larger pictures, at half of its rates."""


def train(
    recipe: Recipe,
    seed: int,
    study: Path,
    out: Path,
    stage: Stage = STAGE,
    encoder_steps: int = ENCODER_STEPS,
) -> Path:
    """Trains a recipe's larger model, or goes on; returns its folder."""
    recipe = larger(recipe)
    more = {"stage": asdict(stage), "encoder_steps": encoder_steps}
    about = about_run({**asdict(recipe), **more}, seed)
    small = train_model(recipe, seed, study)
    processor = build_processor(LAYOUT, stage.geometry.canvas, is_fixed=True)
    encoder = Encoder(processor)
    model = fresh_model(encoder, 1000 + seed, recipe.blocks, stage.geometry)
    begun = AutoModelForImageTextToText.from_pretrained(
        small, use_safetensors=True, local_files_only=True
    )
    carry_over(begun, model)
    if recipe.encoder is not None:
        start = trained_encoder(recipe.encoder, seed, study)
        training, folder = _on(recipe.encoder, encoder_steps), out / "encoder"
        take_encoder(model, train_encoder(training, seed, folder, stage.geometry, start))
    rated = replace(recipe, muon_lr=stage.muon_lr, adam_lr=stage.adam_lr)
    schedule = Schedule(stage.steps, stage.warmup, stage.floor)
    columns = {"what": f"model, {stage.n_tokens} tokens"}
    loop = Loop(out, model, rates_of(model, rated), schedule, columns=columns, recipe=about)
    loop.run(*losses(recipe, stage, model, encoder, seed))
    save_all(model.eval().to(torch.bfloat16), processor, out)
    (out / "training.json").write_text(about + "\n")
    return out


def larger(recipe: Recipe) -> Recipe:
    """Returns a recipe with the larger language model: the study's own one where it has it.

    >>> larger(RECIPES["captions"]).name, larger(RECIPES["contrastive"]).name
    ('captions-deep', 'contrastive-12')
    """
    wanted = replace(recipe, blocks=BLOCKS)
    for known in RECIPES.values():
        if replace(known, name=recipe.name, varies=recipe.varies) == wanted:
            return known
    return replace(wanted, name=f"{recipe.name}-{BLOCKS}")


def _on(training: EncoderTraining, steps: int) -> EncoderTraining:
    """Returns how an encoder is trained on larger pictures: at half of the rates."""
    rates = {"muon_lr": training.muon_lr / 2, "adam_lr": training.adam_lr / 2}
    return replace(training, steps=steps, **rates)


def losses(
    recipe: Recipe, stage: Stage, model: Any, encoder: Encoder, seed: int
) -> tuple[Callable[[int], Tensor], Callable[[int], float]]:
    """Returns the loss of a step, and the accuracy after one, by its number."""

    def loss(step: int) -> Tensor:
        rng = random.Random(f"specimen/{seed}/{step}")
        return training_loss(model.train(), encoder, recipe, rng, stage.geometry)

    def check(step: int) -> float:
        rng = random.Random(f"check/{seed}/{step}")
        return accuracy(model.eval(), encoder, rng, geometry=stage.geometry)

    return loss, check


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--study", type=Path, required=True, help="folder of training.study")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, choices=SEEDS, default=0)
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    train(recipe, arguments.seed, arguments.study, arguments.out)


if __name__ == "__main__":
    main()
