"""Experiments on a user's own pictures: the setting, what each needs, and how each runs."""
