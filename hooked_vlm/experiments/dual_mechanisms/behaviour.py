"""E1, behaviour: accuracy of the model on the setting's questions (paper, Table 1)."""

from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.errors import counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.answers import picture_of
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.loop import over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import SHOWN_CASES, About, Cases, Result
from hooked_vlm.experiments.setting import Setting, of_config, sampled
from hooked_vlm.experiments.tables import format_interval, rate_rows
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.sets import StimulusSet


ABOUT = About(
    id="E1",
    name="behaviour",
    section="Table 1",
    title="Does the model answer correctly?",
    claim=(
        "Accuracy of Qwen2-VL-7B and Gemma-3-4b is 0.98 to 1.00 on Squares, Shapes and Objects; on "
        "What'sUp it is 0.73 and 0.62."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`items` is the number of questions of each direction, drawn with the seed; 0: all."""

    ranges: ClassVar = {"items": (0, 10**6)}
    reads_cells = False

    items: int = 0


def run_on(
    model, data: StimulusSet, config: common.Config, on_progress: OnProgress = silent
) -> Result:
    """Asks all items of the setting and counts correct top-1 answers, by direction."""
    return run_in(Setting(model, data, config.batch_size), config, on_progress)


def run_in(setting: Setting, config: Any, on_progress: OnProgress) -> Result:
    """Runs the experiment in a setting, of built-in or of own pictures."""
    questions = setting.stimuli.items()
    at_most = getattr(config, "items", 0)  # the common options alone: all questions
    if at_most:
        by_direction = (sampled(setting, d, at_most, config.seed) for d in setting.directions)
        questions = list(chain(*by_direction))
    answers = over_batches(
        "answers",
        {"all": questions},
        config.batch_size,
        lambda _, batch, __: setting.answers(batch),
        on_progress,
        last=True,
    )
    right: dict[str, list[bool]] = {direction: [] for direction in setting.directions}
    pictures: dict[str, list[str]] = {direction: [] for direction in setting.directions}
    wrong = dict.fromkeys(setting.directions, 0)
    cases: list[dict] = []
    failing: dict[str, Question] = {}
    for question, answer in zip(questions, chain(*answers["all"]), strict=True):
        if answer is None:
            wrong[question.direction] += 1
            continue
        is_right = answer == normalise(question.target)
        right[question.direction].append(is_right)
        pictures[question.direction].append(picture_of(question))
        case = {"case": question.name, "answer": answer, "correct answer": question.target}
        cases.append({**case, "ok": is_right})
        if not is_right and len(failing) < SHOWN_CASES:
            failing[question.name] = question
    right = {direction: own for direction, own in right.items() if own}
    if not right:
        raise none_left("question")
    missing = [said for d, n in wrong.items() for said in left_out(n, "question", d)]
    rows = []
    for direction, verdicts in right.items():
        about = {"direction": direction, "quantity": "accuracy"}
        rows += rate_rows(np.array(verdicts), pictures[direction], **about)
    every, shown = ([x for d in right for x in parts[d]] for parts in (right, pictures))
    rows += rate_rows(np.array(every), shown, direction="all", quantity="accuracy")
    table = pd.DataFrame(rows)
    examples = {axis: next(q for q in questions if q.axis == axis) for axis in setting.axes}
    return Result(
        **vars(ABOUT),
        table=table,
        images={name: setting.picture(q) for name, q in {**examples, **failing}.items()},
        cases=Cases(failed="questions answered wrongly", table=pd.DataFrame(cases)),
        verdict="\n".join([_verdict(table), *missing]),
        config={"items": len(questions), "geometry": str(setting.geometry)},
        notes=(
            f"{_asked(at_most)}of a built-in one, all ordered triples of its names in "
            "each direction, in the paper's layout. An answer is correct when the most probable "
            "next token, lower-cased and stripped of all but letters and digits, is the target. "
            "Intervals are Wilson's over pictures: two questions about one picture are one "
            "observation.",
        ),
    )


run = of_config(run_on)


def _asked(items: int) -> str:
    whole = "All questions of the setting: "
    return whole if not items else f"Of each direction at most {items} questions of these. {whole}"


def _verdict(table: pd.DataFrame) -> str:
    every = table[table["direction"] == "all"].iloc[0]
    by = table[table["direction"] != "all"]
    worst = by.sort_values("value").iloc[0]
    if len(by) == 1:
        return f"Accuracy {format_interval(every)} ({counted(every['n'], 'picture')})."
    alike = by["value"].nunique() == 1
    return f"Accuracy {format_interval(every)} ({counted(every['n'], 'picture')}); " + (
        f"equal in all directions ({format_interval(worst)} each)."
        if alike
        else f"lowest for {worst['direction']!r}: {format_interval(worst)} "
        f"({counted(worst['n'], 'picture')})."
    )
