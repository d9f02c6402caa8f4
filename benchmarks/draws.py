"""What `plan().explain()` says of the paper's own draws: E4 and E2 on squares, seed 0.

    python -m benchmarks.draws [--pairs 50] [--batch 16] [--json FILE]

The pairs are those that the experiments draw where every question is answered correctly, batched
as `experiments.batches.sweep_pairs` does, so that questions about one image share rows.  Models are
of the published shapes, on the `meta` device: these are counts, nothing runs.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.published import SETTINGS, Setting
from hooked_vlm import HookedVLM, LastToken, Patch, Sweep
from hooked_vlm.regions.pairs import CellPairs, swap_pairs
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.pairs import Question, final_token_pair, sample_tuples, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.squares import COLORS
from hooked_vlm.sweeps.plan import Explanation


EXPERIMENTS = {"E4": (swap_pair, 3), "E2": (final_token_pair, 5)}
NAMES = tuple(COLORS)
WORDS = tuple(AXIS_OF)


def batches(experiment: str, per_direction: int, size: int) -> Iterator[list[Any]]:
    """Yields the pairs of an experiment in its batches, each of one axis."""
    make, k = EXPERIMENTS[experiment]
    drawn = sample_tuples(NAMES, k, per_direction=per_direction)
    by_axis: dict[str, list[Any]] = {}
    for direction, tuples in drawn.items():
        by_axis.setdefault(AXIS_OF[direction], []).extend(make(direction, t) for t in tuples)
    for pairs in by_axis.values():
        pairs.sort(key=lambda pair: [question.entities for question in pair.questions])
        for i in range(0, len(pairs), size):
            yield pairs[i : i + size]


def prompts(setting: Setting, model: HookedVLM, asked: Sequence[Question]) -> dict[str, Tensor]:
    """Returns prompts in which pictures and words differ where those of the questions do."""
    made = setting.inputs(model, len(asked), 0)
    ids = made["input_ids"]
    ids[:] = ids[:1].clone()
    pixels = made["pixel_values"].view(len(asked), -1)
    for row, question in enumerate(asked):
        at = [NAMES.index(str(name)) for name in question.entities]
        pixels[row] = float(sum(place * len(NAMES) ** i for i, place in enumerate(at)))
        ids[row, setting.image_end + 2] = 100 + WORDS.index(question.direction)
        ids[row, setting.image_end + 4] = 200 + at[1]
    return made


def regions(axis: str, side: int) -> dict[str, CellPairs]:
    """Returns the strips and the objects that are exchanged along an axis."""
    shape, third, low = (side, side), side // 3, (side - 2) // 2
    if axis == "horizontal":
        ends = Region.column_band(shape, 0, third), Region.column_band(shape, side - third, side)
        first = Region.rectangle(shape, rows=(low, low + 2), cols=(1, 3))
        other = first.shifted(cols=side - 4)
    else:
        ends = Region.row_band(shape, 0, third), Region.row_band(shape, side - third, side)
        first = Region.rectangle(shape, rows=(1, 3), cols=(low, low + 2))
        other = first.shifted(rows=side - 4)
    return {"strip": swap_pairs(*ends), "object": swap_pairs(first, other)}


def planned(setting: Setting, experiment: str, pairs: int, size: int) -> list[Explanation]:
    """Returns the plan of each batch."""
    model = setting.build("meta", torch.bfloat16)
    slots, found = list(range(model.cfg.n_layers + 1)), []
    for batch in batches(experiment, pairs, size):
        clean, source = (
            prompts(setting, model, [getattr(pair, name) for pair in batch])
            for name in ("clean", "counterfactual")
        )
        where: dict[str, Any] = {"last token": LastToken()}
        if experiment == "E4":
            where = dict(regions(batch[0].clean.axis, setting.side))

        def make(kind: str, slot: int, source: Any = source, where: Any = where) -> Patch:
            return Patch(slot, at=where[kind], source=source)

        sweep = Sweep(clean, {"kind": list(where), "slot": slots}, make)
        found.append(sweep.plan(model).explain(logits_to_keep=1))
    return found


def totals(plans: Sequence[Explanation]) -> Mapping[str, float]:
    """Returns sums over batches, and the largest pass's bytes."""
    names = ("naive", "planned", "floor", "passes", "rows")
    sums = {name: sum(getattr(plan, name) for plan in plans) for name in names}
    cells = sum(plan.n_cells * plan.n_prompts for plan in plans)
    return {"pairs": sum(plan.n_prompts for plan in plans), "patches": cells, **sums} | {
        "peak": max(plan.peak for plan in plans)
    }


def row_of(model: str, experiment: str, found: Mapping[str, float]) -> str:
    """Returns a line of the table."""
    peta = " | ".join(f"{found[name] / 1e15:.2f}" for name in ("naive", "planned", "floor"))
    return (
        f"| {model} | {experiment} | {found['pairs']} | {found['patches']} | {peta} | "
        f"{found['naive'] / found['planned']:.1f} | {found['passes']} | {found['rows']} | "
        f"{found['peak'] / 1e9:.1f} |"
    )


def main(settings: Sequence[Setting] = tuple(SETTINGS.values())) -> None:
    """Prints one row for each model and experiment, and the first batch's plan."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--pairs", type=int, default=50, help="of each direction")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(
        "| model | experiment | pairs | patches | a pass each, PFLOP | planned | at least | ratio "
        "| passes | rows | largest pass, GB |\n|---|---|" + "---:|" * 9
    )
    rows, said = [], []
    for setting in settings:
        for experiment in EXPERIMENTS:
            plans = planned(setting, experiment, given.pairs, given.batch)
            rows.append({"model": setting.name, "experiment": experiment, **totals(plans)})
            print(row_of(setting.name, experiment, totals(plans)), flush=True)
            said.append(f"{setting.name}, {experiment}, first batch:\n{plans[0]}")
    print("", *said, sep="\n\n")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
