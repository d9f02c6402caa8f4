"""E5, ordering ablation: accuracy without the order from the vision encoder (paper, 5.3.1).

At the language model's input, every entity's tokens are replaced by those of a picture with
this entity alone in the middle, and the background by that of an empty picture.  If the order
comes only from the vision encoder, accuracy falls to chance.  If the language model computes
an order itself, from the positions of tokens in the prompt, accuracy stays above chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from hooked_vlm.analysis.bounded import by_unit
from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.analysis.statistics import (
    bootstrap,
)
from hooked_vlm.errors import counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.answers import (
    CHANCE,
    KINDS,
    ORDER,
    OTHER,
    RIGHT,
    answers_of,
    named,
    picture_of,
)
from hooked_vlm.experiments.batches import items_of_numbers, scored_numbers
from hooked_vlm.experiments.dual_mechanisms.order_removal import REMOVALS, references
from hooked_vlm.experiments.loop import over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config, sampled
from hooked_vlm.experiments.tables import (
    difference_rows,
    format_interval,
    interval_rows,
    rate_rows,
    select,
)
from hooked_vlm.experiments.verdicts import adjusted, claim_rows, judge, sentence
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.sets import StimulusSet
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


REFERENCES = 3
"""Number of references in whose questions an isolated picture is shown."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`items` is the number of questions of each direction, drawn with the seed; 0: all."""

    settings_allowed = SETTINGS  # What'sUp cannot show one object alone
    ranges: ClassVar = {"items": (0, 10**6)}
    in_float32 = True

    items: int = 120


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Asks the setting's questions intact and under each way of removing the order."""
    setting = Setting(model, data, config.batch_size)
    asked = {d: sampled(setting, d, config.items, config.seed) for d in setting.directions}
    names = {axis: named_alone(setting, axis) for axis in setting.axes}
    scores = over_batches(
        "scores",
        asked,
        config.batch_size,
        lambda _, batch, __: _scores(setting, batch),
        on_progress,
        last=True,
    )
    by_direction = {d: np.concatenate(parts, axis=1) for d, parts in scores.items()}
    by_direction, asked, left_out = items_of_numbers(by_direction, asked)
    table = _table(by_direction, asked, names, config.seed)
    return Result(
        **vars(ABOUT),
        table=table,
        images=_pictures(setting, asked),
        verdict="\n".join([_verdict(table, names), *left_out]),
        config={
            "items": {d: len(found) for d, found in asked.items()},
            "seed": config.seed,
            "named alone": {axis: sorted(found) for axis, found in names.items()},
        },
        notes=(
            "'removed': at slot 0 every image token is replaced, an entity's tokens by those of a "
            "picture with this entity alone in the middle, the background by an empty picture's.",
            "'objects only' and 'background only' are its two halves. 'in place' reads each entity "
            "from a picture with this entity alone at its own place, so the encoder's information "
            "about that place remains. 'mean' writes the mean image token everywhere, so no "
            "picture remains. 'itself' writes the existing tokens and must equal 'intact'.",
            "Every answer names the right end, the other end, the reference or nothing in the "
            "picture; without order the ends are equally probable. The verdict is about "
            f"'{ORDER}', against 1/2, by picture, and only about questions whose three entities "
            "the model names when it is shown the isolated picture that a removal reads: other "
            "answers show a loss of names. Its p-values are adjusted (Holm) over the directions "
            "and their sum, all.",
            "Accuracies have 95 % Wilson intervals; 'difference' is the paired difference to "
            "'intact', with a bootstrap interval over items and a bounded mean test, Holm-adjusted "
            "over the kinds of a direction. 'probability' is that of the correct answer.",
        ),
    )


run = of_config(run_on)


def named_alone(setting: Setting, axis: str) -> set[str]:
    """Returns the entities that the model names when each is shown alone, in the middle.

    The questions are the setting's own, about other references; most answers must be the entity.
    """
    directions = [d for d in setting.directions if AXIS_OF[d] == axis]
    stimuli, layout = setting.stimuli, setting.geometry
    right: dict[str, list[bool]] = {name: [] for name in setting.names}
    asked = [
        (name, Question((name, reference, name), direction))
        for name in setting.names
        for i, reference in enumerate(n for n in setting.names if n != name)
        for direction in directions
        if i < REFERENCES
    ]

    def named_in(_: str, batch: list[Any], __: Any) -> list[str | None]:
        questions = [question for _, question in batch]
        pictures = [
            stimuli.scene((None, name, None), axis, layout, stimuli.ground_of(question))
            for name, question in batch
        ]
        with torch.no_grad():
            logits = setting.model(setting.inputs_of(pictures, questions), logits_to_keep=1)
        return answers_of(final_logits(logits), setting.model.tokenizer)

    answers = over_batches(f"named alone, {axis}", {axis: asked}, setting.batch_size, named_in)
    for (name, _), answer in zip(asked, chain(*answers[axis]), strict=True):
        right[name].append(answer == normalise(name))
    return {name for name, found in right.items() if 2 * sum(found) > len(found)}


def _scores(setting: Setting, batch: Sequence[Question]) -> np.ndarray:
    """Returns `[kind, item, quantity]`: what the answer names, and the right one's probability."""
    found = references(setting, batch)

    def score(last: torch.Tensor) -> torch.Tensor:
        probability = setting.probabilities(last, [(q.target,) for q in batch])
        kinds = torch.from_numpy(named(last, setting.model.tokenizer, batch)).to(probability)
        return torch.cat([kinds, probability], dim=-1)

    sweep = Sweep(found.inputs, {"kind": list(REMOVALS)}, make=lambda kind: REMOVALS[kind](found))
    scores = sweep.run(
        setting.model,
        lambda logits: scored_numbers(score, final_logits(logits)),
        dims=("item", "quantity"),
        logits_to_keep=1,
    )
    return scores.values


def _table(
    by_direction: dict[str, np.ndarray],
    asked: Mapping[str, Sequence[Question]],
    names: Mapping[str, set[str]],
    seed: int,
) -> pd.DataFrame:
    rows = []
    every = [question for questions in asked.values() for question in questions]
    together = np.concatenate(list(by_direction.values()), axis=1)
    for direction, values in {**by_direction, "all": together}.items():
        questions = every if direction == "all" else asked[direction]
        pictures = [picture_of(question) for question in questions]
        right, probability = (
            by_unit(np.moveaxis(values[..., i], 1, 0), pictures).T for i in (RIGHT, -1)
        )
        for kind, verdicts in zip(REMOVALS, values, strict=True):
            about = {"direction": direction, "kind": kind}
            for i, name in enumerate(("accuracy", *KINDS[1:])):
                rows += rate_rows(verdicts[:, i], pictures, quantity=name, **about)
            rows += order_rows(verdicts, questions, names, seed, **about)
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
    return over_sentences(pd.DataFrame(rows))


def over_sentences(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with p-values of order adjusted over the directions and all of them."""
    return adjusted(table, table["quantity"] == ORDER, ["kind"])


def order_rows(
    kinds: np.ndarray,
    questions: Sequence[Question],
    names: Mapping[str, set[str]],
    seed: int,
    **columns: str,
) -> list[dict]:
    """Returns the claim about order among answers that name an end; of none, a row without number.

    `kinds` are `[item, kind]`, as `answers.named` gives them.  Only questions whose three entities
    are all among the `names` of their axis count.
    """
    whole = np.array([set(q.entities) <= names[q.axis] for q in questions])
    kept = (kinds[:, [RIGHT, OTHER]].any(-1) & whole).nonzero()[0].tolist()
    about = {"quantity": ORDER, **columns}
    if not len(kept):
        nothing = {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
        return [{**about, **nothing, "null": CHANCE, "p": 1.0, "p_holm": 1.0}]
    units = [picture_of(questions[i]) for i in kept]
    return claim_rows(kinds[kept, RIGHT], {}, units, seed, null=CHANCE, low=0.0, high=1.0, **about)


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


def _verdict(table: pd.DataFrame, names: Mapping[str, set[str]]) -> str:
    directions = [d for d in dict.fromkeys(table["direction"]) if d != "all"]
    parts = []
    for direction in ["all", *directions]:
        accuracy = _accuracy(table, direction)
        kinds: Any = select(table, direction=direction, kind="removed").set_index("quantity")
        shares = ", ".join(
            f"{name} {kinds.loc[column, 'value']:.2f}"
            for name, column in zip(KINDS, ("accuracy", *KINDS[1:]), strict=True)
        )
        parts.append(
            f"{direction}: {_order(kinds.loc[ORDER])}. Answers with vision's order removed: "
            f"{shares}; accuracy {format_interval(accuracy['removed'])}, "
            f"{format_interval(accuracy['intact'])} intact"
        )
    every = _accuracy(table, "all")
    parts.append(
        f"Accuracy after other replacements: objects only {format_interval(every['objects only'])},"
        f" background only {format_interval(every['background only'])}, entities alone at their "
        f"own places {format_interval(every['in place'])}, mean image token everywhere "
        f"{format_interval(every['mean'])}"
    )
    for axis, found in names.items():
        parts.append(f"named alone, {axis}: {', '.join(sorted(found)) or 'none'}")
    return "\n".join(map(sentence, parts))


def _order(row: pd.Series) -> str:
    """Returns whether an order remains, in words."""
    if not row["n"]:
        return "undecided whether an order remains: no answer names an end of a picture it can name"
    found = judge(row)
    n = counted(int(row["n"]), "picture")
    said = f"{format_interval(row)} right of those that name an end, {n}"
    if found.above:
        return f"an order remains ({said}), as in the paper"
    if found.outcome == "not found":
        return f"no order remains ({said}), unlike in the paper"
    if found.below:
        return f"answers name the other end more often ({said}), unlike in the paper"
    slight = f": {found.slight}" if found.slight else ""
    return f"undecided whether an order remains ({said}{slight})"


def _accuracy(table: pd.DataFrame, direction: str) -> dict[str, Any]:
    rows = select(table, direction=direction, quantity="accuracy")
    return {str(row["kind"]): row for _, row in rows.iterrows()}
