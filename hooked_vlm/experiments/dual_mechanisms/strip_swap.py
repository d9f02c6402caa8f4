"""E4, strip swap and object swap: which tokens hold the order? (paper, 5.2.2, Figs. 5-7)

The tokens of two regions are exchanged with those of the run on the mirrored picture, at one
slot at a time.  If a region holds the order that determines the answer, the answer becomes
that of the mirrored picture.  The regions are the object cells alone, the whole strips, and
strips without their objects (a control for the size of the change).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.scoring import logit_difference, matches_answer
from hooked_vlm.experiments.batches import numbers_only, sweep_pairs
from hooked_vlm.experiments.dual_mechanisms.failed_pairs import HALF, failing_pictures, names_of
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions, strips_of
from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import About, Cases, Result
from hooked_vlm.experiments.setting import Setting, of_config
from hooked_vlm.experiments.tables import (
    format_interval,
    format_names,
    format_range,
    format_slots,
    highest_row,
    score_rows,
    select,
)
from hooked_vlm.experiments.verdicts import (
    Judgement,
    adjusted,
    claim_rows,
    judge,
    not_tested,
    sentence,
)
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.overlay import draw_regions
from hooked_vlm.regions.pairs import CellPairs
from hooked_vlm.stimuli.pairs import Question, SwapPair, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.sweeps.sweep import Sweep


ABOUT = About(
    id="E4",
    name="strip-swap",
    section="5.2.2, Figs. 5-7",
    title="Whose tokens flip the answer: the objects' or the strips'?",
    claim=(
        "Swapping whole strips flips the answer up to about layer 23-24 of Qwen2-VL-7B; swapping "
        "the object cells alone does not."
    ),
)
QUANTITIES = ("swapped", "clean", "agreement", "log odds")
"""Probability of the swapped answer (the paper's "IIA") and of the clean answer; whether the
top answer is the swapped one; log odds of the two."""
EARLY = "swapped, early slots"
"""Quantity: the mean over slots 0 to L/2 of a model with L layers.  The paper's curves (Figs. 5-7)
flip there and fall only in the last sixth of the layers, where the final token has the answer."""
APART = "strips - objects"
"""Their paired difference of the probability of a flipped answer in early slots, in words."""
AT_SLOT = "swapped, at an early slot"
HIGHEST = "swapped, highest"
"""Quantity: the same at each of these slots, for a kind that flips the answer at some alone."""


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Swaps each kind of region at every slot, in up to `config.pairs` pairs per direction."""
    setting = Setting(model, data, config.batch_size)
    regions = SwapRegions.of(setting.geometry, setting.axes)
    pairs = setting.pairs(swap_pair, 3, config)
    slots = list(range(model.cfg.n_layers + 1))
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
    cases = cases_of(by_direction, model.cfg.n_layers)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        images={**_pictures(setting, pairs), **failing_pictures(setting, cleans(pairs), cases)},
        cases=cases,
        verdict="\n".join([_verdict(table, setting.directions), *left_out]),
        config={"pairs": {d: len(found) for d, found in pairs.items()}, "seed": config.seed},
        notes=(
            "Activations are written into the run on the clean picture; the source is the run on "
            "the mirrored picture with the same prompt. Left and right are exchanged (top and "
            "bottom for above and below), so the middle is unchanged.",
            "'swapped' is the mean probability of the mirrored picture's answer, which the paper "
            "calls IIA; 'agreement' is the share of pairs with this top answer; 'log odds' are its "
            "log odds against the clean answer. 'strip, aligned' is computed where the published "
            "pairing of strips moves an object by a column.",
            "Intervals are 95 % bootstrap intervals over pairs; a pair and its mirror image are "
            "the same two pictures, and one observation. 'strip - object' is the paired "
            "difference in the swapped answer's probability; its p-values (column p_holm) are "
            "those of the bounded mean test over pairs, adjusted by Holm over the slots of a "
            "direction. 'swapped, highest' has intervals that hold at all slots together.",
            f"The verdict is about '{EARLY}', slots 0 to {model.cfg.n_layers // 2}, one number for "
            "each picture. An answer flips where the interval of this mean lies above "
            f"{HALF}; strips and objects differ where the interval of their paired difference "
            f"excludes zero and its p-value is at most 0.05 ('{APART}'). A kind that flips the "
            f"answer at some of these slots and not on average is named with them ('{AT_SLOT}'). "
            "P-values are adjusted by Holm over the directions and their sum, all (at single "
            "slots also over kinds and slots). These intervals are for bounded values "
            "(Gaffke), at any number of pictures.",
            *regions.notes,
        ),
    )


run = of_config(run_on)


def scored(
    setting: Setting, logits: Float[Tensor, "pair d_vocab"], pairs: Sequence[Any]
) -> Float[Tensor, "pair quantity"]:
    """Returns each pair's `QUANTITIES` from the final position's logits.

    A pair is a `SwapPair`, or another with a `clean_answer` and a `swapped_answer`.
    """
    swapped, clean = [p.swapped_answer for p in pairs], [p.clean_answer for p in pairs]
    both = setting.probabilities(logits, list(zip(swapped, clean, strict=True)))
    tokenizer = setting.model.tokenizer
    columns = [
        matches_answer(logits, tokenizer, swapped).to(both),
        logit_difference(logits, tokenizer, swapped, clean).to(both),
    ]
    return torch.cat([both, torch.stack(columns, dim=-1)], dim=-1)


def name_of(pair: SwapPair) -> str:
    """Returns a pair's direction and its clean picture's entities."""
    return f"{pair.clean.direction}: {', '.join(map(str, pair.clean.entities))}"


def _sweep(
    setting: Setting, pairs: list[SwapPair], regions: Mapping[str, CellPairs], slots: list[int]
) -> Sweep:
    source = setting.inputs([pair.counterfactual for pair in pairs])
    return Sweep(
        setting.inputs([pair.clean for pair in pairs]),
        {"kind": list(regions), "slot": slots},
        make=lambda kind, slot: Patch(slot, at=regions[kind], source=source),
    )


def _table(by_direction: dict[str, xr.DataArray], n_layers: int, seed: int) -> pd.DataFrame:
    rows = []
    together = xr.concat(list(by_direction.values()), dim="pair")
    for direction, values in {**by_direction, "all": together}.items():
        rows += score_rows(values, seed, pictures_of(values), direction=direction)
        rows += claims(values, n_layers, seed, direction=direction)
        swapped = values.sel(quantity="swapped").transpose("pair", "kind", "slot")
        kinds = [str(kind) for kind in values["kind"].values]
        strip, inside = (swapped.sel(kind=k).values for k in (strips_of(kinds), "object"))
        rows += claim_rows(
            strip - inside,
            {"slot": values["slot"].values.tolist()},
            pictures_of(values),
            seed,
            direction=direction,
            kind="strip - object",
            quantity="difference",
        )
    table = pd.DataFrame(rows)
    slots = table["slot"]
    table["site"] = [None if pd.isna(slot) else slot_name(int(slot), n_layers) for slot in slots]
    # A verdict has a sentence for each direction and one for all: they are one family.
    table = adjusted(table, table["quantity"] == EARLY, ["kind"])
    return adjusted(table, table["quantity"] == AT_SLOT)


def claims(values: xr.DataArray, n_layers: int, seed: int, **columns: str) -> list[dict]:
    """Returns the rows that a verdict is about: means over early slots, and highest slots."""
    swapped = values.sel(quantity="swapped").transpose("pair", "kind", "slot")
    kinds, units = [str(kind) for kind in values["kind"].values], pictures_of(values)
    early = swapped.sel(slot=slice(0, n_layers // 2)).mean("slot")
    rows = []
    for kind in kinds:
        about = {"kind": kind, "quantity": EARLY, **columns}
        own = early.sel(kind=kind).values
        rows += claim_rows(own, {}, units, seed, null=HALF, low=0.0, high=1.0, **about)
    difference = (early.sel(kind=strips_of(kinds)) - early.sel(kind="object")).values
    apart: dict[str, Any] = {"kind": "strip - object", "quantity": EARLY, **columns}
    rows += claim_rows(difference, {}, units, seed, **apart)
    each = swapped.sel(slot=slice(0, n_layers // 2), kind=[strips_of(kinds), "object"])
    axes = {name: each[name].values.tolist() for name in ("kind", "slot")}
    at_slot: dict[str, Any] = {"quantity": AT_SLOT, **columns}
    rows += claim_rows(each.values, axes, units, seed, null=HALF, low=0.0, high=1.0, **at_slot)
    for kind in kinds:
        about = {"kind": kind, "quantity": HIGHEST, **columns}
        slots = values["slot"].values.tolist()
        rows.append(highest_row(swapped.sel(kind=kind).values, slots, units, seed, **about))
    return rows


def pictures_of(values: xr.DataArray) -> list[str]:
    """Returns the picture of each pair: a layout and its mirror image are the same two pictures."""
    names = []
    for pair in values["pair"].values:
        direction, _, entities = str(pair).partition(": ")
        axis = AXIS_OF.get(direction, direction)
        names.append(f"{axis}: {', '.join(min(e := entities.split(', '), e[::-1]))}")
    return names


def cleans(pairs: Mapping[str, Sequence[SwapPair]]) -> dict[str, Question]:
    """Returns the clean question of each pair, by the name of the pair."""
    return {name_of(pair): pair.clean for found in pairs.values() for pair in found}


def cases_of(by_direction: Mapping[str, xr.DataArray], n_layers: int, kind: str = "") -> Cases:
    """Returns what each kind of region does in each pair: means over the early slots.

    A pair failed where `kind` (by default the strips) does not flip its answer.
    """
    found = []
    for values in by_direction.values():
        early = values.sel(quantity="swapped", slot=slice(0, n_layers // 2)).mean("slot")
        means = {str(one): early.sel(kind=one).values for one in values["kind"].values}
        flips = means[kind or strips_of(list(means))] > HALF
        found.append(pd.DataFrame({"case": names_of(values), **means, "ok": flips}))
    return Cases(
        failed=f"pairs whose answer {kind or 'strips'} do not flip ({EARLY})",
        table=pd.concat(found, ignore_index=True),
    )


def _pictures(setting: Setting, pairs: dict[str, list[SwapPair]]) -> dict:
    """Returns one clean picture of each axis with the swapped regions drawn over it."""
    pictures = {}
    for found in pairs.values():
        question = found[0].clean
        geometry, axis = setting.geometry, question.axis
        if f"{axis} regions" in pictures:
            continue
        grid = setting.inputs([question]).grid
        regions = [geometry.strip_region(axis, place) for place in (0, 2)]
        regions += [geometry.object_region(axis, place) for place in (0, 2)]
        pictures[f"{axis} regions"] = draw_regions(setting.picture(question), grid, regions)
    return pictures


def _verdict(table: pd.DataFrame, directions: Sequence[str]) -> str:
    tested = [d for d in directions if d in set(table["direction"])]
    apart = select(table, quantity=EARLY, kind="strip - object").set_index("direction")
    found: dict[str, list[str]] = {}
    for direction in tested:
        found.setdefault(finding(select(table, direction=direction)), []).append(direction)
    every = finding(select(table, direction="all"))
    parts = [f"all directions together: {every} ({APART} {format_interval(apart.loc['all'])})"]
    for said, where in found.items():
        size = format_range(apart.loc[where, "value"])
        parts.append(f"{format_names(where)}: {said} ({APART} {size})")
    return "\n".join(map(sentence, [*parts, *not_tested(directions, tested)]))


def finding(here: pd.DataFrame) -> str:
    """Returns in words what swaps of strips and of objects do in one direction, or in all."""
    strips = strips_of(list(select(here, quantity="swapped")["kind"]))
    early = {str(row["kind"]): row for _, row in select(here, quantity=EARLY).iterrows()}
    return _finding(early, strips, _slots_that_flip(here))


def _slots_that_flip(here: pd.DataFrame) -> dict[str, list[int]]:
    """Returns the early slots at which a kind flips the answer, for kinds that do at any."""
    found: dict[str, list[int]] = {}
    for _, row in select(here, quantity=AT_SLOT).iterrows():
        if judge(row, least=0.0).above:
            found.setdefault(str(row["kind"]), []).append(int(row["slot"]))
    return found


def _finding(early: Mapping[str, pd.Series], strips: str, at: Mapping[str, Sequence[int]]) -> str:
    """Returns what strips and objects do in early slots, in words.

    `at` are the slots at which a kind flips the answer: it may do so at some and not on average,
    and then it is not said that it does not.
    """
    strip, inside = judge(early[strips], least=0.0), judge(early["object"], least=0.0)
    apart = judge(early["strip - object"])
    more_at = _peaks({"strips": at.get(strips), "object cells alone": at.get("object")})
    more = _more(apart)
    if strip.above and inside.below and apart.above:
        if "object" in at:
            inside_at = format_slots(at["object"])
            return (
                f"strips flip the answer over the early slots; object cells alone do at {inside_at}"
            )
        return "strips flip the answer and object cells alone do not, as in the paper"
    if strip.above and inside.above:
        return f"object cells alone flip the answer too, unlike in the paper; {more}"
    if inside.above and strip.below:
        return "object cells alone flip the answer and strips do not, unlike in the paper"
    if strip.below and inside.below:
        said = "neither strips nor object cells flip the answer over the early slots"
        if more_at:
            return f"{said} on average; {more_at}"
        return f"{said}, unlike in the paper; {more}"
    unclear = {"strips": strip, "object cells": inside}
    names = [name for name, judged in unclear.items() if judged.outcome != "found"]
    return f"undecided whether {format_names(names)} flip the answer; {more}"


def _peaks(at: Mapping[str, Sequence[int] | None]) -> str:
    """Returns in words who flips the answer at which slots; those who do at the same are joined.

    >>> _peaks({"strips": [1], "objects": [1]}), _peaks({"strips": [0, 1], "objects": None})
    ('both do at slot 1', 'strips do at slots 0-1')
    """
    slots = {who: format_slots(found) for who, found in at.items() if found}
    if len(slots) == 2 and len(set(slots.values())) == 1:
        return f"both do at {next(iter(slots.values()))}"
    return format_names([f"{who} do at {where}" for who, where in slots.items()])


def _more(apart: Judgement) -> str:
    """Returns which of the two flips more answers, in words."""
    if apart.outcome == "undecided":
        return "undecided which flip more"
    if apart.outcome == "not found":
        return "no difference between the two"
    return "strips flip more than objects" if apart.above else "objects flip more than strips"
