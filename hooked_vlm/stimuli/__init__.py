"""Stimuli: pictures with known answers, regions and counterfactuals."""

from hooked_vlm.stimuli.geometry import PAPER_GEOMETRY as PAPER_GEOMETRY
from hooked_vlm.stimuli.geometry import Geometry as Geometry
from hooked_vlm.stimuli.geometry import geometry_for as geometry_for
from hooked_vlm.stimuli.pairs import sample_tuples as sample_tuples
from hooked_vlm.stimuli.prompts import SYSTEM_PROMPT as SYSTEM_PROMPT
