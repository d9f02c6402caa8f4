"""The recipes of the study: what is varied in making a model, one ingredient at a time.

A real VLM is made in two steps: an encoder is trained by itself, on many pictures, and then a
projector and a language model learn to work with what it gives.  `tiny-qwen2-vl` and
`tiny-gemma-3` were trained end to end on one task instead.  `captions` is the recipe of two steps;
every other one differs from it in one ingredient, or from `end-to-end`.

The models have the class of Qwen3-VL, whose encoder has learned positions, and pictures of 96 px
(6x6 visual tokens): the paper's layout at half its resolution, with objects and gaps of one token
and strips of two.
"""

from dataclasses import dataclass, replace
from typing import Literal


Objective = Literal["captions", "contrastive"]
OBJECTIVES: tuple[Objective, ...] = ("captions", "contrastive")
N_TOKENS = 6
"""Visual tokens on a side of a study's picture."""
SEEDS = (0, 1)


@dataclass(frozen=True)
class EncoderTraining:
    """How an encoder is trained by itself."""

    objective: Objective
    steps: int = 2000
    batch: int = 32
    muon_lr: float = 0.01
    adam_lr: float = 2e-3


@dataclass(frozen=True)
class Recipe:
    """How one model of the study is made."""

    name: str
    varies: str
    """The ingredient in which it differs, in a few words for tables."""
    encoder: EncoderTraining | None = EncoderTraining("captions")
    """None: the encoder is trained with the rest, from fresh weights."""
    encoder_rate: float = 0.0
    """The encoder's learning rates as a share of the others'; 0 leaves it as it is."""
    object_dropout: float = 0.0
    """Share of batches in which cells of objects are replaced by those of an empty picture."""
    without_order: float = 0.0
    """Share of batches whose image tokens have one position in common and a random order, so that
    no place can be read off the sequence."""
    blocks: int = 6
    """Blocks of the language model."""
    mixed: bool = False
    """Whether shapes and cut-outs are asked about beside squares."""
    turns: int = 5
    """Questions about one picture, in one conversation."""
    steps: int = 1000
    batch: int = 32
    muon_lr: float = 0.01
    adam_lr: float = 2e-3


_CAPTIONS = Recipe("captions", "encoder trained on captions, then frozen")
_END_TO_END = Recipe("end-to-end", "encoder trained with the rest", None, 1.0)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _CAPTIONS,
        _END_TO_END,
        replace(
            _CAPTIONS,
            name="contrastive",
            varies="encoder trained to match captions, then frozen",
            encoder=EncoderTraining("contrastive", steps=1000, batch=64),
        ),
        replace(
            _END_TO_END,
            name="end-to-end-dropout",
            varies="end to end; cells of objects dropped in half of the batches",
            object_dropout=0.5,
        ),
        replace(
            _END_TO_END,
            name="end-to-end-without-order",
            varies="end to end; image tokens without order in half of the batches",
            without_order=0.5,
        ),
        replace(_CAPTIONS, name="captions-deep", varies="12 blocks", blocks=12),
        replace(
            _CAPTIONS, name="captions-tasks", varies="squares, shapes and cut-outs", mixed=True
        ),
    )
}
"""The recipes, in the order in which they are trained."""
