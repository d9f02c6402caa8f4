"""Q6, two signals on and off: are the two mechanisms redundant or complementary? (paper, 5.3)

The paper calls the language model's own ordering secondary because of the accuracy without
vision's.  That is one of four conditions.  Here each signal is removed alone, and both
together, on the same questions.  Vision's is removed as in E5; the language model's is removed
by masking the attention of image tokens to each other in all blocks.  The interaction shows
whether one signal can replace the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from scipy.special import expit
from torch import Tensor

from hooked_vlm.analysis.bounded import by_unit
from hooked_vlm.analysis.scoring import logit_difference
from hooked_vlm.analysis.statistics import sign_flip_test
from hooked_vlm.errors import counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.answers import KINDS, RIGHT, named, picture_of
from hooked_vlm.experiments.batches import items_of_numbers, scored_numbers
from hooked_vlm.experiments.dual_mechanisms.order_removal import PLACES, references, removed
from hooked_vlm.experiments.loop import over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config, sampled
from hooked_vlm.experiments.tables import (
    format_interval,
    interval_rows,
    mean_interval,
    rate_rows,
    select,
)
from hooked_vlm.experiments.verdicts import ALPHA, adjusted, claim_rows, judge, sentence
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.sets import StimulusSet
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
LOG_ODDS, PREFERENCE = "log odds", "preference"
"""Quantities: of the right end against the other end, and the same as a probability."""
QUANTITIES = (*KINDS, "probability", LOG_ODDS)
SLIGHT = 1.0
"""The largest interaction in log odds that counts as none."""
CEILING = 0.95
"""Accuracy above which an interaction below zero may come from the ceiling."""
FEWEST = 20
"""Pictures below which no interaction is named: log odds have no bounds, so its interval and its
test, unlike the others, hold only for many."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`items` questions of each direction, drawn with the seed; 0: all.

    `cut` is what the language model's attention loses: that between tokens of different
    `"objects"`, or that between `"all"` different image tokens.
    """

    settings_allowed = SETTINGS  # What'sUp cannot show one object alone
    ranges: ClassVar = {"items": (0, 10**6)}

    items: int = 60
    cut: Literal["objects", "all"] = "objects"


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Asks the same questions with and without each signal, and estimates their interaction."""
    setting = Setting(model, data, config.batch_size)
    asked = {d: sampled(setting, d, config.items, config.seed) for d in setting.directions}
    scores = over_batches(
        "scores",
        asked,
        config.batch_size,
        lambda _, batch, __: _scores(setting, batch, config.cut),
        on_progress,
        last=True,
    )
    by_direction = {d: np.concatenate(s, axis=1) for d, s in scores.items()}
    by_direction, asked, left_out = items_of_numbers(by_direction, asked)
    table = _table(by_direction, asked, config.seed)
    return Result(
        **vars(ABOUT),
        table=table,
        verdict="\n".join([_verdict(table), *left_out]),
        config={"items": {d: len(found) for d, found in asked.items()}, "seed": config.seed},
        notes=(
            "Vision's order is removed as in E5 (slot 0). The language model's order is removed "
            "by masking the attention between tokens of different objects in all blocks and heads "
            "of the language model (cut='all': between all different image tokens); text still "
            "attends to the image. This does not remove an order that text tokens compute directly "
            "from positions.",
            "'interaction' is both - vision only - LM only + neither, item by item, in the log "
            "odds of the right end against the other end, which have no ceiling as accuracy has. "
            "Below zero, one signal can replace the other (redundant); above zero, each needs the "
            f"other (complementary). It counts as none within {SLIGHT} of zero. Bootstrap interval "
            "and sign-flip test over pictures. There is a sentence over all, for each axis and for "
            "each direction; p-values of a claim are adjusted (Holm) over all of them.",
            "'preference' is the same log odds as a probability; the rows 'loss' and 'gain' are "
            "differences of it. Where both together and one signal alone answer nearly all items, "
            "an interaction below zero is undecided: confidence has a ceiling too.",
        ),
    )


run = of_config(run_on)


def between_objects(setting: Setting, inputs: Inputs, axis: str) -> Bool[Tensor, "batch 1 pos pos"]:
    """Returns which scores `[query, key]` are between tokens of different objects of a prompt."""
    places = [setting.geometry.object_region(axis, place) for place in PLACES]
    batch, length = inputs["input_ids"].shape
    owner = torch.full((batch, length), -1)
    for b, grids in enumerate(inputs.grids):
        for grid in grids:
            for place, region in enumerate(places):
                owner[b, region.positions(grid)] = place
    shown = owner >= 0
    apart = owner[:, :, None] != owner[:, None, :]
    return (apart & shown[:, :, None] & shown[:, None, :])[:, None]


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


def knock_out(mask: Bool[Tensor, "batch 1 pos pos"]) -> list[Any]:
    """Returns hooks that mask attention scores in every block."""

    def cut(scores: Tensor, hook: Any) -> Tensor:
        least = torch.finfo(scores.dtype).min
        return scores.masked_fill(mask.to(scores.device), least)

    return [("blocks.*.attn.hook_attn_scores", cut)]


def _scores(setting: Setting, batch: Sequence[Question], cut: str) -> np.ndarray:
    """Returns `[cell, item, quantity]`: what the answer names, and the right one's probability."""
    found = references(setting, batch)
    if cut == "all":
        mask = between_image_tokens(found.inputs)
    else:
        mask = between_objects(setting, found.inputs, found.axis)
    lm_off, vision_off = knock_out(mask), removed(found)
    cells = {
        "both": [],
        "vision only": lm_off,
        "LM only": vision_off,
        "neither": [*vision_off, *lm_off],
    }
    tokenizer = setting.model.tokenizer
    right = [q.target for q in batch]
    other = [_other_end(q) for q in batch]

    def score(last: Tensor) -> Tensor:
        kinds = torch.from_numpy(named(last, tokenizer, batch).astype(float))
        probability = setting.probabilities(last, [(name,) for name in right])[:, 0]
        odds = logit_difference(last, tokenizer, right, other)
        more = [column.detach().cpu().double()[:, None] for column in (probability, odds)]
        return torch.cat([kinds, *more], dim=-1)

    scores = []
    for cell in CELLS:
        with torch.no_grad():
            logits = setting.model.run_with_hooks(found.inputs, cells[cell], logits_to_keep=1)
        scores.append(scored_numbers(score, final_logits(logits)).numpy())
    return np.stack(scores)


def _other_end(question: Question) -> str:
    first, _, last = question.entities
    return last if question.target == first else first


def _table(
    by_direction: Mapping[str, np.ndarray], asked: Mapping[str, Sequence[Question]], seed: int
) -> pd.DataFrame:
    axes: dict[str, list[str]] = {}
    for direction in by_direction:
        axes.setdefault(AXIS_OF[direction], []).append(direction)
    groups = {"all": list(by_direction), **axes, **{d: [d] for d in by_direction}}
    rows = []
    for group, directions in groups.items():
        values = np.concatenate([by_direction[d] for d in directions], axis=1)
        units = [picture_of(q) for d in directions for q in asked[d]]
        rows += [{**row, "direction": group} for row in _rows_of(values, units, seed)]
    table = pd.DataFrame(rows)
    return adjusted(table, table["p"].notna(), ["kind", "quantity"])


def _rows_of(values: np.ndarray, units: Sequence[str], seed: int) -> list[dict]:
    rows = []
    for cell, kinds in zip(CELLS, values, strict=True):
        for i, name in enumerate(("accuracy", *KINDS[1:])):
            rows += rate_rows(kinds[:, i], units, kind=cell, quantity=name)
    by_picture = by_unit(np.moveaxis(values, 1, 0), units)  # [picture, cell, quantity]
    probability, odds = by_picture[..., -2], by_picture[..., -1]
    for quantity, scores in (("probability", probability), (LOG_ODDS, odds)):
        interval = mean_interval(scores, seed)
        rows += interval_rows(interval, {"kind": CELLS}, quantity=quantity)
    # The interaction, and what each signal adds.
    signs = np.array([1, -1, -1, 1])
    accuracy = by_picture[..., RIGHT]
    for quantity, scores in (("accuracy", accuracy), (LOG_ODDS, odds)):
        each = (scores * signs).sum(-1)
        p = float(sign_flip_test(each, seed=seed)) if len(each) > 1 else 1.0
        about = {"kind": "interaction", "quantity": quantity, "p": p, "p_holm": p}
        rows += interval_rows(mean_interval(each, seed), {}, **about)
    preference = by_unit(np.moveaxis(expit(values[..., -1]), 1, 0), units)
    for kind, one in (("loss", 0), ("gain, vision only", 1), ("gain, LM only", 2)):
        difference = preference[:, one] - preference[:, 3]
        rows += claim_rows(
            difference, {}, range(len(difference)), seed, kind=kind, quantity=PREFERENCE
        )
    return rows


def _verdict(table: pd.DataFrame) -> str:
    parts = []
    for direction in dict.fromkeys(table["direction"]):
        here = select(table, direction=direction)
        accuracy = select(here, quantity="accuracy").set_index("kind")
        cells = ", ".join(f"{cell} {format_interval(accuracy.loc[cell])}" for cell in CELLS)
        interaction = select(here, kind="interaction", quantity=LOG_ODDS).iloc[0]
        parts.append(
            f"{direction}: {_kind(here)}. Interaction in log odds {format_interval(interaction)}; "
            f"accuracy with {cells} ({counted(int(interaction['n']), 'picture')})"
        )
    return "\n".join(map(sentence, parts))


def _kind(here: pd.DataFrame) -> str:
    """Returns in words what the two signals are to each other: found, not found or undecided."""
    claims = select(here, quantity=PREFERENCE).set_index("kind")
    loss = judge(claims.loc["loss"])
    gains = {cell: judge(claims.loc[f"gain, {cell}"]) for cell in CELLS[1:3]}
    if loss.outcome == "not found":
        return (
            f"not found: neither signal is needed to tell the two ends apart ({loss.reason}), "
            "which rests on something else"
        )
    if not loss.above:
        return (
            f"undecided whether either signal is needed to tell the two ends apart: {loss.reason}"
        )
    alone = [cell for cell, gain in gains.items() if gain.above]
    if len(alone) == 1 and all(gains[c].outcome == "not found" for c in gains if c != alone[0]):
        return f"found: one signal does nearly all of it ({alone[0]})"
    interaction = select(here, kind="interaction", quantity=LOG_ODDS).iloc[0]
    n, low, high = int(interaction["n"]), interaction["low"], interaction["high"]
    is_clear = interaction["p_holm"] <= ALPHA and not low <= 0 <= high
    if n < FEWEST:
        return f"undecided: {counted(n, 'picture')} for an interaction, which needs {FEWEST}"
    if is_clear and interaction["value"] <= -SLIGHT:
        accuracy = select(here, quantity="accuracy").set_index("kind")["value"]
        full = [cell for cell in CELLS[:3] if accuracy[cell] >= CEILING]
        if "both" in full and len(full) > 1:
            return f"undecided: {' and '.join(full)} are at the ceiling"
        return "found: redundant, either signal does much of what both do"
    if is_clear and interaction["value"] >= SLIGHT:
        return "found: complementary, each needs the other"
    if low > -SLIGHT and high < SLIGHT:
        excluded = max(abs(low), abs(high))
        return (
            "not found: no interaction, the two add up in log odds "
            f"({counted(n, 'picture')} exclude more than {excluded:.2f})"
        )
    return (
        f"undecided whether they interact by at least {SLIGHT:g} in log odds: "
        f"{format_interval(interaction)}"
    )
