"""Files that are either the old or the new ones, whenever a process ends."""

import json
import os
from pathlib import Path
from typing import Any


def write(file: Path, text: str) -> None:
    """Replaces a file by a text at once."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with beside.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    beside.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Replaces a file by a value as JSON."""
    write(file, json.dumps(value, indent=1) + "\n")


def read_json(file: Path) -> Any:
    """Returns what a file holds, or None where there is no such file."""
    return json.loads(file.read_text()) if file.exists() else None
