"""The page of common errors quotes messages that exist."""

import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hooked_vlm import Ablate, HookedVLM, Patch, Sweep, errors
from hooked_vlm.analysis.scoring import answer_ids
from hooked_vlm.experiments.registry import select


PAGE = (Path(__file__).parent.parent / "docs/guide/errors.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)
model = cache(HookedVLM.from_pretrained)


@cache
def inputs(side: int = 192) -> Any:
    return model("tiny-qwen2-vl").prepare(Image.new("RGB", (side, side)), "What is this?")


def run(*hooks: Any) -> None:
    model("tiny-qwen2-vl").run_with_hooks(inputs(), list(hooks))


CAUSES: dict[str, Callable[[], Any]] = {
    "There is no folder": lambda: HookedVLM.from_pretrained("/nowhere"),
    "Could not load": lambda: HookedVLM.from_pretrained("nowhere/at-all", local_files_only=True),
    "The image processor changed an image": lambda: model("tiny-gemma-3").prepare(
        Image.new("RGB", (300, 200)), "What is this?"
    ),
    "No hook named": lambda: run(("blocks.9.hook_resid_post", lambda a, hook: a)),
    "has no attribute": lambda: model("tiny-qwen2-vl").to_toknes,  # type: ignore[attr-defined]
    "is empty or reaches outside the image": lambda: inputs().grid.box(0, 0, 500, 20),
    "is on a grid of": lambda: run(Ablate(2, at=inputs(96).grid.all())),
    "nothing is broadcast": lambda: run(
        Patch(
            2,
            at=inputs().grid.strip("vertical", 0, 2),
            source=inputs(),
            source_at=inputs().grid.strip("vertical", 0, 3),
        )
    ),
    "returned (1, 1, 128)": lambda: run(("blocks.1.hook_resid_post", lambda a, hook: a[:, :1])),
    "The metric returned": lambda: Sweep(
        inputs(), {"slot": [0]}, lambda slot: Ablate(slot, at=inputs().grid.all())
    ).run(model("tiny-qwen2-vl"), lambda logits: logits.mean()),
    "Eager attention computes them there": lambda: HookedVLM.from_pretrained(
        "tiny-qwen2-vl"
    ).run_with_cache(inputs(), "*hook_pattern"),
    "cannot be scored": lambda: answer_ids(model("tiny-qwen2-vl").tokenizer, "dark green"),
    "There is no experiment": lambda: select("behavior"),
}


def test_every_quoted_message_is_caused_here_or_the_name_of_an_error() -> None:
    assert QUOTED
    assert set(QUOTED) == set(CAUSES) | {name for name in QUOTED if hasattr(errors, name)}


@pytest.mark.parametrize("message", CAUSES)
def test_a_cause_has_the_quoted_message(message: str) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            CAUSES[message]()
        except errors.HookedVLMError as error:
            said = str(error)
        else:
            assert f"`{message}` (warning)" in PAGE
            said = "\n".join(str(warning.message) for warning in warned)
    assert message in said
