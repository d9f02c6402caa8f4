"""E5, ordering ablation: accuracy without the order from the vision encoder (paper, 5.3.1).

At the language model's input, every entity's tokens are replaced by those of a picture with
this entity alone in the middle, and the background by that of an empty picture.  If the order
comes only from the vision encoder, accuracy falls to chance.  If the language model computes
an order itself, from the positions of tokens in the prompt, accuracy stays above chance.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import (
    bootstrap,
    wilson,
)
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import over_batches
from hooked_vlm.experiments.dual_mechanisms.order_removal import REMOVALS, references
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import difference_rows, format_interval, interval_rows, select
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.settings import SETTINGS
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ABOUT = About(
    id="E5",
    name="ordering-ablation",
    section="5.3.1, Fig. 8, Table 5",
    title="How accurate is the model without the order from the vision encoder?",
    claim=(
        "Accuracy falls towards chance (0.33) and stays above it: Qwen2-VL-7B 0.60, 0.62 and 0.43 "
        "and Gemma-3-4b 0.57, 0.64 and 0.54 on Squares, Shapes and Objects."
    ),
)
CHANCE = 1 / 3
QUANTITIES = ("accuracy", "probability")


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`items` is the number of questions of each direction, drawn with the seed; 0: all."""

    settings_allowed = SETTINGS  # What'sUp cannot show one object alone
    ranges: ClassVar = {"items": (0, 10**6)}
    in_float32 = True

    items: int = 120


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Asks the setting's questions intact and under each way of removing the order."""
    setting = Setting.of(model, config)
    asked = {d: sampled(setting, d, config.items, config.seed) for d in setting.directions}
    scores = over_batches(setting, asked, lambda _, batch, __: _scores(setting, batch), on_progress)
    by_direction = {d: np.concatenate(parts, axis=1) for d, parts in scores.items()}
    table = _table(by_direction, config.seed)
    return Result(
        **vars(ABOUT),
        table=table,
        images=_pictures(setting, asked),
        verdict=_verdict(table),
        config={"items": {d: len(found) for d, found in asked.items()}, "seed": config.seed},
        notes=(
            "'removed': at slot 0 every image token is replaced, an entity's tokens by those of a "
            "picture with this entity alone in the middle, the background by an empty picture's.",
            "'objects only' and 'background only' are its two halves. 'in place' reads each entity "
            "from a picture with this entity alone at its own place, so the encoder's information "
            "about that place remains. 'mean' writes the mean image token everywhere, so no "
            "picture remains. 'itself' writes the existing tokens and must equal 'intact'.",
            "Accuracies have 95 % Wilson intervals; 'difference' is the paired difference to "
            "'intact', with a bootstrap interval over items and a sign-flip test, Holm-adjusted "
            "over the kinds of a direction. 'probability' is that of the correct answer.",
        ),
    )


def sampled(setting: Setting, direction: str, n: int, seed: int) -> list[Question]:
    """Returns `n` questions of a direction, a seeded sample in their order; all of them for 0."""
    questions = setting.stimuli.items((direction,))
    if not 0 < n < len(questions):
        return questions
    chosen = random.Random(f"{seed}/{direction}").sample(range(len(questions)), n)
    return [questions[i] for i in sorted(chosen)]


def _scores(setting: Setting, batch: Sequence[Question]) -> np.ndarray:
    """Returns `[kind, item, quantity]`: whether the answer is correct, and its probability."""
    found = references(setting, batch)
    targets = [normalise(question.target) for question in batch]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = final_logits(logits)
        answers = top_answer(last, setting.model.tokenizer)
        right = torch.tensor([a == t for a, t in zip(answers, targets, strict=True)])
        probability = setting.probabilities(last, [(q.target,) for q in batch])[:, 0]
        return torch.stack([right.to(probability), probability], dim=-1)

    sweep = Sweep(found.inputs, {"kind": list(REMOVALS)}, make=lambda kind: REMOVALS[kind](found))
    scores = sweep.run(setting.model, metric, dims=("item", "quantity"), logits_to_keep=1)
    return scores.values


def _table(by_direction: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    rows = []
    together = np.concatenate(list(by_direction.values()), axis=1)
    for direction, values in {**by_direction, "all": together}.items():
        right, probability = values[..., 0], values[..., 1]
        for kind, verdicts in zip(REMOVALS, right, strict=True):
            interval = wilson(float(verdicts.sum()), len(verdicts))
            rows += interval_rows(interval, {}, direction=direction, kind=kind, quantity="accuracy")
        axes = {"kind": list(REMOVALS)}
        rows += interval_rows(
            bootstrap(probability.T, seed=seed), axes, direction=direction, quantity="probability"
        )
        others = [kind for kind in REMOVALS if kind != "intact"]
        intact = right[:1].repeat(len(others), axis=0)
        rows += difference_rows(
            right[1:].T,
            intact.T,
            {"kind": others},
            seed,
            direction=direction,
            quantity="difference",
        )
    return pd.DataFrame(rows)


def _pictures(setting: Setting, asked: dict[str, list[Question]]) -> dict:
    """Returns, for one question, its picture and those that the removal reads."""
    question = next(iter(asked.values()))[0]
    stimuli, ground = setting.stimuli, setting.stimuli.ground_of(question)
    middle = (None, question.entities[0], None)
    return {
        "a question's picture": setting.picture(question),
        "its first entity, alone": stimuli.scene(middle, question.axis, setting.geometry, ground),
        "empty": stimuli.scene((None,) * 3, question.axis, setting.geometry, ground),
    }


def _verdict(table: pd.DataFrame) -> str:
    directions = [d for d in dict.fromkeys(table["direction"]) if d != "all"]
    parts = []
    for direction in ["all", *directions]:
        accuracy = _accuracy(table, direction)
        parts.append(
            f"{direction}: accuracy {format_interval(accuracy['removed'])} with vision's order "
            f"removed ({_beside_chance(accuracy['removed'])}), "
            f"{format_interval(accuracy['intact'])} intact"
        )
    every = _accuracy(table, "all")
    return (
        f"{parts[0][0].upper()}{parts[0][1:]}. {'; '.join(parts[1:])}. Accuracy after other "
        f"replacements: objects only {format_interval(every['objects only'])}, background only "
        f"{format_interval(every['background only'])}, entities alone at their own places "
        f"{format_interval(every['in place'])}, mean image token everywhere "
        f"{format_interval(every['mean'])}."
    )


def _accuracy(table: pd.DataFrame, direction: str) -> dict[str, Any]:
    rows = select(table, direction=direction, quantity="accuracy")
    return {str(row["kind"]): row for _, row in rows.iterrows()}


def _beside_chance(row: pd.Series) -> str:
    if row["low"] > CHANCE:
        return "above chance"
    return "below chance" if row["high"] < CHANCE else "not distinguishable from chance"
