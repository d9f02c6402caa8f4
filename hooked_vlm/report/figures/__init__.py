"""Maps experiments to figures: the rows and arrays of each figure, its file name and caption.

Experiments do not depend on figures, and the charts do not depend on experiments.  The tables
here connect both.  A caption explains its figure without the paper.  Experiments of other
distributions bring the function that draws them along.
"""

import warnings
from collections.abc import Mapping

from hooked_vlm.errors import DataError, HookedVLMWarning, callers_level
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.registry import Experiment
from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import (
    ablation,
    backgrounds,
    core,
    open_questions,
    own,
    real_pictures,
    steering,
)
from hooked_vlm.report.figures.drawing import Drawing as Drawing
from hooked_vlm.report.figures.drawing import Draws, Headlines
from hooked_vlm.stimuli.settings import OWN


TOPICS = (core, ablation, steering, backgrounds, open_questions, real_pictures)
DRAW: Draws = {name: draw for topic in (own, *TOPICS) for name, draw in topic.DRAW.items()}
HEADLINES: Headlines = {name: rows for topic in TOPICS for name, rows in topic.HEADLINES.items()}
"""The key numbers of each result, for the top of a report."""


def drawings(result: Result) -> list[Drawing]:
    """Returns the figures of a result, in reading order; an empty list without an entry.

    Figures that the code of another distribution cannot draw are left out, with a warning.
    """
    if result.table.empty:
        return []
    other = _of_another(result)
    if other is None:
        draw = (own.DRAW if result.setting == OWN else DRAW).get(result.id)
        return [] if draw is None else list(draw(result))
    if other.draw is None:
        return []
    try:
        return [_drawing(found) for found in other.draw(result)]
    except Exception as error:  # noqa: BLE001 - of the other distribution's code
        warnings.warn(
            f"The figures of {other.name!r} of {other.origin} are left out: draw(result) raised "
            f"{type(error).__name__}: {str(error)[:160]}.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
        return []


def headlines(result: Result) -> tuple[tuple[Mapping[str, str | None], str], ...]:
    """Returns which key numbers of a result are at the top of a report, with their labels."""
    other = _of_another(result)
    return HEADLINES.get(result.id, ()) if other is None else other.headlines


def _of_another(result: Result) -> Experiment | None:
    """Returns the experiment of a result, if another distribution has it."""
    if result.name in registry.EXPERIMENTS:
        return None
    try:
        return registry.EXTENSIONS.get(result.name)
    except DataError:  # no longer usable: its numbers are still here
        return None


def _drawing(found: object) -> Drawing:
    if not isinstance(found, Drawing):
        raise TypeError(f"expected Drawing(name, figure, caption), not a {type(found).__name__}")
    return found
