"""Annotated shapes are compared while tests run: in the first case, and in others if asked for."""

import contextlib

import pytest
import torch
from jaxtyping import TypeCheckError

from helpers import shape_checks
from hooked_vlm.viewer.measured import log_odds


@pytest.mark.parametrize("case", ["first", "second"])
def test_a_wrong_dtype_is_refused_where_shapes_are_compared(
    case: str, request: pytest.FixtureRequest
) -> None:
    compared = request.node.stash.get(shape_checks._FIRST, True)  # absent: all cases are
    refused = pytest.raises(TypeCheckError) if compared else contextlib.nullcontext()
    with refused:
        log_odds(torch.zeros(1, 3, dtype=torch.int64), [0])
    # A case that is run alone is the first.
    assert compared or case == "second"
