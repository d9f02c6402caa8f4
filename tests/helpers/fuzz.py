"""Calls public functions with one bad argument each, in plain use; prints what came of it as JSON.

    python -m helpers.fuzz EXAMPLES LINES [SEED]

LINES is a number of command lines to run besides, each with one bad value.  Without a seed the
sample is the same every time.  It runs in a process of its own, because pytest checks the types of
every call before our code is reached.
"""

import inspect
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from helpers.bad_values import KEYWORD, KINDS, NEAR, misspelt
from helpers.fuzzed_calls import Call, calls
from helpers.fuzzed_lines import lines, make_files, without_models
from helpers.fuzzed_lines import outcome as line_outcome
from hooked_vlm.errors import HookedVLMError


MOST = 400
"""Characters of a message."""
OURS = "ours"


def mistakes(all_calls: list[Call]) -> list[tuple[Call, str, str]]:
    """Returns every (call, argument, kind of bad value) that is a mistake."""
    found = []
    for one in all_calls:
        for argument, value in one.given.items():
            kinds = [*KINDS, NEAR] if isinstance(value, str) else [*KINDS]
            found += [(one, argument, k) for k in kinds if k not in one.takes[argument]]
        if not _is_own(one.function):
            found.append((one, "", KEYWORD))
    return found


def _is_own(function: Callable[..., Any]) -> bool:
    """Whether a function is the table's, with arguments of its own names."""
    parameters = inspect.signature(function).parameters.values()
    is_named = all(p.kind is not p.VAR_KEYWORD for p in parameters)
    return function.__name__ == "<lambda>" and is_named if hasattr(function, "__name__") else False


def arguments_of(one: Call, argument: str, kind: str, value: Any) -> dict[str, Any]:
    """Returns a call's arguments, one of them bad."""
    if kind == KEYWORD:
        near = misspelt(next(iter(one.given))) if one.given else "qwerty"
        return {**one.given, near: 3}
    bad = misspelt(one.given[argument]) if kind == NEAR else value
    return {**one.given, argument: bad}


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Returns `OURS`, or what came in place of an error of ours."""
    try:
        function(**arguments)
    except HookedVLMError as error:
        said = str(error)
        return OURS if len(said) <= MOST else f"ours, of {len(said)} characters: {said[:200]}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a raw one
        return f"raw {type(error).__name__}: {str(error)[:150]}"
    return "no error"


def sampled(strategy: st.SearchStrategy[Any], run: Any, examples: int, number: int | None) -> Any:
    """Runs a function on so many values of a strategy; the same ones each time without a seed."""

    @settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(strategy)
    def fuzz(value: Any) -> None:
        run(value)

    (fuzz if number is None else seed(number)(fuzz))()


def of_functions(folder: Path, examples: int, number: int | None) -> dict[str, Any]:
    """Returns what came of so many calls with a bad argument."""
    every = calls(folder)
    for one in every:  # a call that does not work shows nothing
        result = outcome(one.function, one.given)
        assert result == "no error", f"{one.name}: {result}"
    wrong = mistakes(every)
    drawn = st.sampled_from(wrong).flatmap(
        lambda m: st.tuples(st.just(m), KINDS.get(m[2], st.none()))
    )
    came: list[tuple[str, str]] = []

    def run(case: tuple[tuple[Call, str, str], Any]) -> None:
        (one, argument, kind), value = case
        result = outcome(one.function, arguments_of(one, argument, kind, value))
        came.append((f"{one.name}({argument}: {kind})", result))

    sampled(drawn, run, examples, number)
    return {"mistakes": len(wrong), "seed": number, **counted(came)}


def of_lines(folder: Path, examples: int, number: int | None) -> dict[str, Any]:
    """Returns what came of so many command lines with a bad value."""
    make_files(folder)
    came: list[tuple[str, str]] = []

    def run(case: tuple[str, str, list[str]]) -> None:
        _, _, words = case
        came.append((" ".join(words), line_outcome(words)))

    with without_models():
        sampled(lines(), run, examples, number)
    return counted(came)


def counted(came: list[tuple[str, str]]) -> dict[str, Any]:
    """Returns how many of some outcomes are ours, and the others in words."""
    ours = sum(result == OURS for _, result in came)
    failed = sorted({f"{what}: {result}" for what, result in came if result != OURS})
    return {"tried": len(came), "ours": ours, "failed": failed}


def main(examples: int, n_lines: int, number: int | None) -> None:
    """Draws so many mistakes and prints what came of them."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    found = {
        "functions": of_functions(folder, examples, number) if examples else {},
        "lines": of_lines(folder, n_lines, number) if n_lines else {},
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
