"""COCO-spatial: on which side of one object is another, on a user's copy of the photographs?

The paper's second set of natural pictures (Table 2, v2): 440 photographs with a caption that
names two things, each asked in both orders of the options (protocol 2.3), without a system
message.  An item counts where both answers are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from PIL import Image

from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.errors import DataError, counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.answers import answers_of
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.loop import over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import of_config
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.stimuli.datasets.coco import Spatial, SpatialItem, listing_of, load
from hooked_vlm.stimuli.pictures import open_picture
from hooked_vlm.sweeps.sweep import final_logits


ABOUT = About(
    id="R1",
    name="coco-spatial",
    section="Table 2",
    title="Does the model answer questions about sides on photographs?",
    claim="Accuracy on COCO-spatial without steering: Gemma-3-4b 0.53, Qwen2-VL-2B 0.60.",
)
STYLES = ("auto", "reference", "choice")


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`style` is the wording: "reference" (the paper's for Qwen2-VL) or "choice" (Gemma 3).

    "auto" is the paper's for the model's kind of encoder: see `style_of`.
    """

    settings_allowed = ("coco",)
    choices: ClassVar = {
        "style": STYLES,
        "name": ("coco_qa_two_obj", "vg_qa_two_obj"),
    }

    setting: str = "coco"
    style: str = "auto"
    name: str = "coco_qa_two_obj"
    """The list: `coco_qa_two_obj` or `vg_qa_two_obj`."""

    @property
    def used_settings(self) -> tuple[str, ...]:
        """None: the photographs are those of the list."""
        return ()

    def check(self) -> None:
        """Raises `DataError` without a usable copy of the data."""
        super().check()
        usable_items(self.data, self.name)

    def files(self) -> dict[str, Path]:
        """Returns the list and its photographs."""
        return listed_files(self.data, self.name)


def usable_items(data: Path | None, name: str) -> tuple[Path, Spatial]:
    """Returns the folder and the list; raises `DataError` if no item is usable."""
    if data is None:
        raise DataError(
            "COCO-spatial needs your copy of the photographs: give --data FOLDER. "
            "docs/reference/data.md describes the folder's layout."
        )
    found = load(data, name)
    if not found.items:
        problems = "; ".join(found.problems[:3])[:200] or "the list is empty"
        raise DataError(f"'{data}' has no usable item: {problems}.")
    return data, found


def listed_files(data: Path | None, name: str) -> dict[str, Path]:
    """Returns a list's file and its photographs, by a name that is free of folders."""
    folder, found = usable_items(data, name)
    pictures = {f"data/{item.path.relative_to(folder)}": item.path for item in found.items}
    return {"data": listing_of(folder, name), **pictures}


def data_of(config: Config) -> Spatial:
    """Returns the list; raises `DataError` without `config.data`."""
    return usable_items(config.data, config.name)[1]


def run_on(model, data: Spatial, config: Config, on_progress: OnProgress = silent) -> Result:
    """Asks every item in both orders of its options."""
    found = data
    style = style_of(model, config.style)
    parts = over_batches(
        "answers",
        {"all": found.items},
        config.batch_size,
        lambda _, batch, __: _answers(model, batch, style),
        on_progress,
        last=True,
    )
    answers = [said for part in parts["all"] for said in part]
    whole = [i for i, said in enumerate(answers) if None not in said]
    if not whole:
        raise none_left("item")
    missing = left_out(len(answers) - len(whole), "item")
    table = _table([found.items[i] for i in whole], [answers[i] for i in whole])
    problems = "; ".join(found.problems[:5])
    return Result(
        **vars(ABOUT),
        table=table,
        images={"an item": opened(found.items[0])},
        verdict="\n".join([_verdict(table), *missing]),
        config={"items": len(found.items), "style": style, "list": config.name},
        notes=(
            "Each item is asked twice, with its options in both orders, and is correct where both "
            "answers are; 'single' counts answers. Wilson intervals; chance is 0.5 for an answer.",
            style_note(style, config.style),
            f"Unusable entries: {len(found.problems)}. {problems}".strip(),
        ),
    )


run = of_config(run_on, data_of)


def style_of(model: Any, style: str) -> str:
    """Returns a wording; for "auto" the paper's for the model's kind of encoder.

    The paper asks Qwen2-VL, whose encoder takes images of any size, in one wording, and
    Gemma 3, whose encoder takes images of one size, in another.
    """
    if style != "auto":
        return style
    return "reference" if model.require_vision().image_size is None else "choice"


def style_note(style: str, given: str) -> str:
    """Returns a note on the wording of the questions."""
    of = {"reference": "Qwen2-VL (images of any size)", "choice": "Gemma 3 (images of one size)"}
    why = "chosen by the model's encoder" if given == "auto" else "as given"
    return f"Questions are worded as the paper does for {of[style]}, {why} (style={style})."


def _answers(model, items: Sequence[SpatialItem], style: str) -> list[list[str | None]]:
    pictures = [opened(item) for item in items for _ in range(2)]
    texts = [text for item in items for text in item.questions(style)]
    with torch.no_grad():
        logits = model(model.prepare(pictures, texts), logits_to_keep=1)
    said = answers_of(final_logits(logits), model.tokenizer)
    return [said[i : i + 2] for i in range(0, len(said), 2)]


def opened(item: SpatialItem) -> Image.Image:
    """Returns an item's photograph; raises `DataError` for an unreadable one."""
    return open_picture(item.path)


def _table(items: Sequence[SpatialItem], answers: Sequence[Any]) -> pd.DataFrame:
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
