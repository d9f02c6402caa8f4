"""Q6, two signals on and off: are the two mechanisms redundant or complementary? (paper, 5.3)

The paper calls the language model's own ordering secondary because of the accuracy without
vision's.  That is one of four conditions.  Here each signal is removed alone, and both
together, on the same questions.  Vision's is removed as in E5; the language model's is removed
by masking the attention of image tokens to each other in all blocks.  The interaction shows
whether one signal can replace the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import bootstrap, wilson
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import over_batches
from hooked_vlm.experiments.dual_mechanisms.order_removal import references, removed
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import sampled
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.settings import SETTINGS
from hooked_vlm.sweeps.sweep import final_logits


ABOUT = About(
    id="Q6",
    name="redundancy",
    section="open question on 5.3",
    title="Are the two mechanisms redundant or complementary?",
    claim=(
        "The paper calls the language model's mechanism secondary, from accuracy without vision's "
        "order alone, and leaves their interaction open."
    ),
)
CELLS = ("both", "vision only", "LM only", "neither")
ALPHA = 0.05
"""What accuracy must lose without both signals for the verdict to speak of them."""
LITTLE = 0.1
"""What a signal alone must add to neither for the verdict to say that it does something."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`items` questions of each direction, drawn with the seed; 0: all."""

    settings_allowed = SETTINGS  # What'sUp cannot show one object alone
    ranges: ClassVar = {"items": (0, 10**6)}

    items: int = 60


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Asks the same questions with and without each signal, and estimates their interaction."""
    setting = Setting.of(model, config)
    asked = {d: sampled(setting, d, config.items, config.seed) for d in setting.directions}
    scores = over_batches(setting, asked, lambda _, batch, __: _scores(setting, batch), on_progress)
    table = _table({d: np.concatenate(s, axis=1) for d, s in scores.items()}, config.seed)
    return Result(
        **vars(ABOUT),
        table=table,
        verdict=_verdict(table),
        config={"items": {d: len(found) for d, found in asked.items()}, "seed": config.seed},
        notes=(
            "Vision's order is removed as in E5 (slot 0). The language model's order is removed "
            "by masking the attention between different image tokens in all blocks and heads "
            "of the language model; text still attends to the image, and each image token to "
            "itself and to the text before it. This does not remove an order that text tokens "
            "compute directly from positions.",
            "'interaction' is both - vision only - LM only + neither, item by item, in the right "
            "answer's probability and in accuracy. Below zero, one signal can replace the other "
            "(redundant); above zero, each needs the other (complementary). Bootstrap intervals "
            "over items. Where both together answer all items, additive signals appear redundant "
            "too, because accuracy has a ceiling.",
        ),
    )


def between_image_tokens(inputs: Inputs) -> Bool[Tensor, "batch 1 pos pos"]:
    """Returns which scores `[query, key]` are between different image tokens of a prompt."""
    batch, length = inputs["input_ids"].shape
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b, grids in enumerate(inputs.grids):
        image = torch.zeros(length, dtype=torch.bool)
        for grid in grids:
            image[grid.positions.flatten()] = True
        mask[b, 0] = image[:, None] & image[None, :]
    mask &= ~torch.eye(length, dtype=torch.bool)
    return mask


def knock_out(inputs: Inputs) -> list[Any]:
    """Returns hooks that mask the attention between image tokens in every block."""
    mask = between_image_tokens(inputs)

    def cut(scores: Tensor, hook: Any) -> Tensor:
        least = torch.finfo(scores.dtype).min
        return scores.masked_fill(mask.to(scores.device), least)

    return [("blocks.*.attn.hook_attn_scores", cut)]


def _scores(setting: Setting, batch: Sequence[Question]) -> np.ndarray:
    """Returns `[cell, item, quantity]`: whether the answer is correct, and its probability."""
    found = references(setting, batch)
    lm_off, vision_off = knock_out(found.inputs), removed(found)
    targets = [normalise(question.target) for question in batch]
    cells = {
        "both": [],
        "vision only": lm_off,
        "LM only": vision_off,
        "neither": [*vision_off, *lm_off],
    }
    scores = []
    for cell in CELLS:
        with torch.no_grad():
            logits = setting.model.run_with_hooks(found.inputs, cells[cell], logits_to_keep=1)
        last = final_logits(logits)
        answers = top_answer(last, setting.model.tokenizer)
        right = [float(a == t) for a, t in zip(answers, targets, strict=True)]
        probability = setting.probabilities(last, [(q.target,) for q in batch])[:, 0]
        scores.append(np.stack([right, probability.cpu().numpy()], axis=-1))
    return np.stack(scores)


def _table(by_direction: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    rows = []
    together = np.concatenate(list(by_direction.values()), axis=1)
    for direction, values in {**by_direction, "all": together}.items():
        for cell, verdicts in zip(CELLS, values[..., 0], strict=True):
            interval = wilson(float(verdicts.sum()), len(verdicts))
            about = {"direction": direction, "kind": cell, "quantity": "accuracy"}
            rows += interval_rows(interval, {}, **about)
        probability = bootstrap(values[..., 1].T, seed=seed)
        rows += interval_rows(
            probability, {"kind": CELLS}, direction=direction, quantity="probability"
        )
        both, vision, language, neither = values
        interaction = bootstrap(both - vision - language + neither, seed=seed)
        measures = ("accuracy", "probability")
        rows += interval_rows(
            interaction, {"quantity": measures}, direction=direction, kind="interaction"
        )
    return pd.DataFrame(rows)


def _verdict(table: pd.DataFrame) -> str:
    parts = []
    for direction in dict.fromkeys(table["direction"]):
        here = select(table, direction=direction, quantity="accuracy")
        rows = {str(row["kind"]): row for _, row in here.iterrows()}
        cells = ", ".join(f"{cell} {format_interval(rows[cell])}" for cell in CELLS)
        parts.append(
            f"{direction}: accuracy with {cells}; interaction "
            f"{format_interval(rows['interaction'])}: "
            f"{_kind(rows)}."
        )
    parts = [parts[-1], *parts[:-1]]  # all directions together first
    return "\n".join(part[0].upper() + part[1:] for part in parts)


def _kind(rows: dict[str, Any]) -> str:
    loss = rows["both"]["value"] - rows["neither"]["value"]
    if loss < ALPHA:
        return "neither is needed, so the answers rest on something else"
    gains = {cell: rows[cell]["value"] - rows["neither"]["value"] for cell in CELLS[1:3]}
    if min(gains.values()) < LITTLE <= max(gains.values()):
        alone = max(gains, key=lambda cell: gains[cell])
        return f"one signal does nearly all of it ({alone})"
    if rows["interaction"]["high"] < 0:
        return "redundant, either signal does much of what both do"
    if rows["interaction"]["low"] > 0:
        return "complementary, each needs the other"
    return "neither redundant nor complementary beyond the interval"
