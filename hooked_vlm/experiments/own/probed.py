"""E3 and E7 on own data: is a label read from visual tokens, and does amplifying it help?

The probe's label is the column `label`, read from the tokens of the boxes (without boxes: from the
mean token of the picture).  Without this column, it is the name of the box that a token is in: of
boxes named left, middle and right, the paper's ordering probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.directions import stack
from hooked_vlm.analysis.probes import (
    Examples,
    LinearProbe,
    class_directions,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.errors import CannotRunError, counted
from hooked_vlm.experiments.batches import left_out
from hooked_vlm.experiments.dual_mechanisms import amplification, ordering_probes
from hooked_vlm.experiments.dual_mechanisms.amplification import (
    answered,
    answered_throughout,
    conditions,
    joined,
    matched_controls,
)
from hooked_vlm.experiments.dual_mechanisms.amplified_accuracy import (
    FORMULAS,
    table_of,
    verdict_of,
)
from hooked_vlm.experiments.dual_mechanisms.order_reading import fit_with_controls
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import SEEDS, SHUFFLES, in_raster
from hooked_vlm.experiments.loop import once, over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.own.setting import OwnSetting
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.tables import format_interval, select
from hooked_vlm.experiments.verdicts import claim_rows, judge, sentence
from hooked_vlm.hooks.names import PROJECTOR
from hooked_vlm.stimuli.own import OwnData, OwnItem


@dataclass(frozen=True, eq=False)
class Labelled:
    """The examples of own pictures, and the parts for fitting and testing."""

    examples: Examples
    names: tuple[str, ...]
    """The label of each number in `examples.y`."""
    pictures: tuple[str, ...]
    """The key of each picture in `examples.images`."""
    train: np.ndarray
    test: np.ndarray
    by_box: bool
    """Whether the label is the name of a token's box."""

    @property
    def alone(self) -> int:
        """The number of pictures whose boxes all have one name: a shuffle changes nothing there."""
        if not self.by_box:
            return 0
        y, images = self.examples.y, self.examples.images
        return sum(len(np.unique(y[images == i])) < 2 for i in np.unique(images))

    def shuffle(self, examples: Examples, *, seed: int) -> Examples:
        """Returns examples with shuffled labels: among the boxes of each picture, or pictures.

        Labels of pictures stay in their part, so that both parts keep as many of each.
        """
        if self.by_box:
            return shuffled_labels(examples, seed=seed)
        images, first, member = np.unique(examples.images, return_index=True, return_inverse=True)
        dealt, rng = examples.y[first].copy(), np.random.default_rng(seed)
        for part in (self.train, self.test):
            own = np.isin(images, part)
            dealt[own] = rng.permutation(dealt[own])
        return replace(examples, y=dealt[member])


def run_probes(setting: OwnSetting, config: Any, on_progress: OnProgress) -> Result:
    """E3: fits probes of a label and their controls, and applies both to held-out pictures."""
    found = labelled(setting, config.seed, 0.25, on_progress)
    fitted, rows = fit_with_controls(
        found.examples,
        len(found.pictures),
        config.seed,
        SEEDS,
        SHUFFLES,
        parts=(found.train, found.test),
        shuffle=found.shuffle,
    )
    chance = next(row["value"] for row in rows if row["quantity"] == "shuffled")
    units = [found.pictures[i] for i in fitted.test]
    about: dict[str, Any] = {"null": chance, "low": 0.0, "high": 1.0}
    for quantity, values in (
        ("accuracy, claim", fitted.accuracies.mean(0)),
        ("converged, claim", fitted.converged_accuracies[0]),
    ):
        rows += claim_rows(values, {}, units, config.seed, quantity=quantity, **about)
    table = pd.DataFrame(rows).assign(axis="all")
    names = ", ".join(found.names)
    return Result(
        **vars(ordering_probes.ABOUT),
        table=table,
        images={"a picture": setting.picture(setting.data.items[0])},
        verdict=_verdict(table, names, found.alone),
        config={"seed": config.seed, "pictures": len(found.pictures), "labels": names},
        notes=(
            _what(found.by_box) + " Features are the projector's output.",
            f"{len(found.train)} pictures fit the probes and {len(found.test)} test them, by the "
            "column split or else 75/25 by a seeded draw; all tokens of a picture are in one part. "
            f"'accuracy' is the mean of {SEEDS} probes fitted as in the paper, 'converged' a "
            "logistic regression on the same tokens, 'shuffled' the mean accuracy of "
            f"{SHUFFLES} probes fitted to and tested on shuffled labels. A picture counts once, by "
            "the share of its tokens. The verdict compares with the control's mean.",
        ),
    )


def run_amplified(setting: OwnSetting, config: Any, on_progress: OnProgress) -> Result:
    """E7: amplifies the label's directions in all visual tokens, and asks the other pictures."""
    found = labelled(setting, config.seed, 0.5, silent)
    examples = found.examples.of_images(found.train)

    def fit() -> list[Tensor]:
        seeds = range(config.seed, config.seed + SEEDS)
        probes = [LinearProbe(seed=seed).fit(examples.X, examples.y) for seed in seeds]
        return [stack(class_directions(probe)) for probe in probes]

    own, *others = once("directions", fit)
    seeds = range(config.seed, config.seed + config.controls)
    controls = matched_controls(own, examples.X, seeds)
    tested = {found.pictures[i] for i in found.test}
    asked: list[OwnItem] = []
    for direction in setting.directions:
        every = setting.stimuli.items([direction])
        asked += [q for q in every if q.image.key in tested][: config.items or None]

    def score(_: str, batch: list[OwnItem], __: OnProgress) -> list[dict[str, np.ndarray]]:
        inputs = setting.inputs(batch)
        whole = [grid.all() for grid in setting.grids(inputs)]
        targets = [normalise(question.target) for question in batch]
        each = [conditions(own, controls, whole, config)]
        for other in others:
            made = conditions(other, {}, whole, config)
            each.append({key: steer for key, steer in made.items() if key[0] in FORMULAS})
        return [answered(setting.model, inputs, targets, made) for made in each]

    parts = over_batches(
        "outcomes", {"all": asked}, config.batch_size, score, on_progress, last=True
    )["all"]
    by_probe = [joined([part[probe] for part in parts]) for probe in range(SEEDS)]
    kept = answered_throughout(by_probe)
    right, *again = ({k: v[..., kept] > 0 for k, v in probe.items()} for probe in by_probe)
    pictures = [asked[i].image.key for i in np.flatnonzero(kept)]
    table = table_of(right, pictures, config.alphas, config.seed, None, again)
    return Result(
        **vars(amplification.ABOUT),
        table=table,
        images={"a picture": setting.picture(asked[0])},
        verdict="\n".join([verdict_of(table), *left_out(int((~kept).sum()), "question")]),
        config={"items": len(pictures), "seed": config.seed, "controls": config.controls},
        notes=(
            f"{_what(found.by_box)} Directions are the class weights of a probe of "
            f"{', '.join(found.names)}, fitted to {counted(len(found.train), 'picture')}; the "
            "questions are about the others. They are amplified at slot 0, in all image tokens.",
            "Formulas and random directions are those of E7 on the built-in settings. P-values are "
            "adjusted (Holm) over formulas; a picture counts once.",
        ),
    )


def check_control(data: OwnData) -> None:
    """Raises `CannotRunError` for data without labels for a probe, or for E3's control."""
    pictures_of(data)
    if not data.has("label") and all(len(item.names) < 2 for item in data.items):
        raise CannotRunError(
            "The control of E3 exchanges the names of a picture's boxes, and no picture has two "
            "boxes. Give the column label, or pictures with boxes of two names."
        )


def pictures_of(data: OwnData) -> tuple[list[OwnItem], tuple[str, ...]]:
    """Returns the first item of each picture, and the names of a probe's labels.

    Raises `CannotRunError` for one label alone, for two labels or parts of one picture, and for a
    split of some pictures alone or without one of its parts.
    """
    by_box = not data.has("label")
    first: dict[str, OwnItem] = {}
    for item in data.items:
        before = first.setdefault(item.image.key, item)
        if not by_box and before.label != item.label:
            raise CannotRunError(
                f"{item.where}: label {item.label!r}, and {before.where} has {before.label!r} for "
                "the same picture. A probe needs one label for each picture."
            )
        if before.split != item.split:
            raise CannotRunError(
                f"{item.where}: split {item.split!r}, and {before.where} has {before.split!r} for "
                "the same picture. A picture either fits a probe or tests it."
            )
    items = list(first.values())
    _parts(items, 0.5, 0)  # raises for a column split that is incomplete
    return items, _names(items, by_box)


def labelled(setting: OwnSetting, seed: int, test_size: float, on_progress: OnProgress) -> Labelled:
    """Returns the examples of a probe, one picture once.

    Raises `CannotRunError` as `pictures_of` does, and where one of the parts has no picture left.
    """
    by_box = not setting.data.has("label")
    items, names = pictures_of(setting.data)
    train, test = _parts(items, test_size, seed)
    found = over_batches(
        "features of the probe",
        {"all": items},
        setting.batch_size,
        lambda _, batch, __: _tokens(setting, batch, by_box),
        on_progress,
    )
    features = [own for batch in found["all"] for own in batch]
    X, y, images, objects = [], [], [], []
    for i, (item, own) in enumerate(zip(items, features, strict=True)):
        if not all(bool(tokens.isfinite().all()) for tokens in own.values()):
            continue
        for name, tokens in own.items():
            label = names.index(name if by_box else str(item.label))
            X.append(tokens)
            y += [label] * len(tokens)
            images += [i] * len(tokens)
            objects += [len(names) * i + (label if by_box else 0)] * len(tokens)
    for part in (train, test):
        if not set(part.tolist()) & set(images):
            raise CannotRunError("No picture is left whose visual tokens are all numbers.")
    examples = Examples(torch.cat(X), np.array(y), np.array(images), np.array(objects))
    seen = examples.of_images(train)
    if len(np.unique(seen.y)) < 2:
        raise CannotRunError(
            f"All pictures that fit the probe have one label, {names[seen.y[0]]!r}; expected two "
            "or more. Give both labels to pictures of split train, or more pictures."
        )
    keys = tuple(item.image.key for item in items)
    return Labelled(examples, names, keys, train, test, by_box)


def _names(items: Sequence[OwnItem], by_box: bool) -> tuple[str, ...]:
    found = dict.fromkeys(n for i in items for n in (i.names if by_box else [str(i.label)]))
    if len(found) < 2:
        what = "boxes have one name" if by_box else "rows have one label"
        raise CannotRunError(
            f"A probe tells two or more labels apart, and all {what}: {', '.join(found)}. Give the "
            "column label, or boxes of two names."
        )
    return tuple(sorted(found))


def _parts(items: Sequence[OwnItem], test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the pictures that fit a probe, and of those that test it."""
    splits = [item.split for item in items]
    without = splits.count(None)
    if without == len(items):
        return split_by_image(len(items), test_size=test_size, seed=seed)
    if without:
        raise CannotRunError(
            f"The column split is empty for {without} of {counted(len(items), 'picture')}. Give it "
            "for every picture, or leave the column out to have pictures drawn."
        )
    train, test = (np.flatnonzero([own == part for own in splits]) for part in ("train", "test"))
    if not len(train) or not len(test):
        raise CannotRunError(
            f"The column split has {counted(len(train), 'picture')} of train and {len(test)} of "
            "test; expected both. Leave the column out to have pictures drawn."
        )
    return train, test


def _tokens(
    setting: OwnSetting, batch: Sequence[OwnItem], by_box: bool
) -> list[dict[str, Float[Tensor, "token d_model"]]]:
    """Returns each picture's tokens at the projector's output by box, or of all boxes together."""
    sizes = {setting.picture(item).size for item in batch}
    if len(sizes) > 1:  # tokens of pictures of several sizes are not one array
        return [own for item in batch for own in _tokens(setting, [item], by_box)]
    inputs, site = setting.inputs(batch), f"{PROJECTOR}.hook_out"
    with torch.no_grad():
        _, cache = setting.model.run_with_cache(inputs, site, stop_at_layer=0)
    features = in_raster(cache[site].float().cpu(), inputs)
    found = []
    for item, own, grid in zip(batch, features, setting.grids(inputs), strict=True):
        regions = item.regions(grid)
        if by_box:
            found.append({name: own[region.tokens] for name, region in regions.items()})
        elif regions:
            cells = sorted({int(t) for region in regions.values() for t in region.tokens})
            found.append({"boxes": own[cells]})
        else:
            found.append({"picture": own.mean(0, keepdim=True)})
    return found


def _what(by_box: bool) -> str:
    return (
        "Own data: each token of a box is an example, labelled by the name of its box."
        if by_box
        else "Own data: each token of a picture's boxes is an example (without boxes, the mean of "
        "its tokens), labelled by the column label."
    )


def _verdict(table: pd.DataFrame, names: str, alone: int) -> str:
    """Returns in words whether each probe reads the label.

    In `alone` pictures the control keeps its labels, so that it is too high: it may then be
    exceeded, and says nothing otherwise.
    """
    parts = []
    unless = f"in {counted(alone, 'picture')} all boxes have one name, which no control exchanges"
    control = select(table, quantity="shuffled").iloc[0]
    for quantity, probe in (
        ("accuracy", "a probe fitted as in the paper"),
        ("converged", "one fitted to convergence"),
    ):
        row = select(table, quantity=f"{quantity}, claim").iloc[0]
        judged = judge(row)
        if alone and not judged.above:
            judged = judge(row, unless=unless)
        said = {1: "reads the label", -1: "reads it worse than its control"}.get(
            judged.sign,
            "does not read the label"
            if judged.outcome == "not found"
            else "undecided whether it reads the label",
        )
        parts.append(f"{probe} {said} ({judged.reason})")
    parts.append(f"control on shuffled labels {format_interval(control)}; labels: {names}")
    return "\n".join(map(sentence, parts))
