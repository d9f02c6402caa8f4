"""The conformance suite on five architectures of different layouts (`make conformance`: all)."""

import pytest

from conformance.exceptions import EXCEPT, NOT_SERVED
from conformance.suite import LAWS, check
from conformance.tiny import architectures
from hooked_vlm.checks.laws import NO


QUICK = (
    "qwen2_5_vl",  # packed, 2x2 blocks, windows, M-RoPE
    "qwen3_vl",  # DeepStack
    "blip-2",  # a Q-former: no grid
    "mllama",  # cross-attention
    "qwen3_5",  # linear attention
)


def broken(model_type: str) -> dict[str, str]:
    row = check(model_type)
    assert not row.reason
    assert row.seconds > 0
    return {
        law: finding.note
        for law, finding in row.findings.items()
        if finding.verdict == NO and (model_type, law) not in EXCEPT
    }


@pytest.mark.filterwarnings("ignore")  # transformers says what is slow and deprecated
@pytest.mark.parametrize("model_type", QUICK)
def test_every_law_holds(model_type: str) -> None:
    assert broken(model_type) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(set(architectures()) - set(QUICK) - set(NOT_SERVED)))
def test_every_law_holds_for_the_others(model_type: str) -> None:
    assert broken(model_type) == {}


def test_exceptions_name_what_there_is() -> None:
    known = set(architectures())
    assert set(NOT_SERVED) <= known
    assert {name for name, _ in EXCEPT} <= known - set(NOT_SERVED)
    assert {law for _, law in EXCEPT} <= set(LAWS)
