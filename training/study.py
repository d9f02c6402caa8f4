"""Trains the models of the study, recipe by recipe, and goes on where it was ended.

    python -m training.study --out training/runs                     # all recipes, both seeds
    python -m training.study --out training/runs --recipe captions --seed 0

An encoder that several recipes use is trained once for a seed.  `OUT/encoders/` has the encoders,
`OUT/<recipe>-<seed>/` the models with their processors, logs and `training.json`, which says how
each was made and is written last.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hooked_vlm.disk.files import replaced_file
from hooked_vlm.stimuli.geometry import Geometry, geometry_for
from training.batches import Batch, Encoder
from training.build import MERGE, PATCH, build_model, build_processor
from training.captions import FEW_THINGS, MOST_THINGS
from training.loop import Loop, Schedule, muon_and_adam
from training.objectives import TASKS, Shown
from training.recipes import N_TOKENS, RECIPES, SEEDS, EncoderTraining, Recipe
from training.scenes import MixedScene, mixed_conversation, mixed_scene
from training.tasks import (
    Scene,
    conversation,
    held_out_triples,
    training_scene,
    training_triples,
)
from training.train import answer_loss, first_answers, fitted_weights, save_all


LAYOUT = "tiny-qwen3-vl"
GEOMETRY = geometry_for(N_TOKENS, PATCH * MERGE)
VISION = {"depth": 6, "hidden_size": 96, "intermediate_size": 192}
POSITIONS = 2.0
"""Standard deviation of the encoder's first positions: about twice that of a patch's content.

With less, the first steps teach colours, and what blocks write of them covers the positions.
"""
VERSION = 4
"""Raised when pictures, objectives or losses change: runs of another version are not continued."""
FIRST_WEIGHT = 5.0
"""As in `train`: weight of a conversation's first answer, which the picture alone decides."""
EXTRA_COLORS = 0.5
"""Share of pictures of squares that show colours beyond the paper's six."""
DROPPED = 0.5
"""Share of things whose cells are replaced, where a batch drops cells."""


def train_encoder(
    training: EncoderTraining,
    seed: int,
    out: Path,
    geometry: Geometry = GEOMETRY,
    start: Path | None = None,
) -> Path:
    """Trains an encoder by itself, or goes on; returns the file of its weights.

    With `start`, the weights of an encoder for smaller pictures, all pictures show many things.
    """
    of_size = {} if geometry == GEOMETRY else {"tokens": geometry.n_tokens}
    file, about = out / "encoder.safetensors", about_run({**asdict(training), **of_size}, seed)
    if file.exists():
        _require_same(out / "training.json", about)
        return file
    encoder = Encoder(build_processor(LAYOUT, geometry.canvas, is_fixed=True))
    blocks = 2 if training.objective == "captions" else 1
    model = fresh_model(encoder, seed, blocks, geometry)
    if start is not None:
        take_encoder(model, start)
    task = TASKS[training.objective](model, encoder)

    def loss(name: str, batch: int, most: int = MOST_THINGS) -> Tensor:
        return task.loss(Shown.drawn(random.Random(name), geometry.canvas, batch, most))

    def step_loss(step: int) -> Tensor:
        most = MOST_THINGS if start else most_things(step, training.steps)
        return loss(f"encoder/{seed}/{step}", training.batch, most)

    def check(_: int) -> float:
        with torch.no_grad():
            return float(loss(f"check/{seed}", 2 * training.batch))

    loop = Loop(
        out,
        task,
        muon_and_adam(list(task.named_parameters()), training.muon_lr, training.adam_lr),
        Schedule(training.steps),
        columns={"what": training.objective},
        recipe=about,
    )
    loop.run(step_loss, check)
    (out / "training.json").write_text(about + "\n")
    with replaced_file(file) as building:
        save_file(
            {n: p.detach().clone() for n, p in encoder_weights(task.visual).items()}, building
        )
    return file


def trained_encoder(training: EncoderTraining, seed: int, out: Path) -> Path:
    """Returns the file of an encoder in the study's folder, which is trained if it is not there."""
    return train_encoder(training, seed, out / "encoders" / f"{training.objective}-{seed}")


def fresh_model(encoder: Encoder, seed: int, blocks: int, geometry: Geometry = GEOMETRY) -> Any:
    """Returns a model for pictures of a geometry, with a seed's first weights."""
    torch.manual_seed(seed)
    model = build_model(LAYOUT, encoder.tokenizer, geometry.canvas, blocks, VISION)
    spread(model)
    return model


def take_encoder(model: Any, file: Path) -> None:
    """Loads an encoder's weights into a model, whose projector stays.

    A table of positions of smaller pictures is interpolated.
    """
    own, held = model.model.visual.state_dict(), load_file(file)
    fitted = fitted_weights(held, {name: own[name] for name in held})
    model.model.visual.load_state_dict({**own, **fitted})


def spread(model: nn.Module) -> None:
    """Draws weights anew, with the spread that keeps the size of what passes through them.

    Transformers draws all with a standard deviation of 0.02, as large models need.  At a width of
    100 a signal shrinks fivefold at each such matrix, and learning begins late.
    """
    for name, weights in model.named_parameters():
        if name.endswith("pos_embed.weight"):
            nn.init.normal_(weights, std=POSITIONS)
        elif weights.ndim > 1:  # biases and the gains of norms stay
            nn.init.normal_(weights, std=weights[0].numel() ** -0.5)


def about_run(about: dict[str, Any], seed: int) -> str:
    """Returns what determines a run, in words; a folder or checkpoint of another is refused."""
    return json.dumps({**about, "seed": seed, "vision": VISION, "version": VERSION})


def _require_same(file: Path, about: str) -> None:
    """Raises `ValueError` where a finished run in a folder is of another recipe."""
    if json.loads(file.read_text()) != json.loads(about):
        raise ValueError(
            f"'{file.parent}' holds a run of another recipe or version: {file.read_text()[:200]} "
            "Give another folder, or delete this one."
        )


def most_things(step: int, steps: int) -> int:
    """Returns how many things a picture shows at most: one, then a few, then all.

    Captions of many things on many grounds alone teach an encoder little but colours.

    >>> [most_things(step, 100) for step in (0, 4, 5, 59, 60, 99)]
    [1, 1, 4, 4, 7, 7]
    """
    if step < steps // 20:
        return 1
    return FEW_THINGS if step < 3 * steps // 5 else MOST_THINGS


def encoder_weights(visual: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights of an encoder without those of its projector."""
    return {n: p for n, p in visual.named_parameters() if not n.startswith("merger.")}


def train_model(recipe: Recipe, seed: int, out: Path) -> Path:
    """Trains a recipe's model, or goes on; returns its folder."""
    folder = out / f"{recipe.name}-{seed}"
    about = about_run(asdict(recipe), seed)
    if (folder / "training.json").exists():
        _require_same(folder / "training.json", about)
        return folder
    processor = build_processor(LAYOUT, GEOMETRY.canvas, is_fixed=True)
    encoder = Encoder(processor)
    model = fresh_model(encoder, 1000 + seed, recipe.blocks)
    if recipe.encoder is not None:
        take_encoder(model, trained_encoder(recipe.encoder, seed, out))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"model/{seed}/{step}")
        return training_loss(model.train(), encoder, recipe, rng)

    def check(step: int) -> float:
        return accuracy(model.eval(), encoder, random.Random(f"check/{step}"))

    loop = Loop(
        folder,
        model,
        rates_of(model, recipe),
        Schedule(recipe.steps),
        columns={"what": "model"},
        recipe=about,
    )
    loop.run(loss, check)
    save_all(model.eval(), processor, folder)
    (folder / "training.json").write_text(about + "\n")
    return folder


def rates_of(model: Any, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Returns optimizers of what a recipe trains: the encoder at its own share of the rates."""
    own = {id(weights) for weights in encoder_weights(model.model.visual).values()}
    named = list(model.named_parameters())
    encoder = [(name, p) for name, p in named if id(p) in own]
    rest = [(name, p) for name, p in named if id(p) not in own]
    for _, weights in encoder:
        weights.requires_grad_(recipe.encoder_rate > 0)
    rates = muon_and_adam(rest, recipe.muon_lr, recipe.adam_lr)
    share = recipe.encoder_rate
    return [*rates, *muon_and_adam(encoder, share * recipe.muon_lr, share * recipe.adam_lr)]


def training_loss(
    model: Any,
    encoder: Encoder,
    recipe: Recipe,
    rng: random.Random,
    geometry: Geometry = GEOMETRY,
) -> Float[Tensor, ""]:
    """Returns the loss of a batch, with the recipe's changes of image tokens."""
    scenes, batch = drawn_batch(rng, encoder, recipe, geometry)
    drops = rng.random() < recipe.object_dropout
    scrambles = rng.random() < recipe.without_order
    dropped = dropped_cells(rng, scenes, geometry) if drops else None
    logits, targets = answer_logits(model, batch, dropped, rng if scrambles else None)
    return answer_loss(logits, targets, batch, FIRST_WEIGHT)


def drawn_batch(
    rng: random.Random, encoder: Encoder, recipe: Recipe, geometry: Geometry = GEOMETRY
) -> tuple[Sequence[Scene | MixedScene], Batch]:
    """Returns scenes never used for evaluation, and conversations about them."""
    scenes: Sequence[Scene | MixedScene]
    if recipe.mixed:
        mixed = scenes = [mixed_scene(rng, geometry) for _ in range(recipe.batch)]
        turns = [mixed_conversation(rng, scene) for scene in mixed]
    else:
        triples = training_triples()
        plain = scenes = [
            training_scene(rng, triples, geometry, EXTRA_COLORS) for _ in range(recipe.batch)
        ]
        turns = [conversation(rng, scene) for scene in plain]
    images = np.stack([scene.render(geometry.canvas) for scene in scenes])
    return scenes, encoder.batch([each[: recipe.turns] for each in turns], images)


def dropped_cells(
    rng: random.Random, scenes: Sequence[Scene | MixedScene], geometry: Geometry = GEOMETRY
) -> Bool[Tensor, "batch cell"]:
    """Returns the cells that some of the things touch: each thing is dropped half of the time."""
    size = PATCH * MERGE
    found = torch.zeros(len(scenes), geometry.n_tokens, geometry.n_tokens, dtype=torch.bool)
    for row, scene in zip(found, scenes, strict=True):
        for x0, y0, x1, y1 in scene.boxes:
            if rng.random() < DROPPED:
                row[y0 // size : -(-y1 // size), x0 // size : -(-x1 // size)] = True
    return found.flatten(1)


def answer_logits(
    model: Any,
    batch: Batch,
    dropped: Bool[Tensor, "batch cell"] | None = None,
    scrambled: random.Random | None = None,
) -> tuple[Float[Tensor, "answer d_vocab"], Int[Tensor, " answer"]]:
    """Returns the logits that predict the answers' tokens, and those tokens.

    The tokens of `dropped` cells are those of an empty picture.  With `scrambled` the image's
    tokens stand in a random order and have the first one's position.
    """
    inputs, inner = batch.inputs, model.model
    ids, grid = inputs["input_ids"], inputs["image_grid_thw"]
    # Padding is on the right, so no mask is needed, and attention takes its fastest path.
    positions = inner.get_rope_index(ids, inputs["mm_token_type_ids"], grid)[0]
    images = visual_tokens(model, inputs["pixel_values"], grid)
    if dropped is not None:
        white = torch.ones_like(inputs["pixel_values"][: grid[0].prod()])
        empty = visual_tokens(model, white, grid[:1])
        images = torch.where(dropped[..., None], empty, images)
    is_image = inputs["mm_token_type_ids"] == 1
    if scrambled is not None:
        order = torch.Generator().manual_seed(scrambled.randrange(1 << 30))
        images = torch.stack([row[torch.randperm(len(row), generator=order)] for row in images])
        first = is_image.int().argmax(1)
        shared = positions.gather(2, first[None, :, None].expand(3, -1, 1))
        positions = torch.where(is_image, shared, positions)
    words = model.get_input_embeddings()(ids)
    embedded = words.masked_scatter(is_image[..., None], images)
    hidden = inner.language_model(
        inputs_embeds=embedded, position_ids=positions, use_cache=False
    ).last_hidden_state
    targets = batch.answers[:, 1:]
    return model.lm_head(hidden[:, :-1][targets]), ids[:, 1:][targets]


def visual_tokens(
    model: Any, pixels: Float[Tensor, "patch pixel"], grid: Int[Tensor, "image 3"]
) -> Float[Tensor, "image cell d"]:
    """Returns the tokens of equally large pictures, after the projector."""
    tokens = model.model.visual(pixels, grid_thw=grid).pooler_output
    return rearrange(tokens, "(b n) d -> b n d", b=len(grid))


def accuracy(
    model: Any,
    encoder: Encoder,
    rng: random.Random,
    n: int = 96,
    geometry: Geometry = GEOMETRY,
) -> float:
    """Returns the share of first questions answered right, on squares of held-out triples.

    The pictures are of the same kind for every recipe: squares on white.
    """
    held_out = sorted(held_out_triples())
    scenes = [training_scene(rng, held_out, geometry) for _ in range(n)]
    turns = [[rng.choice(scene.relations()[:2])] for scene in scenes]
    images = np.stack([scene.render(geometry.canvas) for scene in scenes])
    batch = encoder.batch(turns, images)
    with torch.no_grad():
        logits, targets = answer_logits(model, Batch(batch.inputs, first_answers(batch)))
    return float((logits.argmax(-1) == targets).float().mean())


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=list(RECIPES), action="append")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append")
    arguments = parser.parse_args()
    for seed in arguments.seed or SEEDS:
        for name in arguments.recipe or RECIPES:
            train_model(RECIPES[name], seed, arguments.out)


if __name__ == "__main__":
    main()
