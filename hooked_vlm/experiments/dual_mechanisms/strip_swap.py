"""E4, strip swap and object swap: which tokens hold the order? (paper, 5.2.2, Figs. 5-7)

The tokens of two regions are exchanged with those of the run on the mirrored picture, at one
slot at a time.  If a region holds the order that determines the answer, the answer becomes
that of the mirrored picture.  The regions are the object cells alone, the whole strips, and
strips without their objects (a control for the size of the change).
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.scoring import logit_difference, matches_answer
from hooked_vlm.experiments.batches import sweep_pairs
from hooked_vlm.experiments.dual_mechanisms.swap_regions import ALIGNED, SwapRegions, strips_of
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import (
    difference_rows,
    format_interval,
    format_names,
    format_slots,
    score_rows,
    select,
)
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.overlay import draw_regions
from hooked_vlm.regions.pairs import CellPairs
from hooked_vlm.stimuli.pairs import SwapPair, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF, DIRECTIONS
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
FLIPPED = 0.5
"""The mean probability of the swapped answer from which the verdict calls it flipped."""
SMALLEST = 0.01
"""The smallest difference in the verdict: with 50 pairs, even 0.0001 can be significant."""


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Swaps each kind of region at every slot, in up to `config.pairs` pairs per direction."""
    return run_on(Setting.of(model, config), config, on_progress)


def run_on(setting: Setting, config: Config, on_progress: OnProgress) -> Result:
    """Runs the experiment on a given setting."""
    model = setting.model
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
        d: values.assign_coords(pair=[_name(pair) for pair in pairs[d]])
        for d, values in by_direction.items()
    }
    table = _table(by_direction, model.cfg.n_layers, config.seed)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        images=_pictures(setting, pairs),
        verdict=_verdict(table),
        config={"pairs": {d: len(found) for d, found in pairs.items()}, "seed": config.seed},
        notes=(
            "Activations are written into the run on the clean picture; the source is the run on "
            "the mirrored picture with the same prompt. Left and right are exchanged (top and "
            "bottom for above and below), so the middle is unchanged.",
            "'swapped' is the mean probability of the mirrored picture's answer, which the paper "
            "calls IIA; 'agreement' is the share of pairs with this top answer; 'log odds' are its "
            "log odds against the clean answer. 'strip, aligned' is computed where the published "
            "pairing of strips moves an object by a column.",
            "Intervals are 95 % bootstrap intervals over pairs. 'strip - object' is the paired "
            "difference in the swapped answer's probability; its p-values (column p_holm) are "
            "sign-flip tests over pairs, adjusted by Holm over the slots of a direction.",
            f"The verdict's first sentence calls an answer flipped where the mean probability of "
            f"the swapped answer reaches {FLIPPED} at the best slot. Its differences are those "
            f"with p_holm of at most 0.05 and a size of at least {SMALLEST}.",
            *regions.notes,
        ),
    )


def scored(
    setting: Setting, logits: Float[Tensor, "pair d_vocab"], pairs: Sequence[SwapPair]
) -> Float[Tensor, "pair quantity"]:
    """Returns each pair's `QUANTITIES` from the final position's logits."""
    swapped, clean = [p.swapped_answer for p in pairs], [p.clean_answer for p in pairs]
    both = setting.probabilities(logits, list(zip(swapped, clean, strict=True)))
    tokenizer = setting.model.tokenizer
    columns = [
        matches_answer(logits, tokenizer, swapped).to(both),
        logit_difference(logits, tokenizer, swapped, clean).to(both),
    ]
    return torch.cat([both, torch.stack(columns, dim=-1)], dim=-1)


def _name(pair: SwapPair) -> str:
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
        rows += score_rows(values, seed, direction=direction)
        swapped = values.sel(quantity="swapped").transpose("pair", "kind", "slot")
        kinds = [str(kind) for kind in values["kind"].values]
        strip, inside = (swapped.sel(kind=k).values for k in (strips_of(kinds), "object"))
        rows += difference_rows(
            strip,
            inside,
            {"slot": values["slot"].values.tolist()},
            seed,
            direction=direction,
            kind="strip - object",
            quantity="difference",
        )
    table = pd.DataFrame(rows)
    table["site"] = [slot_name(slot, n_layers) for slot in table["slot"]]
    return table


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


def _verdict(table: pd.DataFrame) -> str:
    found: dict[str, list[str]] = {}
    parts = []
    for direction in [d for d in DIRECTIONS if d in set(table["direction"])]:
        here = select(table, direction=direction, quantity="swapped")
        strips = strips_of(list(here["kind"]))
        shown = {"strip": strips, "object": "object", "background": "background"}
        best = {kind: _peak(select(here, kind=found)) for kind, found in shown.items()}
        flips = {kind: bool(best[kind]["value"] >= FLIPPED) for kind in shown}
        found.setdefault(_FINDINGS[flips["strip"], flips["object"]], []).append(direction)
        parts.append(
            f"{direction}: highest probability of a flipped answer: strips {_at(best['strip'])}, "
            f"objects alone {_at(best['object'])}, strips without objects "
            f"{_at(best['background'])}; "
            f"{_compared(select(table, direction=direction, kind='strip - object'))}."
            + (_aligned(here, best["strip"]) if strips == "strip" else "")
        )
    first = "; ".join(f"{format_names(where)}: {finding}" for finding, where in found.items())
    return "\n".join(part[0].upper() + part[1:] for part in (f"{first}.", *parts))


_FINDINGS = {  # by whether strips flip the answer, and whether object cells alone do
    (True, False): "strips flip the answer and object cells alone do not, as in the paper",
    (True, True): "object cells alone flip the answer too, unlike in the paper",
    (False, True): "object cells alone flip the answer and strips do not, unlike in the paper",
    (False, False): "neither strips nor object cells flip the answer, unlike in the paper",
}


def _compared(difference: pd.DataFrame) -> str:
    """Returns in words the slots at which strips and objects differ, and the largest difference."""
    clear = difference[(difference["p_holm"] <= 0.05) & (difference["value"].abs() >= SMALLEST)]
    parts = []
    for words, sign in (
        ("strips flip more answers than objects", 1),
        ("objects flip more answers than strips", -1),
    ):
        rows = clear[clear["value"] * sign > 0]
        if len(rows):
            most = rows.loc[rows["value"].abs().idxmax()]
            size = format_interval(most if sign > 0 else _negated(most))
            size = size if len(rows) == 1 else f"up to {size} (slot {most['slot']})"
            parts.append(f"{words} at {format_slots(rows['slot'])}, by {size}")
    return "; ".join(parts) or "no clear difference between strips and objects at any slot"


def _aligned(here: pd.DataFrame, published: pd.Series) -> str:
    """Returns in words the effect of aligned strips, where they differ from the published ones."""
    aligned = select(here, kind=ALIGNED)
    if aligned.empty:
        return ""
    return (
        f" Aligned strips (object on object): {_at(_peak(aligned))}; published strips (object "
        f"moved by a column): {_at(published)}."
    )


def _negated(row: pd.Series) -> pd.Series:
    return pd.Series({"value": -row["value"], "low": -row["high"], "high": -row["low"]})


def _at(row: pd.Series) -> str:
    return f"{format_interval(row)} (slot {row['slot']})"


def _peak(rows: pd.DataFrame) -> pd.Series:
    return rows.sort_values("value").iloc[-1]
