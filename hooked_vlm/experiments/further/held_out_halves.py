"""Probes of E3 fitted to one half of a setting's pictures, for use on the other: Q7 and Q8.

With a quarter held out, no difference is small enough to exclude: half of the pictures are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.analysis.probes import object_examples
from hooked_vlm.experiments.batches import left_out
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    Fitted,
    fit_with_controls,
    probe_regions,
    whole_pictures,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import SEEDS, projected_all
from hooked_vlm.experiments.setting import Setting, sampled
from hooked_vlm.stimuli.pairs import Question


HELD_OUT = 0.5
"""Share of the pictures to which no probe is fitted."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Probes fitted to one half of an axis's pictures, and what the other half is."""

    fitted: Fitted
    rows: list[dict]
    """Table rows of held-out accuracies."""
    asked: list[Question]
    """The questions of the held-out pictures."""
    usual: Tensor
    """Their projected tokens, `[image, token, d_model]`."""
    left_out: list[str]
    """A sentence on pictures whose tokens are not numbers, if there are any."""

    @classmethod
    def of(cls, setting: Setting, axis: str, n_images: int, seed: int) -> "Halves":
        """Fits the probes to a seeded sample of an axis's pictures (0: all)."""
        direction = "left" if axis == "horizontal" else "above"
        questions = sampled(setting, direction, n_images, seed)
        tokens = projected_all(setting, {axis: questions})[axis]
        whole = whole_pictures(tokens)
        examples = object_examples(tokens, probe_regions(setting.geometry, axis))
        examples = examples.of_images(np.flatnonzero(whole))
        fitted, rows = fit_with_controls(examples, len(tokens), seed, SEEDS, test_size=HELD_OUT)
        asked = [questions[i] for i in fitted.test]
        missing = left_out(int((~whole).sum()), "picture", axis, "tokens")
        return cls(fitted, rows, asked, tokens[torch.as_tensor(fitted.test)], missing)
