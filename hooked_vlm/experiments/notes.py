"""Notes on a result that do not depend on the experiment: names left out, precision."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import for_tokenizer
from hooked_vlm.stimuli.sets import StimulusSet


RunOn = Callable[..., Result]
"""`run_on(model, data, config, on_progress)`."""


def with_notes(run_on: RunOn) -> RunOn:
    """Returns an experiment's `run_on` that adds `notes_of` to its result."""

    @wraps(run_on)
    def noted(model: Any, data: Any, config: Config, on_progress: OnProgress = silent) -> Result:
        found = run_on(model, data, config, on_progress)
        return replace(found, notes=(*found.notes, *notes_of(model, data, config)))

    return noted


def notes_of(model: Any, data: Any, config: Config) -> tuple[str, ...]:
    """Returns what distinguishes this model's run from the paper's, in sentences."""
    sets = data.values() if isinstance(data, Mapping) else [data]
    found = [for_tokenizer(one, model.tokenizer)[1] for one in sets if isinstance(one, StimulusSet)]
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
