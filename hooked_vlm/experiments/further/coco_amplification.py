"""E7 on COCO-spatial: amplified ordering on photographs with two things. (paper, 5.4, Table 2)

Ordering probes are fitted to the mean token of each object's box, on items that the model
answers correctly in both orders of the options (protocol 2.7).  Their directions are amplified
in all image tokens of *all* items, so broken answers are counted as well as corrected ones.

Pictures have different sizes and token grids, so items are batched by size.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.directions import stack
from hooked_vlm.analysis.probes import Examples, LinearProbe, class_directions, split_by_image
from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.errors import CannotRunError, DataError, HookedVLMWarning, counted
from hooked_vlm.experiments.answers import without_numbers
from hooked_vlm.experiments.batches import left_out as without
from hooked_vlm.experiments.dual_mechanisms.amplification import (
    Strengths,
    answered,
    answered_throughout,
    conditions,
    joined,
    matched_controls,
)
from hooked_vlm.experiments.dual_mechanisms.amplified_accuracy import (
    CONTROLS,
    table_of,
    verdict_of,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import in_raster
from hooked_vlm.experiments.further.coco_published import NOTE, listings, published_rows
from hooked_vlm.experiments.further.coco_spatial import (
    STYLES,
    listed_files,
    opened,
    style_note,
    style_of,
    usable_items,
)
from hooked_vlm.experiments.loop import once, over, part_of, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import of_config
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.hooks.names import PROJECTOR
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.datasets.coco import Spatial
from hooked_vlm.stimuli.datasets.coco_boxes import Boxed, BoxedItem, with_boxes
from hooked_vlm.stimuli.datasets.coco_boxes import find as annotations
from hooked_vlm.sweeps.sweep import final_logits


ABOUT = About(
    id="R2",
    name="coco-amplification",
    section="5.4, Table 2 (v2)",
    title="Does amplified ordering correct wrong answers on photographs?",
    claim=(
        "On COCO-spatial (440 items) accuracy rises from 0.53 to 0.72 (random directions 0.57) for "
        "Gemma-3-4b and from 0.60 to 0.82 (random 0.65) for Qwen2-VL-2B."
    ),
)
TEST_SHARE = 0.05
FEWEST = 4
"""Minimum number of correct items of an axis for fitting a probe of two classes."""


@dataclass(frozen=True, kw_only=True)
class Config(Strengths):
    """`style` is the wording, as in R1; `boxes` a file of detected boxes.

    Detected boxes are used for objects of which COCO has no box
    (`stimuli.datasets.coco_boxes.read_detected` describes the file).
    """

    settings_allowed = ("coco",)
    choices: ClassVar = {
        "style": STYLES,
        "name": ("coco_qa_two_obj", "vg_qa_two_obj"),
    }

    setting: str = "coco"
    style: str = "auto"
    name: str = "coco_qa_two_obj"
    boxes: Path | None = None

    @property
    def used_settings(self) -> tuple[str, ...]:
        """None: the photographs are those of the list."""
        return ()

    def check(self) -> None:
        """Raises `DataError` without a usable copy of the data and of COCO's annotations."""
        super().check()
        usable_boxes(self.data, self.name, self.boxes)

    def files(self) -> dict[str, Path]:
        """Returns the list, its photographs, COCO's annotations and the detected boxes."""
        folder, _ = usable_items(self.data, self.name)
        found = {**listed_files(folder, self.name), "annotations": annotations(folder)}
        return found | ({"boxes": self.boxes} if self.boxes is not None else {})


def usable_boxes(data: Path | None, name: str, boxes: Path | None = None) -> tuple[Spatial, Boxed]:
    """Returns the list and its items with boxes; raises `DataError` if no item is usable."""
    folder, listed = usable_items(data, name)
    found = with_boxes(listed.items, folder, boxes)
    if not found.items:
        problems = "; ".join([*listed.problems, *found.problems][:3])[:200]
        raise DataError(f"'{folder}' has no usable item: {problems}.")
    return listed, found


@dataclass(frozen=True, eq=False)
class Told:
    """The results of one item without intervention."""

    right: bool
    listings: tuple[int, ...]
    """The state of its two listings in the published count (`coco_published`)."""
    tokens: Float[Tensor, "token d_model"]
    things: Float[Tensor, "2 d_model"]
    """Mean tokens of the left and the right object, or of the upper and the lower one."""
    has_numbers: bool = True
    """Whether its tokens and its logits are all numbers."""


def data_of(config: Config) -> tuple[Spatial, Boxed]:
    """Returns the list and its items with boxes; raises `DataError` without `config.data`."""
    return usable_boxes(config.data, config.name, config.boxes)


def run_on(
    model, data: tuple[Spatial, Boxed], config: Config, on_progress: OnProgress = silent
) -> Result:
    """Fits probes on correctly answered items, then asks every item at every strength."""
    listed, found = data
    style = style_of(model, config.style)
    problems = [*listed.problems, *found.problems]
    # 1. The answers and tokens of every item, without intervention.
    told = _told(model, found.items, style, config.batch_size, part_of(on_progress, 0, 2))
    # 2. A probe of each axis, and the items that are asked with its directions.
    asked: dict[str, tuple[list[BoxedItem], Any]] = {}
    rows, left_out = [], []
    for axis in ("horizontal", "vertical"):
        own = [i for i in found.items if i.item.axis == axis and told[i].has_numbers]
        right = [item for item in own if told[item].right and item.is_as_captioned]
        if len(right) < FEWEST:
            left_out.append(
                f"{axis}: {len(right)} of {counted(len(own), 'item')} correct, too few for a probe "
                "(without those whose boxes contradict their caption)."
            )
            continue
        probe, interval = fitted([told[item] for item in right], config.seed)
        rows += interval_rows(interval, {}, axis=axis, quantity="probe, held out")
        w = once(f"directions, {axis}", lambda probe=probe: stack(class_directions(probe)))
        tokens = torch.cat([told[item].tokens for item in right])
        controls = matched_controls(w, tokens, range(config.seed, config.seed + config.controls))
        for i, group in enumerate(by_size(own, config.batch_size)):
            asked[f"{axis} {i}"] = group, partial(conditions, w, controls)
    if not asked:
        raise CannotRunError(f"No probe could be fitted: {' '.join(left_out)}")
    verdicts = _outcomes(model, asked, style, config, part_of(on_progress, 1, 2))
    items = [item for group, _ in asked.values() for item in group]
    # 3. The table.
    listings_, whole = by_listing(joined(list(verdicts.values())))
    n_left = sum(not one.has_numbers for one in told.values()) + int((~whole).sum())
    left_out += without(n_left, "item")
    items = [items[i] for i in np.flatnonzero(whole)]
    before = np.array([told[item].listings for item in items])
    published = published_rows(before, listings_, config.alphas)
    outcomes = {kind: both[..., 0] & both[..., 1] for kind, both in listings_.items()}
    photographs = [item.item.image_id for item in items]
    table = table_of(outcomes, photographs, config.alphas, config.seed)
    probes = type(table)(rows)
    return Result(
        **vars(ABOUT),
        table=type(table)([*table.to_dict("records"), *published, *rows]),
        images={"an item": opened(items[0].item)},
        verdict="\n".join(
            [
                verdict_of(table),
                "Probes on held-out items: "
                + "; ".join(
                    f"{axis} {format_interval(select(probes, axis=axis).iloc[0])}"
                    for axis in probes["axis"]
                )
                + ".",
                _published_verdict(pd.DataFrame(published)),
                *left_out,
            ]
        ).strip(),
        config={"items": len(items), "style": style, "list": config.name},
        notes=(
            "Each item is asked in both orders of its options and is correct where both answers "
            "are. Probes have two classes for each axis and are fitted to 95 % of the correct "
            "items; their directions are amplified at slot 0, in all image tokens of all items, "
            "including those of the probe's fit, as published. Items whose boxes contradict their "
            "caption are asked, and no probe is fitted to them.",
            NOTE,
            style_note(style, config.style),
            f"'{CONTROLS[0]}' and the other columns are as in E7. Unusable entries: "
            f"{len(problems)}. {'; '.join(problems[:5])}".strip(),
        ),
    )


run = of_config(run_on, data_of)


def _told(
    model, items: Sequence[BoxedItem], style: str, at_most: int, on_progress: OnProgress
) -> dict[BoxedItem, Told]:
    """Returns what each item gives without intervention."""
    groups = by_size(items, at_most)
    seen = over(
        "observed",
        {str(i): group for i, group in enumerate(groups)},
        lambda group, _: [vars(one) for one in observed(model, group, style)],
        on_progress,
    )
    return {
        item: Told(**one)
        for group, each in zip(groups, seen.values(), strict=True)
        for item, one in zip(group, each, strict=True)
    }


def _outcomes(
    model,
    asked: Mapping[str, tuple[list[BoxedItem], Any]],
    style: str,
    config: Config,
    on_progress: OnProgress,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns what `answered` does for each group of items, at its own conditions."""

    def score(unit: tuple[list[BoxedItem], Any], _: OnProgress) -> dict[str, np.ndarray]:
        group, conditions_at = unit
        inputs = inputs_of(model, group, style)
        made = conditions_at(Region.everything(inputs.grids[0][0].shape), config)
        targets = [item.item.side for item in group for _ in range(2)]
        return answered(model, inputs, targets, made)

    return over("outcomes", asked, score, on_progress, last=True)


def by_listing(
    right: Mapping[str, Float[np.ndarray, "seed alpha row"]],
) -> tuple[dict[str, Bool[np.ndarray, "seed alpha item order"]], Bool[np.ndarray, " item"]]:
    """Returns whether each order of an item's options is right, two rows each, and which items.

    An item is left out where one of its orders is NaN under any condition.
    """
    each = {kind: rows.reshape(*rows.shape[:2], -1, 2) for kind, rows in right.items()}
    whole = answered_throughout([{kind: rows.sum(-1) for kind, rows in each.items()}])
    return {kind: rows[:, :, whole] > 0 for kind, rows in each.items()}, whole


def _published_verdict(rows: pd.DataFrame) -> str:
    """Returns in words the published count at the strength that is best for it."""
    if rows.empty:
        return "Published count: no prediction is one of the two options of its axis."
    words = []
    for kind in ("released", CONTROLS[0]):
        here = select(rows, kind=kind, quantity="published, accuracy")
        if here.empty:
            continue
        start, best = here.iloc[0], here.sort_values("value").iloc[-1]
        words.append(
            f"{kind}: accuracy {start['value']:.2f} at alpha {start['alpha']:g}, at best "
            f"{best['value']:.2f} (alpha {best['alpha']:g}, {counted(best['n'], 'item')})"
        )
    return f"Published count, in which nothing can break: {'; '.join(words)}."


def by_size(items: Sequence[BoxedItem], at_most: int) -> list[list[BoxedItem]]:
    """Returns items in groups whose pictures have one size, so that they share a token grid."""
    sizes: dict[tuple[int, int], list[BoxedItem]] = defaultdict(list)
    for item in items:
        sizes[opened(item.item).size].append(item)
    step = max(1, at_most // 2)
    return [own[i : i + step] for own in sizes.values() for i in range(0, len(own), step)]


def inputs_of(model, group: Sequence[BoxedItem], style: str) -> Inputs:
    """Returns two rows for each item: its question in both orders of the options."""
    pictures = [opened(item.item) for item in group for _ in range(2)]
    texts = [text for item in group for text in item.item.questions(style)]
    with warnings.catch_warnings():
        # Photographs may be resized: the boxes are laid on the grid of the resized picture.
        warnings.filterwarnings("ignore", "The image processor changed", HookedVLMWarning)
        return model.prepare(pictures, texts)


def observed(model, group: Sequence[BoxedItem], style: str) -> list[Told]:
    """Returns each item's verdict and tokens, from one run."""
    site = f"{PROJECTOR}.hook_out"
    inputs = inputs_of(model, group, style)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, site, logits_to_keep=1)
    last = final_logits(logits)
    has_logits = ~without_numbers(last)
    # Of logits that are not numbers any answer: the item is left out.
    last = last.masked_fill(~has_logits[:, None], 0.0)
    answers = [normalise(answer) for answer in top_answer(last, model.tokenizer)]
    features = in_raster(cache[site].float().cpu(), inputs)
    found = []
    for i, item in enumerate(group):
        tokens, grid = features[2 * i], inputs.grids[2 * i][0]
        width, height = grid.image_size
        means = []
        for x0, y0, x1, y1 in item.by_class:
            region = grid.box(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
            means.append(tokens[region.tokens].mean(0))
        said = answers[2 * i : 2 * i + 2]
        both = slice(2 * i, 2 * i + 2)
        has_numbers = bool(has_logits[both].all()) and bool(features[both][0].isfinite().all())
        right, states = item.item.is_right(said), listings(item.item, said)
        found.append(Told(right, states, tokens, torch.stack(means), has_numbers))
    return found


def fitted(told: Sequence[Told], seed: int):
    """Returns a probe of two classes, and how many held-out things it reads (by item)."""
    X = torch.cat([one.things for one in told])
    images = np.repeat(np.arange(len(told)), 2)
    y = np.tile([0, 1], len(told))
    examples = Examples(X, y, images, 2 * images + y)
    share = max(TEST_SHARE, 1 / len(told))  # at least one item is held out
    train, test = split_by_image(len(told), test_size=share, seed=seed)
    part, held = examples.of_images(train), examples.of_images(test)
    probe = LinearProbe(seed=seed).fit(part.X, part.y)
    right = (probe.predict(held.X) == held.y).reshape(-1, 2).all(1)
    return probe, wilson(float(right.sum()), len(right))
