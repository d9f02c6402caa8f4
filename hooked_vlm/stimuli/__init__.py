"""Stimuli: images whose layout is known, the questions about them, and pairs of both."""

from hooked_vlm.stimuli.pairs import sample_tuples as sample_tuples
