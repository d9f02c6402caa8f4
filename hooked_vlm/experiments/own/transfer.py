"""E2 and E4 on own data: what is transferred from the run on the counterfactual picture?

The residual stream at one slot and one place is replaced by that of the run on the counterfactual
with the same question: at the final token (E2), or at the cells of boxes and at all others (E4).
If the place determines the answer, the answer becomes the counterfactual's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

from hooked_vlm.experiments.batches import numbers_only, sweep_pairs
from hooked_vlm.experiments.dual_mechanisms import final_token, strip_swap
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.own.setting import ANYWHERE, AS_MANY, OTHERS, OwnPair, OwnSetting
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.tables import format_interval, format_slots, score_rows, select
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
    table = _table(by_direction, setting.model.cfg.n_layers, config.seed)
    return Result(
        **vars(final_token.ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        verdict="\n".join(
            [_stages(table), *not_tested(setting.directions, [*by_direction]), *left_out]
        ),
        config={"pairs": {d: v.sizes["pair"] for d, v in by_direction.items()}},
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

    kinds = setting.region_kinds
    by_direction, left_out = _swept(setting, config, kinds, places, on_progress)
    n_layers = setting.model.cfg.n_layers
    table = _table(by_direction, n_layers, config.seed)
    return Result(
        **vars(strip_swap.ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        images={"boxes": setting.first_with_boxes()},
        verdict="\n".join(
            [_flips(table), *not_tested(setting.directions, [*by_direction]), *left_out]
        ),
        config={"pairs": {d: v.sizes["pair"] for d, v in by_direction.items()}},
        notes=(
            "Own data: each cell is written from the same cell of the counterfactual picture. The "
            f"regions are the boxes and masks of the table ('{ANYWHERE}': together; 'box NAME': "
            f"each that all rows have), '{OTHERS}', and '{AS_MANY}': a random choice of as many "
            "outside the boxes. There are no strips: own pictures "
            "have no geometry that says where they are.",
            f"The verdict is about '{EARLY}', slots 0 to {n_layers // 2}: an answer flips where "
            "the interval of its mean lies above 0.5; boxes differ from as many other cells where "
            "the interval of the paired difference excludes zero. P-values are adjusted by Holm.",
            *_NOTES,
        ),
    )


_NOTES = (
    "'swapped' is the mean probability of the counterfactual's answer, 'clean' that of the "
    "picture's own, 'agreement' the share of pairs with the counterfactual's as top answer, 'log "
    "odds' its log odds against the clean one. Pairs count only if the model answers both pictures "
    "correctly. Intervals of curves are 95 % bootstrap intervals over pairs; claims count two "
    "pictures once, whatever the number of their questions, and a pair as its reverse.",
)


def _swept(
    setting: OwnSetting,
    config: Config,
    kinds: Sequence[str],
    places: Places,
    on_progress: OnProgress,
) -> tuple[dict[str, xr.DataArray], list[str]]:
    """Returns the scores `[pair, kind, slot, quantity]` of each direction; coordinate pair has the
    pictures."""
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
    named = {
        d: values.assign_coords(pair=[pair.pictures for pair in pairs[d]])
        for d, values in found.items()
    }
    return numbers_only(named)


def _table(by_direction: Mapping[str, xr.DataArray], n_layers: int, seed: int) -> pd.DataFrame:
    together = xr.concat(list(by_direction.values()), dim="pair")
    groups = dict(by_direction) if len(by_direction) > 1 else {}
    rows = []
    for direction, values in {**groups, "all": together}.items():
        rows += score_rows(values, seed, direction=direction)
        rows += _claims(values, n_layers, seed, direction)
    table = pd.DataFrame(rows)
    slots = table["slot"]
    table["site"] = [None if pd.isna(slot) else slot_name(int(slot), n_layers) for slot in slots]
    return adjusted(table, table["quantity"] == EARLY)


def _claims(values: xr.DataArray, n_layers: int, seed: int, direction: str) -> list[dict]:
    """Returns the rows that a verdict is about: over early slots, and of each slot."""
    values = values.transpose("pair", "kind", "slot", "quantity")
    units = [str(pair) for pair in values["pair"].values]
    kinds = [str(kind) for kind in values["kind"].values]
    about: dict[str, Any] = {"direction": direction}
    over = values.sel(quantity="swapped") - values.sel(quantity="clean")
    axes = {name: over[name].values.tolist() for name in ("kind", "slot")}
    rows = claim_rows(over.values, axes, units, seed, quantity=OVER, **about)
    early = values.sel(quantity="swapped", slot=slice(0, n_layers // 2)).mean("slot")
    about["quantity"] = EARLY
    half: dict[str, Any] = {"null": 0.5, "low": 0.0, "high": 1.0}
    rows += claim_rows(early.values, {"kind": kinds}, units, seed, **half, **about)
    for other in (OTHERS, AS_MANY):
        if other in kinds:
            apart = (early.sel(kind=ANYWHERE) - early.sel(kind=other)).values
            rows += claim_rows(apart, {}, units, seed, kind=f"{ANYWHERE} - {other}", **about)
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
    swapped = select(table, direction="all", quantity="swapped")
    peak = swapped.sort_values("value").iloc[-1]
    parts = [
        f"Answer by slot: {'; '.join(spans)}",
        f"the counterfactual's answer is highest at slot {int(peak['slot'])}, "
        f"{format_interval(peak)}",
    ]
    return " ".join(map(sentence, parts))


def _flips(table: pd.DataFrame) -> str:
    """Returns in words whose cells flip the answer over the early slots, by direction."""
    parts = []
    early = select(table, quantity=EARLY)
    for direction in dict.fromkeys(early["direction"]):
        here = {str(row["kind"]): row for _, row in select(early, direction=direction).iterrows()}
        said = []
        for kind in (k for k in here if " - " not in k):
            judged = judge(here[kind], least=0.0)
            outcome = "yes" if judged.above else "no" if judged.below else "undecided"
            said.append(f"{kind} {outcome}, {format_interval(here[kind])}")
        apart = judge(here[f"{ANYWHERE} - {AS_MANY}"])
        more = {1: "more than", -1: "less than"}.get(
            apart.sign,
            "no more than" if apart.outcome == "not found" else "undecided whether more than",
        )
        where = "all questions" if direction == "all" else direction
        parts.append(
            f"{where}: does the answer flip? {'; '.join(said)}. Boxes {more} {AS_MANY}: "
            f"{apart.reason}"
        )
    return "\n".join(map(sentence, parts))
