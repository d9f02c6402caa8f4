"""How far the first-order estimate of a sweep is from the exact one, and how long each takes.

    python -m benchmarks.attribution [--model tiny-qwen2-vl] [--json FILE] [--plot FILE]

Strips and object cells swapped (E4), final tokens interchanged (E2), and every image token
patched by itself, at every slot, on pairs that the model answers rightly.  `--fractions
0.01,0.3` makes only a part of each edit, to see where the first order ends.

Two metrics: the log odds of the swapped answer against the clean one, and its probability,
which is near 0 in the clean run, where it has no slope.  Effects are scores less the clean
score; intervals are over pairs.  `--plot` writes a figure for each metric, its name before
the ending.  Nothing is asserted: times are this machine's.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from benchmarks.common.machine import machine
from hooked_vlm import HookedVLM, LastToken, Patch, Sweep, final_logits
from hooked_vlm.analysis.scoring import logit_difference, target_probability
from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions
from hooked_vlm.experiments.options import Config
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import interval_rows
from hooked_vlm.regions.region import Region
from hooked_vlm.report.charts import curves
from hooked_vlm.report.look import SLOTS, Look, to_png
from hooked_vlm.stimuli.pairs import final_token_pair, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.sweeps.attribution_error import EstimateError, agreement_table, attribution_error


MODELS = ("tiny-qwen2-vl", "tiny-gemma-3")
SWEEPS = ("strip swap", "object swap", "final token", "single image tokens")
METRICS = ("log odds", "probability")
LOOKS = {
    "exact": Look("exact sweep", "#0072B2", "o"),
    "estimate": Look("first-order estimate", "#D55E00", "s", (0, (4, 2))),
}


@dataclass(frozen=True, eq=False)
class Measured:
    """One sweep, both ways, over all its pairs."""

    estimate: xr.DataArray
    exact: xr.DataArray
    clean: xr.DataArray
    seconds: tuple[float, float]
    """Of the estimate and of the exact sweep, source runs included."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of what an intervention does: the same step, shortened."""

    whole: Any
    fraction: float

    def check(self, model: Any, inputs: Any) -> None:
        """Raises what is wrong with the whole."""
        self.whole.check(model, inputs)

    def hooks_for(self, model: Any, inputs: Any) -> list:
        """Returns hooks that go so far towards what the whole would write."""

        def shortened(edit: Callable[..., Any]) -> Callable[..., Any]:
            return lambda here, hook: here + self.fraction * (edit(here, hook=hook) - here)

        return [(name, shortened(edit)) for name, edit in self.whole.hooks_for(model, inputs)]


def shortened(model: Any, sweep: Sweep, fraction: float) -> Sweep:
    """Returns a sweep that makes only a part of each edit, its sources recorded."""
    if fraction == 1:
        return sweep
    made = {cell.coords: cell.own for cell in sweep.recorded(model)}
    names = list(sweep.axes)
    return Sweep(
        sweep.inputs,
        sweep.axes,
        lambda **at: [Part(one, fraction) for one in made[tuple(at[name] for name in names)]],
    )


def sweeps_of(setting: Setting, name: str, config: Config) -> Iterator[tuple[Sweep, list[Any]]]:
    """Yields a sweep for each batch of pairs, with the pairs."""
    slots = list(range(setting.model.cfg.n_layers + 1))
    last = name == "final token"
    regions = SwapRegions.of(setting.geometry, setting.axes)
    found = setting.pairs(final_token_pair if last else swap_pair, 5 if last else 3, config)
    for direction, pairs in found.items():
        for batch in setting.batches(pairs):
            source = setting.inputs([pair.counterfactual for pair in batch])
            inputs = setting.inputs([pair.clean for pair in batch])
            if name == "single image tokens":
                yield single_tokens(inputs, source, slots), batch
                continue
            kind = name.removesuffix(" swap")
            at = LastToken() if last else regions.pairs[AXIS_OF[direction]][kind]
            yield swaps(inputs, source, slots, at), batch


def swaps(inputs: Any, source: Any, slots: Sequence[int], at: Any) -> Sweep:
    """Returns the sweep that writes one place at every slot."""
    return Sweep(inputs, {"slot": slots}, lambda slot: Patch(slot, at=at, source=source))


def single_tokens(inputs: Any, source: Any, slots: Sequence[int]) -> Sweep:
    """Returns the sweep that writes one cell of the image at every slot."""
    shape = inputs.grids[0][0].shape  # all pictures of a setting have one size
    cells = Region.everything(shape).cells
    return Sweep(
        inputs,
        {"slot": slots, "cell": range(len(cells))},
        lambda slot, cell: Patch(slot, at=Region(shape, (cells[cell],)), source=source),
    )


def metric_of(setting: Setting, pairs: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Returns both metrics of a batch of pairs, `[pair, metric]`."""
    tokenizer = setting.model.tokenizer
    wanted = [getattr(p, "swapped_answer", None) or p.attribute_answer for p in pairs]
    clean = [pair.clean_answer for pair in pairs]

    def metric(logits: Tensor) -> Tensor:
        final = final_logits(logits)
        odds = logit_difference(final, tokenizer, wanted, clean)
        return torch.stack([odds, target_probability(final, tokenizer, wanted)], dim=-1)

    return metric


def measured(setting: Setting, name: str, config: Config, fraction: float = 1.0) -> Measured:
    """Returns one sweep's estimate and exact scores over all batches, and their times."""
    parts: list[list[xr.DataArray]] = [[], [], []]
    seconds = [0.0, 0.0]
    how: dict[str, Any] = {"dims": ("pair", "metric"), "coords": {"metric": METRICS}}
    for i, (sweep, pairs) in enumerate(sweeps_of(setting, name, config)):
        metric = metric_of(setting, pairs)
        sweep = shortened(setting.model, sweep, fraction)
        for turn in range(2 if i == 0 else 1):  # the first batch warms up
            start = time.perf_counter()
            estimate = sweep.attribution(setting.model, metric, logits_to_keep=1, **how)
            middle = time.perf_counter()
            with warnings.catch_warnings():
                # A part of an edit is no patch that rows carry; the slower engine is as exact.
                warnings.filterwarnings("ignore", ".*A slower engine runs", HookedVLMWarning)
                exact = sweep.run(setting.model, metric, logits_to_keep=1, **how)
            end = time.perf_counter()
            if turn or i:
                seconds[0] += middle - start
                seconds[1] += end - middle
        with torch.no_grad():
            clean = metric(setting.model(sweep.inputs, logits_to_keep=1)).cpu().numpy()
        named = xr.DataArray(clean, dims=("pair", "metric"), coords={"metric": list(METRICS)})
        for part, found in zip(parts, (estimate, exact, named), strict=True):
            part.append(found)
    joined = [xr.concat(part, dim="pair") for part in parts]
    return Measured(joined[0], joined[1], joined[2], (seconds[0], seconds[1]))


def compared(found: Measured, metric: str) -> tuple[EstimateError, pd.DataFrame, pd.DataFrame]:
    """Returns the agreement over all slots, by slot, and the mean effects by slot."""
    estimate = found.estimate.sel(metric=metric)
    exact, clean = found.exact.sel(metric=metric), found.clean.sel(metric=metric)
    rows = []
    for line, values in (("exact", exact - clean), ("estimate", estimate - clean)):
        others = [dim for dim in values.dims if dim not in ("slot", "pair")]
        means = values.mean(others).transpose("pair", "slot")
        slots = {"slot": [int(slot) for slot in means["slot"]]}
        rows += interval_rows(bootstrap(means.values), slots, line=line)
    return (
        attribution_error(estimate, exact, clean, prompt="pair"),
        agreement_table(estimate, exact, clean, ["slot"], prompt="pair"),
        pd.DataFrame(rows),
    )


SUMMARY = (
    "| model | sweep | metric | mean effect | mean error | Pearson | Spearman | equal signs "
    "| estimate s | exact s |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|"
)


def summary_row(model: str, name: str, metric: str, found: Measured, over: EstimateError) -> str:
    """Returns a line of the table over all slots."""
    shown = [over.size, over.error, over.pearson, over.spearman, over.sign]
    numbers = [f"{i.estimate:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in shown]
    times = [f"{seconds:.2f}" for seconds in found.seconds]
    return f"| {' | '.join([model, name, metric, *numbers, *times])} |"


def slot_lines(by_slot: pd.DataFrame) -> list[str]:
    """Returns the table by slot: how large effects are, how wrong, how well they correlate."""
    wide = by_slot.pivot(index="quantity", columns="slot", values="value")
    lines = []
    for quantity in ("size", "error", "pearson", "sign"):
        cells = ["–" if v != v else f"{v:.2f}" for v in wide.loc[quantity].to_numpy(float)]
        lines.append(f"{quantity} | {' | '.join(cells)}")
    return lines


def main() -> None:
    """Prints the tables, and writes everything as JSON and figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", action="append", help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--sweeps", default=",".join(SWEEPS))
    parser.add_argument("--pairs", type=int, default=20, help="per direction")
    parser.add_argument("--token-pairs", type=int, default=4, help="for single image tokens")
    parser.add_argument("--setting", default="squares")
    parser.add_argument("--fractions", default="1", help="of each edit; 1 is all of it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    summary, slots, rows, effects = [SUMMARY], [], [], []
    for title in given.model or MODELS:
        model = HookedVLM.from_pretrained(title)
        for name, part in product(given.sweeps.split(","), given.fractions.split(",")):
            pairs = given.token_pairs if name == SWEEPS[-1] else given.pairs
            config = Config(pairs=pairs, setting=given.setting)
            found = measured(Setting.of(model, config), name, config, float(part))
            name = name if float(part) == 1 else f"{name}, {part} of the edit"
            for metric in METRICS:
                over, by_slot, means = compared(found, metric)
                where = {"model": title, "sweep": name, "metric": metric}
                summary.append(summary_row(title, name, metric, found, over))
                slots += [f"| {title} | {name} | {metric} | {row} |" for row in slot_lines(by_slot)]
                rows += by_slot.assign(**where).to_dict("records")
                effects += means.assign(**where, panel=f"{title}, {name}").to_dict("records")
                print(summary[-1], flush=True)
    by_slot = pd.DataFrame(rows)
    n = by_slot["slot"].nunique()
    head = f"| model | sweep | metric | quantity | {' | '.join(f'slot {i}' for i in range(n))} |"
    print("\n".join(["", *summary, "", head, f"|---|---|---|---|{'---:|' * n}", *slots]))
    print(json.dumps(machine()))
    if given.json:
        tables = {"agreement": rows, "effects": effects, "summary": summary, "slots": slots}
        given.json.write_text(json.dumps({"machine": machine(), **tables}, indent=1))
    for metric in METRICS if given.plot else ():
        table = pd.DataFrame([row for row in effects if row["metric"] == metric])
        path = given.plot.with_stem(f"{given.plot.stem}-{metric.replace(' ', '-')}")
        path.write_bytes(to_png(figure(table, metric), dpi=110))


def figure(effects: pd.DataFrame, metric: str) -> Any:
    """Draws mean effects by slot, exact and estimated, a panel for each model and sweep.

    Single tokens are left out, whose mean effect is near 0 beside the others'.
    """
    large = effects[effects["sweep"] != SWEEPS[-1]]
    effects = effects if large.empty else large
    return curves(
        effects,
        x="slot",
        line="line",
        panel="panel",
        x_label=SLOTS,
        y_label=f"mean effect on the {metric} of the swapped answer",
        looks=LOOKS,
        limits=None,
        columns=effects["sweep"].nunique(),
    )


if __name__ == "__main__":
    main()
