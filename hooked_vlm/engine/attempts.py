"""Trying a faster way on a model that may not allow it: `attempt`."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hooked_vlm.errors import HookedVLMError, HookedVLMWarning, HookError, callers_level


Result = TypeVar("Result")

BUGS = (AttributeError, NameError, KeyError, IndexError, TypeError)
"""Errors that our own code should never raise by itself, whatever the model."""


class GrowthError(HookError):
    """Why a model, or a sweep, cannot be run by a faster engine."""

    is_news = True
    """Whether the user must be told that a slower engine runs."""


class NotFasterError(GrowthError):
    """Why a faster engine is not tried: it would save nothing, or the user's own hooks are open."""

    is_news = False


def require_worth(model: Any, cells: Sequence[Any], fewest: int) -> None:
    """Raises `GrowthError` where a faster engine cannot run, or saves nothing, whatever the cells.

    Hooks that the user opened act in every pass, and how is theirs to say: each cell is a whole
    pass then.  That is as asked for and no news; a model left in training is a mistake.
    """
    if len(cells) < fewest:
        raise NotFasterError("there is one cell" if len(cells) == 1 else "there are few cells")
    if model.is_hooked:
        raise NotFasterError("hooks are open")
    if model.hf_model.training:
        raise GrowthError("the model is in training (call model.hf_model.eval())")


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
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error  # what a CPU says
        found = GrowthError(f"{what}: {error}")
        if _is_a_bug(error):
            found.is_news = False  # this warning tells it
            warnings.warn(
                f"{what}: {type(error).__name__}: {error}. This is a mistake in hooked_vlm, not in "
                "your model; the sweep runs by a slower way. Please report it.",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )
        raise found from error


def _is_a_bug(error: Exception) -> bool:
    """Whether an error of a kind that models do not explain was raised by a line of ours."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    module = innermost.f_globals.get("__name__", "").split(".")[0]
    # Tests check what our functions take and return.
    return isinstance(error, BUGS) and module in ("hooked_vlm", "jaxtyping", "beartype")
