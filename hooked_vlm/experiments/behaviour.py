"""E1, behaviour: does the model answer the questions at all? (paper, Table 1)"""

import pandas as pd

from hooked_vlm.experiments.config import Config, OnProgress
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Squares, interval_rows, said
from hooked_vlm.statistics import wilson
from hooked_vlm.stimuli.prompts import DIRECTIONS
from hooked_vlm.stimuli.squares import items


ID, NAME, SECTION = "E1", "behaviour", "Table 1"
TITLE = "Does the model answer at all?"
CLAIM = "Accuracy on Squares is 1.00 for Qwen2-VL-7B and 0.98 for Gemma-3-4b."


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Asks all 480 Squares items and counts right top-1 answers, by direction."""
    setting = Squares(model, config.batch_size)
    questions = items()
    on_progress(0, len(questions))
    right: dict[str, list[bool]] = {direction: [] for direction in DIRECTIONS}
    done = 0
    for batch in setting.batches(questions):
        for question, verdict in zip(batch, setting.is_right(batch), strict=True):
            right[question.direction].append(verdict)
        done += len(batch)
        on_progress(done, len(questions))
    rows = [_row(direction, verdicts) for direction, verdicts in right.items()]
    every = [verdict for verdicts in right.values() for verdict in verdicts]
    table = pd.DataFrame([*rows, _row("all", every)])
    examples = {
        direction: next(q for q in questions if q.direction == direction)
        for direction in ("left", "above")
    }
    return Result(
        id=ID,
        name=NAME,
        title=TITLE,
        claim=CLAIM,
        section=SECTION,
        table=table,
        images={direction: setting.picture(q) for direction, q in examples.items()},
        verdict=_verdict(table),
        config={"items": len(questions), "geometry": vars(setting.geometry)},
        notes=(
            "All 120 ordered colour triples in each of the four directions, in the paper's layout "
            "and prompt. An answer is right when the most probable next token, lower-cased and "
            "stripped of all but letters and digits, is the target colour.",
        ),
    )


def _row(direction: str, verdicts: list[bool]) -> dict:
    interval = wilson(float(sum(verdicts)), len(verdicts))
    return interval_rows(interval, {}, direction=direction, quantity="accuracy")[0]


def _verdict(table: pd.DataFrame) -> str:
    every = table[table["direction"] == "all"].iloc[0]
    by = table[table["direction"] != "all"]
    worst = by.sort_values("value").iloc[0]
    alike = by["value"].nunique() == 1
    return f"Of {every['n']} items the model answers {said(every)} rightly; " + (
        f"no direction is worse than another (each {said(worst)})."
        if alike
        else f"its worst direction is {worst['direction']!r}, with {said(worst)}."
    )
