"""One ordering probe over What'sUp's three references together: a part of R3."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hooked_vlm.analysis.probes import (
    Examples,
    LinearProbe,
    held_out_accuracy,
    object_examples,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.dual_mechanisms.order_reading import whole_pictures
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import projected
from hooked_vlm.experiments.loop import over_batches
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import interval_rows
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.pairs import Question


AXIS = "horizontal"
Settings = Mapping[str, Setting]
"""The setting of each reference, by its name."""


def drawn_tuples(settings: Settings, at_most: int, seed: int) -> list[Question]:
    """Returns composites of all references in the order of a seeded shuffle, `at_most` of them."""
    every = [q for setting in settings.values() for q in setting.stimuli.items(("left",))]
    random.Random(int(seed)).shuffle(every)
    return every[:at_most]


def probe_rows(
    settings: Settings, n: int, probe_seed: int, seed: int
) -> tuple[list[dict], list[str]]:
    """Returns the rows of one probe, fitted to and read on composites of all references.

    `n` composites at most are drawn with `probe_seed`.  Then a sentence on those that are left
    out because their tokens are not numbers.
    """
    # 1. Examples of each reference at its own boxes; images are numbered in the drawn order.
    asked = drawn_tuples(settings, n, probe_seed)
    numbered = {
        name: [i for i, question in enumerate(asked) if question.reference == name]
        for name in settings
    }
    batches = over_batches(
        "features",
        {name: [asked[i] for i in own] for name, own in numbered.items() if own},
        next(iter(settings.values())).batch_size,
        lambda name, batch, _: projected(settings[name], batch),
        last=True,
    )
    parts, features = [], {}
    for reference, found in batches.items():
        setting, own = settings[reference], numbered[reference]
        tokens = torch.cat(found)
        features |= {i: tokens[at] for at, i in enumerate(own)}
        whole = whole_pictures(tokens)
        found = object_examples(tokens, _boxes(setting.geometry))
        found = found.of_images(np.flatnonzero(whole))
        numbers = np.array(own)
        parts.append(
            replace(
                found,
                images=numbers[found.images],
                objects=3 * numbers[found.images] + found.objects % 3,
            )
        )
    examples = Examples(
        torch.cat([part.X for part in parts]),
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("y", "images", "objects")
        ),
    )
    # 2. The probe and its control, both split by image.
    both = split_by_image(len(asked), seed=seed)
    train, test = (part[np.isin(part, examples.images)] for part in both)
    if not len(train) or len(test) < 2:
        raise none_left("picture")
    rows = []
    shuffled = shuffled_labels(examples, seed=seed)
    for suffix, data in (("", examples), (", shuffled", shuffled)):
        part = data.of_images(train)
        probe = LinearProbe(seed=seed).fit(part.X, part.y)
        accuracy = held_out_accuracy(probe, data.of_images(test))
        shares = [_own_strip(settings, asked[i], features[i], probe) for i in test]
        for quantity, interval in (
            ("probe, objects", accuracy),
            ("probe, background", bootstrap(np.array(shares), seed=seed)),
        ):
            rows += interval_rows(interval, {}, part="probes", quantity=quantity + suffix)
    wrong = len(asked) - len(np.unique(examples.images))
    return rows, left_out(wrong, "picture", "probes", "tokens")


def _boxes(layout: Any) -> list[Region]:
    """Returns the cells of each place's object that the probe is fitted to."""
    return [layout.probe_region(AXIS, place) for place in range(3)]


def _own_strip(
    settings: Settings, question: Question, tokens: torch.Tensor, probe: LinearProbe
) -> float:
    """Returns the share of a picture's background tokens that a probe gives to their strip."""
    layout = settings[question.reference].geometry
    strip = np.zeros(layout.shape, dtype=int)
    for place in range(3):
        strip[layout.strip_region(AXIS, place).mask] = place
    given = probe.probability_map(tokens.unflatten(0, layout.shape)).argmax(-1).cpu().numpy()
    return float((given == strip)[layout.background(AXIS).mask].mean())
