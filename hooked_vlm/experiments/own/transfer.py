"""E2 and E4 on own data: what is transferred from the run on the counterfactual picture?

The residual stream at one slot and one place is replaced by that of the run on the counterfactual
with the same question: at the final token (E2), or at the cells of boxes and at all others (E4).
If the place determines the answer, the answer becomes the counterfactual's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

from hooked_vlm.errors import counted
from hooked_vlm.experiments.batches import OBSERVATION, numbers_only, sweep_pairs
from hooked_vlm.experiments.dual_mechanisms import final_token, strip_swap
from hooked_vlm.experiments.dual_mechanisms.failed_pairs import CASE, failing_pictures
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.own.setting import (
    ANYWHERE,
    AS_MANY,
    OTHERS,
    SHARED,
    OwnPair,
    OwnSetting,
    control_of,
    observations,
)
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.tables import (
    format_interval,
    format_slots,
    highest_row,
    score_rows,
    select,
)
from hooked_vlm.experiments.verdicts import adjusted, claim_rows, judge, not_tested, sentence
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.sweeps.sweep import Sweep


EARLY = strip_swap.EARLY
OVER = "swapped over clean"
"""Quantity: the probability of the counterfactual's answer minus that of the clean one."""
FINAL = "final token"
Places = Callable[[Sequence[OwnPair], Any], Mapping[str, Any]]
"""(pairs, clean inputs) -> the place of each kind, or a list with one for each pair."""


def run_final_token(setting: OwnSetting, config: Config, on_progress: OnProgress) -> Result:
    """E2: patches the final token at every slot from the run on the counterfactual."""
    by_direction, left_out = _swept(
        setting, config, [FINAL], lambda _, __: {FINAL: LastToken()}, on_progress
    )
    table = _table(by_direction, setting.model.cfg.n_layers, config.seed, [FINAL])
    return Result(
        **vars(final_token.ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        verdict="\n".join([_stages(table), *_not_tested(setting, by_direction), *left_out]),
        config=_counts(by_direction),
        notes=(
            "Own data: the counterfactual picture with the same question is the source, so a slot "
            "keeps the clean answer or transfers the counterfactual's. The paper's third answer, "
            "of the ordering alone, needs the opposite question and is not asked.",
            *_NOTES,
        ),
    )


def run_regions(setting: OwnSetting, config: Config, on_progress: OnProgress) -> Result:
    """E4: patches the cells of boxes, and all others, at every slot."""

    def places(pairs: Sequence[OwnPair], inputs: Any) -> Mapping[str, Any]:
        items = [pair.clean for pair in pairs]
        return setting.regions(items, setting.grids(inputs), config.seed)

    setting.check_regions()
    kinds = setting.region_kinds
    by_direction, left_out = _swept(setting, config, kinds, places, on_progress)
    n_layers = setting.model.cfg.n_layers
    table = _table(by_direction, n_layers, config.seed, setting.stated, setting.compared)
    cases = strip_swap.cases_of(by_direction, n_layers, ANYWHERE)
    asked = {item.name: item for item in setting.data.items}
    return Result(
        **vars(strip_swap.ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        images={
            "boxes": setting.first_with_boxes(),
            **failing_pictures(setting, asked, cases),
        },
        cases=cases,
        verdict="\n".join(
            [
                _flips(table, setting.stated, setting.compared),
                *_not_tested(setting, by_direction),
                *left_out,
            ]
        ),
        config=_counts(by_direction),
        notes=(
            "Own data: each cell is written from the same cell of the counterfactual picture. The "
            f"regions are the boxes and masks of the table ('{ANYWHERE}': together; 'box NAME': "
            f"each that all rows have), '{OTHERS}', and '{AS_MANY}': a random choice of as many "
            "outside the boxes, one for all boxes and one for each single box. There are no "
            "strips: own pictures have no geometry that says where they are.",
            f"The verdict is about '{EARLY}', slots 0 to {n_layers // 2}: an answer flips where "
            "the interval of its mean lies above 0.5; boxes, and a box, differ from as many other "
            "cells where the interval of the paired difference excludes zero. P-values are "
            "adjusted by Holm.",
            *_NOTES,
        ),
    )


_NOTES = (
    "'swapped' is the mean probability of the counterfactual's answer, 'clean' that of the "
    "picture's own, 'agreement' the share of pairs with the counterfactual's as top answer, 'log "
    "odds' its log odds against the clean one. Pairs count only if the model answers both pictures "
    "correctly. Pairs that share a picture, directly or through others, are one observation, the "
    "mean of their scores: a pair, its reverse and other questions about the two count once. "
    "Intervals are over observations (n): of curves 95 % bootstrap intervals, of claims those of "
    "bounded means.",
)


def _swept(
    setting: OwnSetting,
    config: Config,
    kinds: Sequence[str],
    places: Places,
    on_progress: OnProgress,
) -> tuple[dict[str, xr.DataArray], list[str]]:
    """Returns the scores `[pair, kind, slot, quantity]` of each direction.

    Coordinate pair has the pictures, `OBSERVATION` what counts once, and `CASE` the question.
    """
    pairs = setting.own_pairs(config)
    slots = list(range(setting.model.cfg.n_layers + 1))

    def sweep_of(_: str, batch: list[OwnPair]) -> Sweep:
        inputs = setting.inputs([pair.clean for pair in batch])
        source = setting.inputs([pair.counterfactual for pair in batch])
        at = places(batch, inputs)
        return Sweep(
            inputs,
            {"kind": list(kinds), "slot": slots},
            make=lambda kind, slot: Patch(slot, at=at[kind], source=source),
        )

    found = sweep_pairs(
        setting,
        pairs,
        sweep_of,
        strip_swap.scored,
        strip_swap.QUANTITIES,
        on_progress,
        cells=len(slots) * len(kinds),
    )
    every = [pair for own in pairs.values() for pair in own]
    units = dict(zip([pair.pictures for pair in every], observations(every), strict=True))
    named = {}
    for d, values in found.items():
        pictures = [pair.pictures for pair in pairs[d]]
        observed = [units[one] for one in pictures]
        cases = [pair.clean.name for pair in pairs[d]]
        more = {OBSERVATION: ("pair", observed), CASE: ("pair", cases)}
        named[d] = values.assign_coords({"pair": pictures, **more})
    return numbers_only(named)


def _units(values: xr.DataArray) -> list[str]:
    return [str(one) for one in values[OBSERVATION].values]


def _counts(by_direction: Mapping[str, xr.DataArray]) -> dict[str, Any]:
    return {
        "pairs": {d: v.sizes["pair"] for d, v in by_direction.items()},
        "observations": {d: len({*_units(v)}) for d, v in by_direction.items()},
    }


def _not_tested(setting: OwnSetting, by_direction: Mapping[str, xr.DataArray]) -> list[str]:
    return not_tested(setting.directions, [*by_direction], why=SHARED)


def _table(
    by_direction: Mapping[str, xr.DataArray],
    n_layers: int,
    seed: int,
    stated: Sequence[str],
    compared: Sequence[str] = (),
) -> pd.DataFrame:
    together = xr.concat(list(by_direction.values()), dim="pair")
    groups = dict(by_direction) if len(by_direction) > 1 else {}
    rows = []
    for direction, values in {**groups, "all": together}.items():
        rows += score_rows(values, seed, _units(values), direction=direction)
        rows += _claims(values, n_layers, seed, direction, stated, compared)
    table = pd.DataFrame(rows)
    slots = table["slot"]
    table["site"] = [None if pd.isna(slot) else slot_name(int(slot), n_layers) for slot in slots]
    return adjusted(table, table["quantity"] == EARLY)


def _claims(
    values: xr.DataArray,
    n_layers: int,
    seed: int,
    direction: str,
    stated: Sequence[str],
    compared: Sequence[str],
) -> list[dict]:
    """Returns the rows that a verdict is about: over early slots, of each slot, and the highest.

    `stated` are the kinds whose means it names, `compared` those that it compares with controls.
    """
    values = values.transpose("pair", "kind", "slot", "quantity")
    units, slots = _units(values), values["slot"].values.tolist()
    about: dict[str, Any] = {"direction": direction}
    own = values.sel(kind=list(stated))
    over = own.sel(quantity="swapped") - own.sel(quantity="clean")
    axes = {"kind": list(stated), "slot": slots}
    rows = claim_rows(over.values, axes, units, seed, quantity=OVER, **about)
    swapped = values.sel(quantity="swapped")
    for kind in stated:
        more = {"kind": kind, "quantity": strip_swap.HIGHEST, **about}
        rows.append(highest_row(swapped.sel(kind=kind).values, slots, units, seed, **more))
    early = swapped.sel(slot=slice(0, n_layers // 2)).mean("slot")
    about["quantity"] = EARLY
    half: dict[str, Any] = {"null": 0.5, "low": 0.0, "high": 1.0}
    means = early.sel(kind=list(stated)).values
    rows += claim_rows(means, {"kind": list(stated)}, units, seed, **half, **about)
    against = [(kind, control_of(kind)) for kind in compared]
    for kind, other in [(ANYWHERE, OTHERS), *against] if compared else []:
        apart = (early.sel(kind=kind) - early.sel(kind=other)).values
        rows += claim_rows(apart, {}, units, seed, kind=f"{kind} - {other}", **about)
    return rows


def _stages(table: pd.DataFrame) -> str:
    """Returns in words which slots keep the clean answer and which transfer the other."""
    every = select(table, direction="all", quantity=OVER)
    stages: dict[str, list[int]] = {}
    for _, row in every.iterrows():
        judged = judge(row)
        stage = "attribute" if judged.above else "clean" if judged.below else "undecided"
        stages.setdefault(stage, []).append(int(row["slot"]))
    names = {"clean": "clean", "attribute": "the counterfactual's", "undecided": "undecided"}
    spans = [f"{format_slots(stages[s])} {name}" for s, name in names.items() if s in stages]
    peak = select(table, direction="all", quantity=strip_swap.HIGHEST).iloc[0]
    parts = [
        f"Answer by slot: {'; '.join(spans)}",
        f"the counterfactual's answer is highest at slot {int(peak['slot'])}, "
        f"{format_interval(peak)} ({counted(int(peak['n']), 'observation')})",
    ]
    return " ".join(map(sentence, parts))


def _flips(table: pd.DataFrame, stated: Sequence[str], compared: Sequence[str]) -> str:
    """Returns in words whose cells flip the answer over the early slots, by direction."""
    parts = []
    early = select(table, quantity=EARLY)
    for direction in dict.fromkeys(early["direction"]):
        here = {str(row["kind"]): row for _, row in select(early, direction=direction).iterrows()}
        said = []
        for kind in stated:
            judged = judge(here[kind], least=0.0)
            outcome = "yes" if judged.above else "no" if judged.below else "undecided"
            said.append(f"{kind} {outcome}, {format_interval(here[kind])}")
        against = []
        for kind in compared:
            apart = judge(here[f"{kind} - {control_of(kind)}"])
            more = {1: "more than", -1: "less than"}.get(
                apart.sign,
                "no more than" if apart.outcome == "not found" else "undecided whether more than",
            )
            against.append(f"{kind} {more} {AS_MANY}: {apart.reason}")
        where = "all questions" if direction == "all" else direction
        parts.append(
            f"{where}: does the answer flip? {'; '.join(said)}. {sentence('; '.join(against))}"
        )
    return "\n".join(map(sentence, parts))
