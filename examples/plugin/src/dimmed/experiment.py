"""An experiment: how much of the image tokens does the model need to answer?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from dimmed.intervention import Scale
from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.experiments.answers import answers_of, picture_of
from hooked_vlm.experiments.options import Config as Options
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import format_interval, rate_rows
from hooked_vlm.report import charts
from hooked_vlm.report.figures import Drawing


ABOUT = About(
    id="P1",
    name="dimmed",
    section="this package",
    title="How much of the image tokens does the answer need?",
    claim="None: this is an example.",
)
HEADLINES = (({"factor": "0.0"}, "accuracy without image tokens"),)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """The options; `factors` multiply the image tokens."""

    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)


@torch.no_grad()
def run(model: Any, config: Config, on_progress: OnProgress) -> Result:
    """Asks all questions of the setting with the image tokens scaled by each factor."""
    setting = Setting.of(model, config)
    batches = list(setting.batches(setting.stimuli.items()))
    rows, done = [], 0
    for factor in config.factors:
        right, pictures = [], []
        for batch in batches:
            inputs = setting.inputs(batch)
            image = inputs.grids[0][0].all()
            logits = model.run_with_hooks(inputs, [Scale(0, factor, image)], logits_to_keep=1)
            answers = answers_of(logits[:, -1].float().cpu(), model.tokenizer)
            right += [a == normalise(q.target) for a, q in zip(answers, batch, strict=True)]
            pictures += [picture_of(question) for question in batch]
            done += 1
            on_progress(done, len(config.factors) * len(batches))
        rows += rate_rows(np.array(right), pictures, quantity="accuracy", factor=str(factor))
    table = pd.DataFrame(rows)
    first, last = table.iloc[0], table.iloc[-1]
    return Result(
        **vars(ABOUT),
        table=table,
        verdict=f"Accuracy is {format_interval(first)} with image tokens times {first['factor']}, "
        f"and {format_interval(last)} with image tokens times {last['factor']}.",
    )


def draw(result: Result) -> Iterator[Drawing]:
    """Yields the figure of a result."""
    yield Drawing(
        "factors",
        charts.dots(result.table, by="factor", line="quantity", x_label="accuracy"),
        "Accuracy with the image tokens multiplied by a factor. Whiskers are 95 % intervals.",
        headline=True,
    )
