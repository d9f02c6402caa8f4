"""A faster way that fails leads to a slower one; a mistake of ours is not taken for the model's."""

from types import FunctionType
from typing import Any

import pytest
import torch

from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.errors import GridError, HookedVLMWarning


def raising(error: Exception, module: str) -> Any:
    """A function of a module that raises an error."""

    def run() -> None:
        raise error

    return FunctionType(run.__code__, {"__name__": module}, closure=run.__closure__)


def test_what_works_is_returned():
    assert attempt(lambda: 7, "counting") == 7


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), KeyError("x"), TypeError("x"), NotImplementedError("x")]
)
def test_an_error_of_the_model_is_a_reason(error):
    with pytest.raises(GrowthError, match="a block refused the rows"):
        attempt(raising(error, "transformers.models.own"), "a block refused the rows")


@pytest.mark.parametrize("module", ["hooked_vlm.engine.batch", "transformers.cache_utils"])
def test_running_out_of_memory_is_passed_on(module):
    with pytest.raises(torch.OutOfMemoryError):
        attempt(raising(torch.OutOfMemoryError("full"), module), "a block refused the rows")


def test_errors_of_ours_keep_their_words():
    with pytest.raises(GrowthError, match=r"^no grid$"):
        attempt(raising(GridError("no grid"), "hooked_vlm.regions.grid"), "a block refused")


@pytest.mark.parametrize("error", [AttributeError("x"), KeyError("x"), TypeError("x")])
def test_a_mistake_of_ours_surfaces(error):
    with (
        pytest.raises(GrowthError),
        pytest.warns(HookedVLMWarning, match="This is a mistake in hooked_vlm"),
    ):
        attempt(raising(error, "hooked_vlm.engine.batch"), "a block refused the rows")


def test_what_torch_refuses_in_a_line_of_ours_may_be_the_models_doing():
    with pytest.raises(GrowthError, match="sizes"):
        attempt(raising(RuntimeError("sizes"), "hooked_vlm.engine.batch"), "a block refused")
