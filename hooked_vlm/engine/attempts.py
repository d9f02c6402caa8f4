"""Trying a faster way on a model that may not allow it: `attempt`."""

import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from hooked_vlm.errors import HookedVLMError, HookedVLMWarning, HookError, callers_level


Result = TypeVar("Result")

BUGS = (AttributeError, NameError, KeyError, IndexError, TypeError)
"""Errors that our own code should never raise by itself, whatever the model."""


class GrowthError(HookError):
    """Why a model, or a sweep, cannot be run as one growing batch."""


def attempt(run: Callable[[], Result], what: str) -> Result:
    """Returns what `run` returns; raises `GrowthError` where the model does not allow it.

    The caller then takes a slower way.  Running out of memory is passed on: the caller halves
    its batch.  An error that only a mistake in this package explains also leads to the slower
    way, with a warning: it says nothing about the model.
    """
    try:
        return run()
    except (torch.OutOfMemoryError, GrowthError):
        raise
    except HookedVLMError as error:
        raise GrowthError(str(error)) from error
    except Exception as error:
        if _is_a_bug(error):
            warnings.warn(
                f"{what}: {type(error).__name__}: {error}. This is a mistake in hooked_vlm, not in "
                "your model; the sweep runs by a slower way. Please report it.",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )
        raise GrowthError(f"{what}: {error}") from error


def _is_a_bug(error: Exception) -> bool:
    """Whether an error of a kind that models do not explain was raised by a line of ours."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    module = innermost.f_globals.get("__name__", "").split(".")[0]
    # Tests check what our functions take and return.
    return isinstance(error, BUGS) and module in ("hooked_vlm", "jaxtyping", "beartype")
