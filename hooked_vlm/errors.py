"""All errors and warnings that hooked_vlm raises on purpose.

All errors derive from `HookedVLMError`, so a caller can catch them together; each subclass
is one kind of wrong use.  A message has three parts, in this order: the value given, the
value expected, and the remedy.  The base class is a `ValueError` and not a `KeyError`,
because Python prints the message of a `KeyError` with escaped newlines.
"""

import difflib
import sys
from collections.abc import Iterable


MOST = 400
"""Characters of a message."""


LISTED = 20
"""Problems that one message lists; it counts the others."""


def _shortened(text: object) -> object:
    """Returns a message without its middle, where what a user gave has made it too long."""
    if not isinstance(text, str) or len(text) <= MOST:
        return text
    return f"{text[:200]} … {text[-160:]}"


class HookedVLMError(ValueError):
    """Base class of all errors that hooked_vlm raises on purpose.

    >>> from hooked_vlm import Region
    >>> try:
    ...     Region.column_band((4, 4), 3, 6)
    ... except HookedVLMError as error:
    ...     print(type(error).__name__, error)
    RegionError strip needs columns 3 to 6 (half-open), and the grid has 4.
    Give 0 <= start < stop <= 4.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*map(_shortened, args))


class UnknownHookError(HookedVLMError):
    """A hook name, layer or filter that matches no site of this model."""


class UnsupportedModelError(HookedVLMError):
    """A model without a part that is needed, or of a kind that is not supported."""


class MissingWeightsError(UnsupportedModelError):
    """A checkpoint without some of the model's weights, which would be random."""


class HookError(HookedVLMError):
    """A hook function with a wrong result, or a use of hooks that cannot work."""


class GridError(HookedVLMError):
    """Images, visual tokens and positions that are inconsistent."""


class NoGridError(GridError):
    """An image whose visual tokens form no grid, or whose grid cannot be found."""


class NoGradientError(GridError):
    """A measurement that needs a gradient through layers that have none."""


class RegionError(GridError):
    """A region that is empty, off the grid, or of the wrong size for its use."""


class InterventionError(HookedVLMError):
    """An intervention that cannot be carried out as described."""


class DataError(HookedVLMError):
    """Stimuli or files that are missing or malformed."""


class DataProblemsError(DataError):
    """Data with problems: the message lists all of them, one a line, the first 20 in full.

    >>> print(DataProblemsError("2 problems in 'items.csv'.", ["row 1: no image", "row 2: no id"]))
    2 problems in 'items.csv'.
      row 1: no image
      row 2: no id
    """

    def __init__(self, summary: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        """Every problem, also those that the message only counts."""
        lines = [f"  {_shortened(problem)}" for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"  and {len(self.problems) - LISTED} more")
        ValueError.__init__(self, "\n".join([str(_shortened(summary)), *lines]))

    def __reduce__(self) -> tuple:
        """Returns how to make the error again, in another process."""
        return _again, (str(self), self.problems)


def _again(message: str, problems: tuple[str, ...]) -> DataProblemsError:
    found = DataProblemsError("", problems)
    found.args = (message,)
    return found


class CannotRunError(DataError):
    """An experiment that this model cannot run, such as one whose questions it answers wrongly."""


class ScoringError(HookedVLMError):
    """An answer that cannot be scored, such as an answer of several tokens."""


class CacheMemoryError(HookedVLMError):
    """A cache that does not fit into the memory of its device."""


class MissingExtraError(HookedVLMError, ImportError):
    """An optional dependency that is not installed."""


class UnknownNameError(HookedVLMError, AttributeError, KeyError):
    """An attribute or an item that is not there; `hasattr` and `get` rely on it."""

    __str__ = ValueError.__str__  # a KeyError shows its message with escapes


class HookedVLMWarning(UserWarning):
    """The result is computed, but may not mean what the user expects.

    To treat such a result as an error:

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", HookedVLMWarning)
    ...     # model.prepare(image, text) now raises instead of warning
    """


_WRAPPERS = ("jaxtyping", "beartype")


def callers_level() -> int:
    """Returns the `stacklevel` with which a warning shows the line that called this package."""
    modules = []
    frame = sys._getframe(1)
    while frame is not None:
        modules.append(str(frame.f_globals.get("__name__")).partition(".")[0])
        frame = frame.f_back
    # Wrappers of this function itself are no callers of `warnings.warn`.
    own = next((i for i, name in enumerate(modules) if name not in _WRAPPERS), 0)
    ours = ("hooked_vlm", "contextlib", *_WRAPPERS)
    outside = next((i for i, name in enumerate(modules) if i >= own and name not in ours), own)
    return outside - own + 1


def counted(n: object, noun: str, plural: str = "") -> str:
    """Returns a number with its noun in the right form.

    >>> counted(1, "image"), counted(2, "image"), counted(2, "entry", "entries")
    ('1 image', '2 images', '2 entries')
    """
    return f"{n} {noun if n == 1 else plural or f'{noun}s'}"


def did_you_mean(given: object, known: Iterable[str], limit: int = 3) -> str:
    """Returns `" Did you mean 'a' or 'b'?"` for the nearest known names, else `""`.

    >>> did_you_mean("hook_resid_pots", ["hook_resid_post", "hook_embed"])
    " Did you mean 'hook_resid_post'?"
    """
    nearest = difflib.get_close_matches(str(given), list(known), n=limit, cutoff=0.6)
    if not nearest:
        return ""
    return f" Did you mean {' or '.join(repr(name) for name in nearest)}?"
