"""Which figures tell which result: the joint between what was computed and how it is drawn.

An experiment does not know how it will be drawn, and the charts do not know the
experiments.  These tables say, for each claim, which arrays and rows go into which figure,
what the figure is called on disk, and the caption that a reader needs to read it without
the paper at hand.  A result without a row here has its table alone.
"""

from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import ablation, backgrounds, core, open_questions, steering
from hooked_vlm.report.figures.drawing import Drawing as Drawing
from hooked_vlm.report.figures.drawing import Draws, Headlines


TOPICS = (core, ablation, steering, backgrounds, open_questions)
DRAW: Draws = {name: draw for topic in TOPICS for name, draw in topic.DRAW.items()}
HEADLINES: Headlines = {name: rows for topic in TOPICS for name, rows in topic.HEADLINES.items()}
"""Which few numbers of a result stand on top of a report."""


def drawings(result: Result) -> list[Drawing]:
    """Returns the figures of a result, in the order of its argument; none if it has no row."""
    draw = DRAW.get(result.id)
    return [] if draw is None or result.table.empty else list(draw(result))
