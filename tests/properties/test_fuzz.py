"""Wrong types, shapes, values and names end in an error of ours that says what is wrong.

Every public function is called with one bad argument, and the command line with one bad value.
The sample is the same each time; `FUZZ_EXAMPLES=20000` draws a larger one with a seed of its own.
"""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


EXAMPLES, LINES = 1000, 100
SHARE = 0.95
"""Of the bad arguments, how many end in an error of ours."""
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    words = [str(EXAMPLES), str(LINES)]
    if more := os.environ.get("FUZZ_EXAMPLES"):
        seed = secrets.randbelow(2**31)
        words = [more, str(int(more) // 10), str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fuzz", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_i4_f_a_bad_argument_ends_in_an_error_of_ours(found: dict[str, Any]) -> None:
    one = found["functions"]
    said = f"{one['ours']} of {one['tried']} bad arguments end in an error of ours (seed "
    said = "\n".join([f"{said}{one['seed']}); the others:", *one["failed"]])
    sys.stdout.write(f"{said}\n")  # shown by -rP
    assert one["tried"] >= EXAMPLES // 2
    assert one["ours"] >= SHARE * one["tried"], said


def test_i3_a_bad_value_on_the_command_line_is_one_message(found: dict[str, Any]) -> None:
    one = found["lines"]
    assert one["tried"] >= LINES // 2
    assert one["failed"] == []
