"""COCO-spatial: on which side of one object is another, on a user's copy of the photographs?

The paper's second set of natural pictures (Table 2, v2): 440 photographs with a caption that
names two things, each asked in both orders of the options (protocol 2.3), without a system
message.  An item counts where both answers are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image

from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.errors import DataError, counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.stimuli.datasets.coco import SpatialItem, load
from hooked_vlm.sweeps.sweep import final_logits


ABOUT = About(
    id="R1",
    name="coco-spatial",
    section="Table 2",
    title="Does the model answer questions about sides on photographs?",
    claim="Accuracy on COCO-spatial without steering: Gemma-3-4b 0.53, Qwen2-VL-2B 0.60.",
)


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`style` is the wording: "reference" (the paper's for Qwen2-VL) or "choice" (Gemma 3)."""

    setting: str = "coco"
    style: str = "reference"
    name: str = "coco_qa_two_obj"
    """The list: `coco_qa_two_obj` or `vg_qa_two_obj`."""


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Asks every item in both orders of its options; raises `DataError` without `config.data`."""
    if config.data is None:
        raise DataError(
            "COCO-spatial needs your copy of the photographs: give --data FOLDER. "
            "docs/reference/data.md describes the folder's layout."
        )
    found = load(config.data, config.name)
    if not found.items:
        raise DataError(f"'{config.data}' has no usable item: {'; '.join(found.problems[:3])}")
    on_progress(0, len(found.items))
    answers: list[list[str]] = []
    for start in range(0, len(found.items), config.batch_size):
        batch = found.items[start : start + config.batch_size]
        answers += _answers(model, batch, config.style)
        on_progress(min(start + config.batch_size, len(found.items)), len(found.items))
    table = _table(found.items, answers)
    problems = "; ".join(found.problems[:5])
    return Result(
        **vars(ABOUT),
        table=table,
        images={"an item": opened(found.items[0])},
        verdict=_verdict(table),
        config={"items": len(found.items), "style": config.style, "list": config.name},
        notes=(
            "Each item is asked twice, with its options in both orders, and is correct where both "
            "answers are; 'single' counts answers. Wilson intervals; chance is 0.5 for an answer.",
            f"Unusable entries: {len(found.problems)}. {problems}".strip(),
        ),
    )


def _answers(model, items: Sequence[SpatialItem], style: str) -> list[list[str]]:
    pictures = [opened(item) for item in items for _ in range(2)]
    texts = [text for item in items for text in item.questions(style)]
    with torch.no_grad():
        logits = model(model.prepare(pictures, texts), logits_to_keep=1)
    said = top_answer(final_logits(logits), model.tokenizer)
    return [said[i : i + 2] for i in range(0, len(said), 2)]


def opened(item: SpatialItem) -> Image.Image:
    """Returns an item's photograph."""
    with Image.open(item.path) as opened:
        return opened.convert("RGB")


def _table(items: Sequence[SpatialItem], answers: Sequence[Sequence[str]]) -> pd.DataFrame:
    rows = []
    axes = [item.axis for item in items]
    for axis in ("horizontal", "vertical", "all"):
        own = [i for i, found in enumerate(axes) if axis in (found, "all")]
        if not own:
            continue
        both = [items[i].is_right(answers[i]) for i in own]
        single = [normalise(a) == items[i].side for i in own for a in answers[i]]
        for quantity, verdicts in (("accuracy", both), ("single", single)):
            interval = wilson(float(sum(verdicts)), len(verdicts))
            rows += interval_rows(interval, {}, axis=axis, quantity=quantity)
    return pd.DataFrame(rows)


def _verdict(table: pd.DataFrame) -> str:
    parts = []
    for axis in dict.fromkeys(table["axis"]):
        here = {str(row["quantity"]): row for _, row in select(table, axis=axis).iterrows()}
        parts.append(
            f"{axis}: accuracy {format_interval(here['accuracy'])} in both orders "
            f"({counted(here['accuracy']['n'], 'item')}), {format_interval(here['single'])} of "
            "single answers"
        )
    return "; ".join(parts) + "."
