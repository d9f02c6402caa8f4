"""Every error and warning that hooked_vlm raises on purpose.

One base class, `HookedVLMError`, so that a caller can catch them all; one child for
each thing a user can get wrong.  Messages say three things, in this order: what was
given, what was expected, what to do about it.  The base is a `ValueError` (never a
`KeyError`, whose text Python prints with its newlines escaped).
"""

import difflib
from collections.abc import Iterable


class HookedVLMError(ValueError):
    """Base of all errors that hooked_vlm raises on purpose."""


class UnknownHookError(HookedVLMError):
    """A hook name, layer or filter that matches no site of this model."""


class UnsupportedModelError(HookedVLMError):
    """A model whose module tree lacks a part that was asked for."""


class HookError(HookedVLMError):
    """A hook function that returned something the model cannot go on with."""


class GridError(HookedVLMError):
    """Images, visual tokens and positions that do not fit together."""


class NoGridError(GridError):
    """An image whose visual tokens make no grid over it, or none that can be found."""


class NoGradientError(GridError):
    """A measurement that needs a gradient, through layers that have none."""


class RegionError(GridError):
    """A region that is empty, off the grid, or of the wrong size for its use."""


class InterventionError(HookedVLMError):
    """An intervention that cannot be carried out as described."""


class DataError(HookedVLMError):
    """Stimuli or files that are missing or malformed."""


class ScoringError(HookedVLMError):
    """An answer that cannot be scored, such as one that is not a single token."""


class CacheMemoryError(HookedVLMError):
    """A cache that will not fit in the memory where it is to be kept."""


class MissingExtraError(HookedVLMError, ImportError):
    """An optional dependency that is not installed."""


class HookedVLMWarning(UserWarning):
    """Something that changes what a number means, though not whether it can be had."""


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """Returns `" Did you mean 'a' or 'b'?"` for the nearest known names, else `""`.

    >>> did_you_mean("hook_resid_pots", ["hook_resid_post", "hook_embed"])
    " Did you mean 'hook_resid_post'?"
    """
    nearest = difflib.get_close_matches(given, list(known), n=limit, cutoff=0.6)
    if not nearest:
        return ""
    return f" Did you mean {' or '.join(repr(name) for name in nearest)}?"
