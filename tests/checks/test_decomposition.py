"""The law of decompositions notices parts that do not sum to the stream (E3)."""

from typing import Any

import pytest
import torch

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.checks.decomposition import check_decomposition
from hooked_vlm.errors import DataError
from hooked_vlm.hooks.cache import ActivationCache


@pytest.mark.parametrize("family", FAMILIES)
def test_e3_parts_sum(family: str) -> None:
    found = check_decomposition(tiny(family), make_inputs(family, 2))
    assert (found.law, found.verdict, found.note) == ("decomposition", "yes", "")


def test_e3_a_lost_part_and_an_error_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = ActivationCache.decompose_resid

    def lossy(self: Any, *args: Any, **options: Any) -> torch.Tensor:
        return own(self, *args, **options)[:-1]

    def refusing(self: Any, *args: Any, **options: Any) -> torch.Tensor:
        raise DataError("No sum.")

    inputs = make_inputs("llava")
    monkeypatch.setattr(ActivationCache, "decompose_resid", lossy)
    assert check_decomposition(tiny("llava"), inputs).verdict == "no"
    monkeypatch.setattr(ActivationCache, "decompose_resid", refusing)
    found = check_decomposition(tiny("llava"), inputs)
    assert (found.verdict, found.note) == ("n/a", "LM: No sum.; vision_encoder: No sum.")
