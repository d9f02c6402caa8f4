"""E6, object swap under ablation: does the language model compute an order? (paper, 5.3.2)

The vision encoder's order is removed first (E5's recipe).  Then the object cells of a run and
of its mirror image are exchanged, at one slot at a time.  At slot 0 such a swap moves tokens
without an order.  If it flips the answer at a later slot, the blocks before that slot wrote an
order into the objects' tokens: the second of the paper's mechanisms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import xarray as xr

from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.errors import CannotRunError, counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.answers import answers_of
from hooked_vlm.experiments.batches import numbers_only, sweep_pairs
from hooked_vlm.experiments.dual_mechanisms.failed_pairs import HALF, failing_pictures, peaks
from hooked_vlm.experiments.dual_mechanisms.order_removal import references, removed
from hooked_vlm.experiments.dual_mechanisms.strip_swap import (
    QUANTITIES,
    cleans,
    name_of,
    pictures_of,
    scored,
)
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions, strips_of
from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Cases, Result
from hooked_vlm.experiments.setting import Setting, of_config
from hooked_vlm.experiments.tables import (
    format_interval,
    format_names,
    format_slots,
    score_rows,
    select,
)
from hooked_vlm.experiments.verdicts import adjusted, claim_rows, judge, sentence
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.regions.pairs import CellPairs
from hooked_vlm.stimuli.pairs import Question, SwapPair, right_on_both, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.stimuli.settings import SETTINGS
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ABOUT = About(
    id="E6",
    name="swap-under-ablation",
    section="5.3.2, Fig. 9",
    title="Does the language model compute an order of its own?",
    claim=(
        "With vision's order removed, object swaps flip the answer in middle layers (about 11-20 "
        "of 28; v1 of the paper says 13-17): the language model's own, second mechanism."
    ),
)


CLAIM = "swapped, claim"
"""Quantity: the probability of the swapped answer, with intervals that a verdict may use."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """The common options; What'sUp cannot show one object alone."""

    settings_allowed = SETTINGS
    in_float32 = True


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Swaps regions at every slot under the removal, in pairs answered correctly under it."""
    setting = Setting(model, data, config.batch_size)
    accept = right_on_both(swap_pair, lambda questions: right_when_removed(setting, questions))
    try:
        pairs = setting.pairs_accepted(swap_pair, 3, config, accept)
    except CannotRunError:
        return _nothing_left(config)
    slots = list(range(model.cfg.n_layers + 1))
    regions = SwapRegions.of(setting.geometry, setting.axes)
    by_direction = sweep_pairs(
        setting,
        pairs,
        lambda direction, batch: _sweep(setting, batch, regions.pairs[AXIS_OF[direction]], slots),
        scored,
        QUANTITIES,
        on_progress,
        cells=len(slots) * len(regions.kinds),
    )
    by_direction = {
        d: values.assign_coords(pair=[name_of(pair) for pair in pairs[d]])
        for d, values in by_direction.items()
    }
    by_direction, left_out = numbers_only(by_direction)
    table = _table(by_direction, model.cfg.n_layers, config.seed)
    cases = cases_of(by_direction)
    return _result(
        table,
        "\n".join([_verdict(table, [d for d in setting.directions if d not in pairs]), *left_out]),
        {"pairs": {d: len(found) for d, found in pairs.items()}, "seed": config.seed},
        regions.notes,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        images=failing_pictures(setting, cleans(pairs), cases),
        cases=cases,
    )


run = of_config(run_on)


def right_when_removed(setting: Setting, questions: Sequence[Question]) -> list[bool]:
    """Returns whether each question is answered correctly with vision's order removed."""
    verdicts = dict.fromkeys(range(len(questions)), False)
    for axis in setting.axes:
        own = [i for i, question in enumerate(questions) if question.axis == axis]
        for batch in setting.batches(own):
            asked = [questions[i] for i in batch]
            found = references(setting, asked)
            with torch.no_grad():
                logits = setting.model.run_with_hooks(
                    found.inputs, removed(found), logits_to_keep=1
                )
            answers = answers_of(final_logits(logits), setting.model.tokenizer)
            for i, question, answer in zip(batch, asked, answers, strict=True):
                verdicts[i] = answer == normalise(question.target)
    return list(verdicts.values())


def cases_of(by_direction: Mapping[str, xr.DataArray]) -> Cases:
    """Returns how probable the swapped answer becomes in each pair by a swap of the objects.

    At slot 0 such a swap moves tokens without an order, so it is left out.
    """
    later = {
        d: values.sel(kind="object", quantity="swapped", slot=slice(1, None))
        for d, values in by_direction.items()
    }
    failed = "pairs whose answer a swap of the objects flips at no slot above 0"
    return peaks(later, "swapped", failed)


def _sweep(
    setting: Setting, pairs: list[SwapPair], regions: Mapping[str, CellPairs], slots: list[int]
) -> Sweep:
    clean = references(setting, [pair.clean for pair in pairs])
    mirrored = references(setting, [pair.counterfactual for pair in pairs])
    names = [slot_name(slot, setting.model.cfg.n_layers) for slot in slots]
    with torch.no_grad():
        _, cache = setting.model.run_with_cache(
            mirrored.inputs, names, fwd_hooks=removed(mirrored), logits_to_keep=1
        )
    source = Recording(mirrored.inputs, cache)
    return Sweep(
        clean.inputs,
        {"kind": list(regions), "slot": slots},
        make=lambda kind, slot: Patch(slot, at=regions[kind], source=source),
        base=removed(clean),
    )


def _table(by_direction: dict[str, xr.DataArray], n_layers: int, seed: int) -> pd.DataFrame:
    rows = []
    for direction, values in by_direction.items():
        if values.sizes["pair"] < 2:
            continue  # no interval over one pair
        rows += score_rows(values, seed, pictures_of(values), direction=direction)
        inside = values.sel(kind="object", quantity="swapped").transpose("pair", "slot")
        rows += claim_rows(
            inside.values,
            {"slot": values["slot"].values.tolist()},
            pictures_of(values),
            seed,
            null=HALF,
            low=0.0,
            high=1.0,
            direction=direction,
            kind="object",
            quantity=CLAIM,
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["site"] = [slot_name(slot, n_layers) for slot in table["slot"]]
        table = adjusted(table, table["quantity"] == CLAIM)
    return table


def _nothing_left(config: Config) -> Result:
    verdict = (
        "With vision's order removed the model answers no pair of a picture and its mirror image "
        "correctly, in any direction: it shows no order of its own that a swap could move."
    )
    return _result(pd.DataFrame(), verdict, {"pairs": {}, "seed": config.seed})


def _result(
    table: pd.DataFrame,
    verdict: str,
    config: dict,
    notes: tuple[str, ...] = (),
    **parts: Any,
) -> Result:
    return Result(
        **vars(ABOUT),
        **parts,
        table=table,
        verdict=verdict,
        config=config,
        notes=(
            "E5's removal is written at slot 0 of both runs, then the swap into the run on the "
            "clean picture (at slot 0 in this order). The source of the swap is the mirrored "
            "picture's run with its own removal. The paper does not specify the source; a swap "
            "from an intact run would restore vision's order.",
            "Pairs are drawn as in E4 and kept where both pictures are answered correctly *under "
            "the removal*: these pairs are answered by another mechanism.",
            "Strips and strips without their objects are controls. Intervals are 95 % bootstrap "
            "intervals over pairs, of which one and its mirror image count once; a direction with "
            "fewer than two pairs has no row.",
            f"The verdict calls an answer flipped at slots where the interval of '{CLAIM}' (for "
            f"bounded values, by picture) lies above {HALF}, with p-values adjusted by Holm over "
            "slots and directions. At slot 0 the swap moves tokens without an order, so a flip "
            "there means that the removal is not clean.",
            *notes,
        ),
    )


def _verdict(table: pd.DataFrame, missing: Sequence[str]) -> str:
    parts = []
    for direction in dict.fromkeys(table["direction"]) if len(table) else ():
        here = select(table, direction=direction)
        swapped = select(here, quantity="swapped")
        kinds = list(dict.fromkeys(swapped["kind"]))
        best = {k: select(swapped, kind=k).sort_values("value").iloc[-1] for k in kinds}
        first = select(swapped, kind="object", slot=0).iloc[0]
        own = best["object"]
        parts.append(
            f"{direction}: {_finding(select(here, quantity=CLAIM))} (highest probability "
            f"{format_interval(own)} at slot {own['slot']}, at slot 0 {format_interval(first)}); "
            f"strips {format_interval(best[strips_of(kinds)])}, strips without objects "
            f"{format_interval(best['background'])} ({counted(int(own['n']), 'pair')})."
        )
    if missing:
        parts.append(
            f"{format_names(missing)}: fewer than two pairs are answered correctly under the "
            "removal."
        )
    return "\n".join(map(sentence, parts)) or (
        "Too few pairs are answered correctly under the removal for an interval."
    )


def _finding(claims: pd.DataFrame) -> str:
    """Returns at which slots object swaps flip the answer, in words."""
    judged = {int(row["slot"]): judge(row, least=0.0) for _, row in claims.iterrows()}
    flips = [slot for slot, found in judged.items() if found.above]
    if 0 in flips:
        return (
            "undecided: object swaps flip the answer at slot 0 already, so the removal is not clean"
        )
    if flips:
        return f"object swaps flip the answer at {format_slots(flips)}"
    if all(found.below for found in judged.values()):
        return "object swaps do not flip the answer at any slot"
    return "undecided whether object swaps flip the answer"
