"""Experiments E1 to E7, those of the dual-mechanisms paper."""
