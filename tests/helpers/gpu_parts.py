"""Parts of `benchmarks.gpu` that do what a part may do wrong."""

import signal
import time
from typing import Any


def counts(given: Any) -> None:
    """Predicts two things: one that `works` measures, and one that nobody does."""
    given.rows.append({"part": "works", "what": "speed", "value": 2.0, "least": 3.0})
    given.rows.append({"part": "works", "what": "lost", "value": 5.0})


def works(given: Any) -> None:
    """Notes a correct row, whether predictions are there, and that it was called."""
    folder = given.file.parent
    with (folder / "calls").open("a") as calls:
        calls.write("called\n")
    given.note("speed", 4.0)
    given.note("predictions are there", str((folder / "predictions.json").exists()), correct=True)


def hangs(given: Any) -> None:
    """Notes a row and then neither ends nor listens."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    given.note("before it hung", 1.0)
    time.sleep(600)


def wrong(given: Any) -> None:
    """Notes one row that is correct and one that is not."""
    given.note("sum", 2.0, correct=True)
    given.note("product", 5.0, correct=False)


def crashes(given: Any) -> None:
    """Raises after a correct row."""
    given.note("first", 1.0, correct=True)
    raise RuntimeError("the card is lost")
