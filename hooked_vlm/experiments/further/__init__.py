"""Experiments E8 and E9, on real pictures, and on what the paper leaves open."""
