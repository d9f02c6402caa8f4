"""What the studies share: questions about three squares, and where figures go."""

import argparse
import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from hooked_vlm import HookedVLM
from hooked_vlm.analysis.scoring import accuracy
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for, sample_tuples
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.squares import COLORS, draw, prompt


DIRECTIONS = ("left", "right", "above", "below")


class Study:
    """A shipped model (or another one), the layout of its pictures, and a folder for the figure."""

    def __init__(self, doc: str | None) -> None:
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawTextHelpFormatter
        )
        parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
        parser.add_argument("--out", type=Path, default=Path("out/studies"))
        given = parser.parse_args()
        torch.set_grad_enabled(False)
        # Eager, because other attention has no scores and no pattern.
        self.model: Any = HookedVLM.from_pretrained(given.model, attn_implementation="eager")
        vision = self.model.require_vision()
        self.geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))
        self.out, self._started = given.out, time.perf_counter()
        self.name = Path(inspect.stack()[1].filename).stem

    def questions(self, n: int, directions: tuple[str, ...] = ("left",), seed: int = 42) -> list:
        """Returns n questions for each direction, about three squares of different colours."""
        drawn: Any = sample_tuples(list(COLORS), k=3, per_direction=n, seed=seed)
        return [Question(names, d) for d in directions for names in drawn[d]]

    def prepare(self, questions: list, noise: float = 0.0) -> Any:
        """Returns the model's inputs for questions, one picture each, some of it noise."""
        pictures = [draw(q.entities, q.axis, self.geometry) for q in questions]
        if noise:
            seeded = np.random.default_rng(0)
            drawn = [seeded.integers(0, 256, (*p.size, 3), np.uint8) for p in pictures]
            grounds = [Image.fromarray(pixels) for pixels in drawn]
            pictures = [Image.blend(p, g, noise) for p, g in zip(pictures, grounds, strict=True)]
        texts = [prompt(q) for q in questions]
        return self.model.prepare(pictures, texts, system=SYSTEM_PROMPT)

    def accuracy(self, logits: torch.Tensor, targets: list[str]) -> float:
        """Returns the share of prompts whose most probable next token is the target."""
        return float(accuracy(logits[:, -1], self.model.tokenizer, targets))

    def figure(self, columns: int = 1) -> tuple[Figure, Any]:
        """Returns a figure with so many axes side by side."""
        made = Figure(figsize=(4.5 * columns, 3.2), layout="constrained")
        return made, made.subplots(1, columns)

    def save(self, figure: Figure) -> None:
        """Writes the figure as `OUT/<name of the study>.png`, and says where."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}.png"
        figure.savefig(path, dpi=150)
        print(f"figure: {path} ({time.perf_counter() - self._started:.0f} s)")
