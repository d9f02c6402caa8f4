"""The fewest operations that exact sweeps take, and what two hook loops take: counted, not run.

    python -m benchmarks.floors [--json FILE]

A *floor* counts each image once, one clean and one source run, and each cell from the first block
and the first position that it changes.  The *careful loop* encodes each image once and runs the
language model once for each cell and for the source, with logits of the last position alone; the
*usual loop* is `model(**inputs)` for each cell and the source.  A loop's operations divided by the
floor's are the largest ratio of times that any exact method can reach against it at equal rates.

*Two questions* counts a row `[image | question 1 | question 2]` for each cell: a question sees the
image and itself.  The careful loop then has the image once as well; counts are for one question.

Operations are those of `hooked_vlm.sweeps.plan.Costs`: linear maps, attention and the vocabulary.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import built
from benchmarks.common.published import SETTINGS, Setting
from benchmarks.throughput.timed import FIRST, LENGTH, SIDE, SIZES
from hooked_vlm import HookedVLM
from hooked_vlm.sweeps.plan import Costs, costs_of


SWEEPS = ("strip", "object", "final_token", "alpha", "head")
STRENGTHS = 16
"""Cells of a sweep over strengths; the one of strength 0 is the clean run."""
PAPER = (("strip", "object"), ("final_token",))
"""E4 and E2: sweeps in one group are of the same pairs of prompts and share their runs."""
BENCHMARK = (("final_token", "strip", "object", "strip, ablated", "object, ablated", "alpha"),)
"""What `benchmarks.throughput.battery` runs on each pair."""


@dataclass(frozen=True)
class Prompt:
    """Where things are in a prompt with one image."""

    length: int
    image: int
    """Position of the image's first token."""
    image_end: int
    strip: int
    """First position that a swap of strips changes."""
    object: int
    """The same of a swap of objects; in a bidirectional image all tokens change with the first."""
    ablated: int
    """First position of the image's middle."""

    @classmethod
    def of(cls, length: int, image: int, side: int, bidirectional: bool) -> "Prompt":
        """Returns the prompt for the regions that `benchmarks.throughput.tasks` swaps."""
        first = 0 if bidirectional else ((side - 2) // 2) * side + 1
        middle = 0 if bidirectional else side // 3
        end = image + side * side
        return cls(length, image, end, image, image + first, image + middle)


@dataclass(frozen=True)
class Counted:
    """Operations of a sweep on one pair of prompts, for one question."""

    floor: float
    careful: float
    usual: float

    @property
    def over(self) -> tuple[float, float]:
        """The careful and the usual loop's operations, divided by the floor."""
        return self.careful / self.floor, self.usual / self.floor


@dataclass(frozen=True)
class Arithmetic:
    """Counts sweeps of a model on prompts of one kind; `costs.vision` is of one image."""

    costs: Costs
    prompt: Prompt
    n_heads: int

    def sweeps(self, groups: Sequence[Sequence[str]], questions: int = 1) -> Counted:
        """Returns what groups of sweeps take; those of a group share images and runs."""
        found = [self._group(names, questions) for names in groups]
        return Counted(*(sum(each) for each in zip(*found, strict=True)))

    def _group(self, names: Sequence[str], questions: int) -> tuple[float, float, float]:
        costs, prompt = self.costs, self.prompt
        cells = [cell for name in names for cell in self.cells(name)]
        changed = [cell for cell in cells if cell is not None]
        has_source = any(name != "alpha" for name in names)
        floor = costs.vision * (1 + has_source) + self.row(0, 0, questions)
        floor += has_source * self.row(0, 0, questions, whole=True)
        if any("ablated" in name for name in names):  # the clean run of the ablated image
            floor += self.row(0, prompt.ablated, questions)
        floor += sum(self.row(stage, first, questions) for stage, first in changed)
        one_pass = self.row(0, 0, whole=True)
        careful = costs.vision * (1 + has_source) / questions
        careful += (len(cells) + has_source) * one_pass
        all_logits = costs.vision + one_pass + (prompt.length - 1) * costs.head
        return floor / questions, careful, (len(cells) + has_source) * all_logits

    def cells(self, name: str) -> list[tuple[int, int] | None]:
        """Returns the first block and the first position that each cell of a sweep changes.

        None is a cell that changes nothing.
        """
        prompt, n_layers = self.prompt, self.costs.n_layers
        slots = range(n_layers + 1)
        if name == "alpha":
            return [None, *[(0, prompt.image)] * (STRENGTHS - 1)]
        if name == "head":
            return [(layer, prompt.length - 1) for layer in range(n_layers)] * self.n_heads
        starts = {
            "strip": prompt.strip,
            "object": prompt.object,
            "final_token": prompt.length - 1,
            "strip, ablated": prompt.strip,
            "object, ablated": prompt.object,
        }
        return [(slot, starts[name]) for slot in slots]

    def row(self, stage: int, first: int, questions: int = 1, whole: bool = False) -> float:
        """Returns what a row from a block and a position on costs, with its last logits.

        With `whole` the last block runs on all positions.  With one question the count is that
        of `Costs.rows`, where every position sees all others.  With more, positions of the image
        see those up to its end.
        """
        costs, prompt = self.costs, self.prompt
        text_from = prompt.image_end if questions > 1 else 0
        shared = max(0, text_from - first)
        own = questions * (prompt.length - max(first, text_from))
        seen = shared * text_from + own * prompt.length
        n_blocks = max(0, costs.n_layers - stage)
        total = n_blocks * ((shared + own) * costs.block + seen * costs.attention)
        if n_blocks and not whole:
            total -= (shared + own - questions) * costs.trimmed
        return total + questions * costs.head


def published(name: str) -> Arithmetic:
    """Returns the arithmetic of a published model on a prompt of the paper's length."""
    return of_setting(SETTINGS[name])


@cache
def of_setting(setting: Setting) -> Arithmetic:
    """Returns the arithmetic of a model and a prompt of some shapes."""
    model = setting.build("meta", torch.bfloat16)
    prompt = Prompt.of(
        setting.length, setting.first_image, setting.side, setting.family == "gemma-3"
    )
    return _arithmetic(model, setting.inputs(model, 1, 0), prompt)


@cache
def timed(size: str, family: str = "llava") -> Arithmetic:
    """Returns the arithmetic of a random model that `benchmarks.throughput` times."""
    layers, width = SIZES[size]
    model_class, config = built.FAMILIES[family](layers, 6, width, 32000, 2 * SIDE)
    with torch.device("meta"):
        model = HookedVLM(model_class(config), name=size)
    inputs = built.make_inputs(family, 1, side=2 * SIDE, length=LENGTH)
    return _arithmetic(model, inputs, Prompt.of(LENGTH, FIRST - 1, SIDE, family == "gemma-3"))


def _arithmetic(model: HookedVLM, inputs: Mapping[str, Tensor], prompt: Prompt) -> Arithmetic:
    return Arithmetic(costs_of(model, inputs), prompt, model.cfg.n_heads)


def counted(name: str, arithmetic: Arithmetic) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table for one model."""
    wanted: dict[str, tuple[tuple[str, ...], ...]] = {sweep: ((sweep,),) for sweep in SWEEPS}
    is_published = name in SETTINGS
    wanted["battery"] = PAPER if is_published else BENCHMARK
    for sweep, groups in wanted.items():
        one, two = (arithmetic.sweeps(groups, questions) for questions in (1, 2))
        yield {"model": name, "sweep": sweep, "one": asdict(one), "two": asdict(two)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the counts as Markdown."""
    lines = [
        "| model | sweep | floor, TFLOP | careful ÷ floor | usual ÷ floor "
        "| two questions: floor | careful ÷ floor | usual ÷ floor |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = []
        for found in (Counted(**row["one"]), Counted(**row["two"])):
            careful, usual = found.over
            cells += [f"{found.floor / 1e12:.3g}", f"{careful:.2f}", f"{usual:.2f}"]
        lines.append(f"| {row['model']} | {row['sweep']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def all_rows() -> list[dict[str, Any]]:
    """Returns the counts of the published models and of the random ones that are timed."""
    found = []
    for name in SETTINGS:
        found += counted(name, published(name))
    for size in ("12x512", "24x1024"):
        found += counted(size, timed(size))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floors", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = all_rows()
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
