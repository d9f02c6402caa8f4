"""What a part is given: where it runs, how long it may take, and where its rows go."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.files import write_json


@dataclass
class Given:
    """The settings of one part, and its rows; a row is in the file as soon as it is noted."""

    file: Path
    device: str = "cuda"
    tiny: bool = False
    limit: float = 60.0
    questions: int = 1
    """Prompts about each image."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.limit - (time.monotonic() - self.began)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def note(
        self,
        what: str,
        value: float | str | None,
        *,
        correct: bool | None = None,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> None:
        """Adds a row: what was measured, and what it should be where that is known only now."""
        row = {"what": what, "value": value, "correct": correct, "note": note}
        row |= {"least": least, "most": most}
        kept = {name: x for name, x in row.items() if name == "value" or x not in (None, "")}
        self.rows.append(kept)
        self.write(finished=False)

    def write(self, *, finished: bool) -> None:
        """Writes the rows so far."""
        write_json(self.file, {"finished": finished, "rows": self.rows})
