"""Maps experiments to figures: the rows and arrays of each figure, its file name and caption.

Experiments do not depend on figures, and the charts do not depend on experiments.  The tables
here connect both.  A caption explains its figure without the paper.
"""

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
    """Returns the figures of a result, in reading order; an empty list without an entry."""
    draw = (own.DRAW if result.setting == OWN else DRAW).get(result.id)
    return [] if draw is None or result.table.empty else list(draw(result))
