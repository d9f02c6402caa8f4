"""Experiments and settings of other distributions: found by entry points, or registered."""
