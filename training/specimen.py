"""Trains a recipe of the study larger, for a model that ships.

    python -m training.specimen captions --out specimen

The language model has 12 blocks.  Most steps run on pictures of the study (6x6 visual tokens), the
last ones on pictures of 12x12, with the recipe's ingredients in both.  An encoder that is trained
by itself is trained on by itself on the larger pictures too.  The run resumes; the folder has the
model in bfloat16, its processor, log and `training.json`, which is written last.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    training_loss,
)
from training.train import Stage, carry_over, save_all


BLOCKS = 12
STAGES = (Stage(6, 1000, 0.01, 2e-3), Stage(12, 400, 0.005, 1e-3))
"""Of the model; the first is the study's, but for the number of blocks."""
ENCODER_STEPS = 400
"""Of an encoder that is trained by itself, on the larger pictures, at half of its rates."""


def train(
    recipe: Recipe,
    seed: int,
    out: Path,
    stages: tuple[Stage, ...] = STAGES,
    encoder_steps: int = ENCODER_STEPS,
) -> Path:
    """Trains a recipe's larger model, or goes on; returns its folder."""
    recipe = replace(recipe, blocks=BLOCKS)
    more = {"stages": [asdict(stage) for stage in stages], "encoder_steps": encoder_steps}
    about = about_run({**asdict(recipe), **more}, seed)
    processor = build_processor(LAYOUT, stages[-1].geometry.canvas, is_fixed=True)
    encoder, model, weights = Encoder(processor), None, None
    for index, stage in enumerate(stages):
        made = fresh_model(encoder, 1000 + seed, recipe.blocks, stage.geometry)
        if model is not None:
            carry_over(model, made)
        model = made
        if recipe.encoder is not None:
            training = recipe.encoder if weights is None else _on(recipe.encoder, encoder_steps)
            folder = out / f"encoder-{index}"
            weights = train_encoder(training, seed, folder, stage.geometry, start=weights)
            take_encoder(model, weights)
        stage_loop(recipe, stage, model, out, index, about).run(
            *stage_losses(recipe, stage, model, encoder, f"{seed}/{index}")
        )
    assert model is not None
    save_all(model.eval().to(torch.bfloat16), processor, out)
    (out / "training.json").write_text(about + "\n")
    return out


def _on(training: EncoderTraining, steps: int) -> EncoderTraining:
    """Returns how an encoder is trained on larger pictures: at half of the rates."""
    rates = {"muon_lr": training.muon_lr / 2, "adam_lr": training.adam_lr / 2}
    return replace(training, steps=steps, **rates)


def stage_losses(
    recipe: Recipe, stage: Stage, model: Any, encoder: Encoder, name: str
) -> tuple[Callable[[int], Tensor], Callable[[int], float]]:
    """Returns the loss of a step, and the accuracy after one, by its number."""

    def loss(step: int) -> Tensor:
        rng = random.Random(f"specimen/{name}/{step}")
        return training_loss(model.train(), encoder, recipe, rng, stage.geometry)

    def check(step: int) -> float:
        rng = random.Random(f"check/{name}/{step}")
        return accuracy(model.eval(), encoder, rng, geometry=stage.geometry)

    return loss, check


def stage_loop(recipe: Recipe, stage: Stage, model: Any, out: Path, index: int, about: str) -> Loop:
    """Returns the run of a stage, which goes on from its checkpoint."""
    rated = replace(recipe, muon_lr=stage.muon_lr, adam_lr=stage.adam_lr)
    return Loop(
        out,
        model,
        rates_of(model, rated),
        Schedule(stage.steps, stage.warmup, stage.floor),
        checkpoint=f"stage-{index}.safetensors",
        columns={"stage": str(index), "tokens": str(stage.n_tokens)},
        recipe=about,
    )


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, choices=SEEDS, default=0)
    arguments = parser.parse_args()
    train(RECIPES[arguments.recipe], arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
