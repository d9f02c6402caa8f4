"""Notes on a result that do not depend on the experiment: names left out, precision."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import for_tokenizer, stimuli_of


Run = Callable[[Any, Any, OnProgress], Result]


def with_notes(run: Run) -> Run:
    """Returns an experiment's `run` that adds `notes_of` to its result."""

    @wraps(run)
    def noted(model: Any, config: Config, on_progress: OnProgress) -> Result:
        found = run(model, config, on_progress)
        return replace(found, notes=(*found.notes, *notes_of(model, config)))

    return noted


def notes_of(model: Any, config: Config) -> tuple[str, ...]:
    """Returns what distinguishes this model's run from the paper's, in sentences."""
    found = []
    for setting in config.used_settings:
        stimuli = stimuli_of(replace(config, setting=setting))
        found.append(for_tokenizer(stimuli, model.tokenizer)[1])
    if config.in_float32:
        found.append(_precision(model.cfg.dtype))
    return tuple(note for note in found if note)


def _precision(dtype: torch.dtype) -> str:
    if dtype.itemsize >= torch.float32.itemsize:
        return f"Computed in {_name(dtype)}; the paper computes this in float32."
    return (
        f"Computed in {_name(dtype)}, unlike in the paper, which computes this in float32 because "
        "borderline answers depend on the precision (Table 5). Give --dtype float32 to compare "
        "with its numbers."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
