"""A setting for one model: pictures whose objects fill whole tokens, prompts and answers.

It converts questions to model inputs and final logits to scores.  The canvas is the paper's
for the model's kind of encoder: the encoder's image size if it is fixed, else 12x12 visual
tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_vlm.analysis.scoring import (
    answer_ids,
    candidate_probability,
    is_single_token,
    normalise,
    top_answer,
)
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments.options import Config
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import BatchFilter, Question, right_on_both, sample_tuples
from hooked_vlm.stimuli.prompts import SYSTEM_PROMPT
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.stimuli.settings import stimulus_set


FEWEST_PAIRS = 2
PAPER_TOKENS = 12
"""Visual tokens a side where the encoder takes any size (the paper's Qwen2-VL canvas)."""


class Setting:
    """Stimuli for one model: `inputs`, `logits` and `is_right` of lists of questions."""

    def __init__(self, model: Any, stimuli: StimulusSet, batch_size: int) -> None:
        """Verifies that the model can answer the setting's questions, before any long work.

        Raises `UnsupportedModelError` for a model without a vision encoder or processor,
        `ScoringError` for an answer that its tokenizer splits, and `CannotRunError` for an
        encoder whose visual tokens do not form a square grid.
        """
        model.require_vision()
        if stimuli.skip_split_names:
            stimuli = _whole_names(stimuli, model.tokenizer)
        self.model, self.stimuli, self.batch_size = model, stimuli, batch_size
        self.names = stimuli.names
        for name in self.names:
            answer_ids(model.tokenizer, name)
        self.geometry: Layout = stimuli.layout(*token_grid(model))

    @classmethod
    def of(cls, model: Any, config: Config) -> "Setting":
        """Returns the setting of a configuration, for a model."""
        stimuli = stimulus_set(
            config.setting,
            cutouts=config.cutouts,
            backgrounds=config.backgrounds,
            data=config.data,
            other_words=config.other_words,
        )
        return cls(model, stimuli, config.batch_size)

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of the questions."""
        return self.stimuli.directions

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the directions."""
        return self.stimuli.axes

    def picture(self, question: Question) -> Image.Image:
        """Returns the picture a question is about."""
        return self.stimuli.picture(question, self.geometry)

    def inputs(self, questions: Sequence[Question]) -> Inputs:
        """Returns the model's inputs for some questions, in the paper's prompt."""
        return self.inputs_of([self.picture(q) for q in questions], questions)

    def inputs_of(self, pictures: Sequence[Image.Image], questions: Sequence[Question]) -> Inputs:
        """Returns the model's inputs for questions with other pictures than their own."""
        return self.model.prepare(
            list(pictures),
            [self.stimuli.prompt(q) for q in questions],
            system=system_of(self.model, self.stimuli.system),
        )

    def batches(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        """Yields items in runs of at most the batch size."""
        for start in range(0, len(items), self.batch_size):
            yield list(items[start : start + self.batch_size])

    def logits(self, questions: Sequence[Question]) -> Float[Tensor, "question d_vocab"]:
        """Returns the final position's logits of each question."""
        with torch.no_grad():
            parts = [
                self.model(self.inputs(batch), logits_to_keep=1)[:, -1].float().cpu()
                for batch in self.batches(questions)
            ]
        return torch.cat(parts)

    def is_right(self, questions: Sequence[Question]) -> list[bool]:
        """Returns whether the model's top answer to each question is correct."""
        answers = top_answer(self.logits(questions), self.model.tokenizer)
        return [answer == normalise(q.target) for answer, q in zip(answers, questions, strict=True)]

    def pairs(self, make: Any, k: int, config: Config) -> dict[str, list[Any]]:
        """Returns each direction's pairs, drawn and filtered as the paper does (protocol 2.5).

        A direction with fewer than two correctly answered pairs is left out, because intervals
        need two, and `sample_tuples` warns about it.  Raises `CannotRunError` when no direction
        is left.
        """
        accept = right_on_both(make, self.is_right)
        return self.pairs_accepted(make, k, config, accept)

    def pairs_accepted(
        self, make: Any, k: int, config: Config, accept: BatchFilter
    ) -> dict[str, list[Any]]:
        """Returns each direction's pairs as `pairs` does, with another filter."""
        middle = self.stimuli.with_middle
        tuples = sample_tuples(
            self.names,
            k - (self.stimuli.middle is not None),
            per_direction=config.pairs,
            seed=config.seed,
            accept_batch=lambda d, drawn: accept(d, [middle(names) for names in drawn]),
            directions=self.directions,
        )
        pairs = {
            d: [make(d, middle(names)) for names in found]
            for d, found in tuples.items()
            if len(found) >= FEWEST_PAIRS
        }
        if not pairs:
            raise CannotRunError(
                "In no direction does the model answer two pairs of a clean and a counterfactual "
                "picture correctly, so there is nothing to intervene on. Run the behaviour "
                "experiment to see the model's accuracy."
            )
        return pairs

    def probabilities(
        self, logits: Float[Tensor, "pair d_vocab"], answers: Sequence[Sequence[str]]
    ) -> Float[Tensor, "pair answer"]:
        """Returns each pair's probabilities of its own answers, a column for each kind."""
        every = candidate_probability(logits, self.model.tokenizer, list(self.names))
        columns = torch.tensor([[self.names.index(a) for a in row] for row in answers])
        return every.gather(-1, columns.to(every.device))


def _whole_names(stimuli: StimulusSet, tokenizer: Any) -> StimulusSet:
    """Returns a setting without the names that a tokenizer splits (the paper's filter)."""
    kept = tuple(name for name in stimuli.names if is_single_token(tokenizer, name))
    if len(kept) < 3:
        raise CannotRunError(
            f"This model's tokenizer has {len(kept)} of the {len(stimuli.names)} names of "
            f"{stimuli.title} as one token ({', '.join(kept) or 'none'}); at least 3 are needed. "
            "Use another setting."
        )
    return replace(stimuli, names=kept)


def token_grid(model: Any) -> tuple[int, int]:
    """Returns the number of visual tokens on a side of the canvas, and the pixels of one."""
    vision = model.cfg.vision
    side = vision.image_size or PAPER_TOKENS * vision.patch_size * vision.merge
    blank = Image.new("RGB", (side, side), "white")
    rows, cols = model.prepare(blank, "", system=system_of(model, SYSTEM_PROMPT)).grid.shape
    if rows != cols or side % rows:
        raise CannotRunError(
            f"A picture of {side}x{side} px becomes {rows}x{cols} visual tokens in this model; the "
            "stimuli need a square grid of cells of whole pixels. Use another model."
        )
    return rows, side // rows


def system_of(model: Any, system: str | None) -> str | None:
    """Returns the system message for a model; None where it has no chat template to hold it."""
    return system if getattr(model.processor, "chat_template", None) else None
