"""A setting for one model: pictures whose objects fill whole tokens, prompts and answers.

It converts questions to model inputs and final logits to scores.  The canvas is the paper's
for the model's kind of encoder: the encoder's image size if it is fixed, else 15x15 visual
tokens where separators stand between the rows of tokens (Pixtral), else 12x12 (Qwen2-VL).
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_vlm.analysis.scoring import (
    answer_ids,
    candidate_probability,
    is_single_token,
    normalise,
)
from hooked_vlm.errors import CannotRunError, HookedVLMWarning
from hooked_vlm.experiments.answers import answers_of
from hooked_vlm.experiments.loop import once, silent
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import Result
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.stimuli.geometry import PAPER_GEOMETRY, Layout
from hooked_vlm.stimuli.own.items import OwnItem
from hooked_vlm.stimuli.pairs import BatchFilter, Question, right_on_both, sample_tuples
from hooked_vlm.stimuli.prompts import SYSTEM_PROMPT
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.stimuli.settings import stimulus_set


Asked: TypeAlias = Question | OwnItem
"""A question about a picture, built-in or of own data."""
FEWEST_PAIRS = 2
PAPER_TOKENS = PAPER_GEOMETRY["qwen2-vl"].n_tokens
"""Visual tokens a side where the encoder takes any size (the paper's Qwen2-VL canvas)."""
SEPARATED_TOKENS = PAPER_GEOMETRY["pixtral"].n_tokens
"""The same where separators stand between the rows of tokens (the paper's Pixtral canvas)."""


class Setting:
    """Stimuli for one model: `inputs`, `logits` and `is_right` of lists of questions."""

    def __init__(self, model: Any, stimuli: StimulusSet, batch_size: int) -> None:
        """Verifies that the model can answer the setting's questions, before any long work.

        Raises `UnsupportedModelError` for a model without a vision encoder or processor,
        `ScoringError` for an answer that cannot be scored, and `CannotRunError` for a tokenizer
        that splits all but two names, and for an encoder whose visual tokens do not form a
        square grid.
        """
        model.require_vision()
        stimuli, _ = for_tokenizer(stimuli, model.tokenizer)
        self.model, self.stimuli, self.batch_size = model, stimuli, batch_size
        self.names = stimuli.names
        for name in self.names:
            answer_ids(model.tokenizer, name)
        self.geometry: Layout = stimuli.layout(*token_grid(model))

    @classmethod
    def of(cls, model: Any, config: Config) -> "Setting":
        """Returns the setting of a configuration, for a model."""
        return cls(model, stimuli_of(config), config.batch_size)

    def in_rows(self) -> "Setting":
        """Returns the setting with its objects in rows and columns, if they are scattered."""
        if not self.stimuli.is_scattered:
            return self
        return Setting(self.model, self.stimuli.in_rows(), self.batch_size)

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of the questions."""
        return self.stimuli.directions

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the directions."""
        return self.stimuli.axes

    def picture(self, question: Any) -> Image.Image:
        """Returns the picture a question is about."""
        return self.stimuli.picture(question, self.geometry)

    def inputs(self, questions: Sequence[Asked]) -> Inputs:
        """Returns the model's inputs for some questions, in the paper's prompt."""
        return self.inputs_of([self.picture(q) for q in questions], questions)

    def inputs_of(self, pictures: Sequence[Image.Image], questions: Sequence[Any]) -> Inputs:
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

    def logits(self, questions: Sequence[Asked]) -> Float[Tensor, "question d_vocab"]:
        """Returns the final position's logits of each question."""
        with torch.no_grad():
            parts = [
                self.model(self.inputs(batch), logits_to_keep=1)[:, -1].float().cpu()
                for batch in self.batches(questions)
            ]
        return torch.cat(parts)

    def answers(self, questions: Sequence[Asked]) -> list[str | None]:
        """Returns the model's top answer to each question; None where logits are not numbers."""
        return answers_of(self.logits(questions), self.model.tokenizer)

    def is_right(self, questions: Sequence[Asked]) -> list[bool]:
        """Returns whether the model's top answer to each question is correct."""
        answers = self.answers(questions)
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
        drawn_names = k - (self.stimuli.middle is not None)
        if drawn_names > len(self.names):
            raise CannotRunError(
                f"A pair needs {drawn_names} different names, and {self.stimuli.title} has "
                f"{len(self.names)} that this model's tokenizer keeps as one token: "
                f"{', '.join(self.names)}. Use another setting."
            )
        tuples = once(
            "pairs",
            lambda: sample_tuples(
                self.names,
                drawn_names,
                per_direction=config.pairs,
                seed=config.seed,
                accept_batch=lambda d, drawn: accept(d, [middle(names) for names in drawn]),
                directions=self.directions,
            ),
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


def of_config(
    run_on: Callable[..., Result], data_of: Callable[[Any], Any] | None = None
) -> Callable[[Any, Any, OnProgress], Result]:
    """Returns `run(model, config, on_progress)`: `run_on` with the data that a configuration names.

    `data_of(config)` returns the data; by default it is `stimuli_of`.
    """

    def run(model: Any, config: Config, on_progress: OnProgress = silent) -> Result:
        return run_on(model, (data_of or stimuli_of)(config), config, on_progress)

    return run


def stimuli_of(config: Config) -> StimulusSet:
    """Returns the stimuli of a configuration, for any model."""
    return stimulus_set(
        config.setting,
        cutouts=config.cutouts,
        backgrounds=config.backgrounds,
        data=config.data,
        other_words=config.other_words,
    )


def for_tokenizer(stimuli: StimulusSet, tokenizer: Any) -> tuple[StimulusSet, str]:
    """Returns a setting with names that a tokenizer keeps as one token, and a note about others.

    This is the paper's filter: a name that the tokenizer splits is replaced by its spare if it
    has one (orange instead of brown), else left out.  The note is empty where nothing changes.

    Raises `CannotRunError` when fewer than three names are left.
    """
    kept, changes = [], []
    for name in stimuli.names:
        spare = stimuli.spares.get(name)
        if is_single_token(tokenizer, name):
            kept.append(name)
        elif spare is not None and is_single_token(tokenizer, spare):
            kept.append(spare)
            changes.append(f"{name} is replaced by {spare}")
        else:
            changes.append(f"{name} is left out")
    if len(kept) < 3:
        raise CannotRunError(
            f"This model's tokenizer has {len(kept)} of the {len(stimuli.names)} names of "
            f"{stimuli.title} as one token ({', '.join(kept) or 'none'}); at least 3 are needed. "
            "Use another setting."
        )
    if not changes:
        return stimuli, ""
    found = replace(stimuli, names=tuple(kept))
    note = (
        f"{stimuli.title}: this model's tokenizer splits some names, so {', '.join(changes)}, as "
        f"in the paper's filter of names. {len(found.items())} of {len(stimuli.items())} items "
        "remain."
    )
    return found, note


def token_grid(model: Any) -> tuple[int, int]:
    """Returns the number of visual tokens on a side of the canvas, and the pixels of one.

    Raises `CannotRunError` where a square canvas does not become a square grid of cells of
    whole pixels.
    """
    vision = model.cfg.vision
    side = vision.image_size or PAPER_TOKENS * vision.patch_size * vision.merge
    grid = _grid_of(model, side)
    wanted = grid.rows
    if vision.image_size is None:
        wanted = SEPARATED_TOKENS if grid.is_separated else PAPER_TOKENS
    if grid.shape != (wanted, wanted):
        # The measured size of a token, since a projector may merge tokens too.
        fitting = wanted * (grid.processed_size[0] // grid.cols)
        other = _grid_of(model, fitting)
        if other.shape == (wanted, wanted) and not other.is_resized:
            side, grid = fitting, other
        elif grid.is_resized and grid.rows == grid.cols:
            # The processor has a size of its own: pictures of that size stay as they are drawn.
            fitting = grid.processed_size[0]
            own = _grid_of(model, fitting)
            if own.shape == grid.shape and not own.is_resized:
                side, grid = fitting, own
    rows, cols = grid.shape
    if rows != cols or side % rows:
        raise CannotRunError(
            f"A picture of {side}x{side} px becomes {rows}x{cols} visual tokens in this model; the "
            "stimuli need a square grid of cells of whole pixels. Use another model."
        )
    return rows, side // rows


def _grid_of(model: Any, side: int) -> TokenGrid:
    blank = Image.new("RGB", (side, side), "white")
    with warnings.catch_warnings():
        # The pictures of the experiments are prepared later, and give the warning then.
        warnings.filterwarnings("ignore", "The image processor changed", HookedVLMWarning)
        return model.prepare(blank, "", system=system_of(model, SYSTEM_PROMPT)).grid


def system_of(model: Any, system: str | None) -> str | None:
    """Returns the system message for a model; None where it has no chat template to hold it."""
    return system if getattr(model.processor, "chat_template", None) else None


def sampled(setting: Setting, direction: str, n: int, seed: int) -> list[Question]:
    """Returns `n` questions of a direction, a seeded sample in their order; all of them for 0."""
    questions = setting.stimuli.items((direction,))
    if not 0 < n < len(questions):
        return questions
    chosen = random.Random(f"{seed}/{direction}").sample(range(len(questions)), n)
    return [questions[i] for i in sorted(chosen)]
