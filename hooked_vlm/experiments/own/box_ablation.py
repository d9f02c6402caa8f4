"""D1, box ablation: which boxes does the answer need? (own data)

The visual tokens of a box are replaced, at one slot at a time, by the mean visual token of all
pictures at that slot.  If the answer is read from the box at this slot or later, accuracy falls.
The controls are all cells outside the boxes, and as many of them as the boxes have, or as a box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.scoring import matches_answer
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import OBSERVATION, numbers_only, scored_numbers
from hooked_vlm.experiments.loop import over_batches
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.own.setting import AS_MANY, OwnSetting, control_of
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import FEWEST_PAIRS
from hooked_vlm.experiments.tables import (
    format_interval,
    format_slots,
    rate_rows,
    score_rows,
    select,
)
from hooked_vlm.experiments.verdicts import adjusted, claim_rows, judge, not_tested, sentence
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.stimuli.own import OwnData, OwnItem
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ABOUT = About(
    id="D1",
    name="box-ablation",
    section="no section",
    title="Which boxes of your own pictures does the answer need?",
    claim="The paper does not ask this; it is for your own pictures, questions and boxes.",
)
QUANTITIES = ("answer", "correct")
"""Probability of the correct answer, and whether it is the top answer."""
FALL = "fall"
"""Quantity: the probability of the correct answer without ablation, minus that with it."""
FEW = "fewer than two pictures have scores there that are numbers"


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`to` is what replaces the tokens: the "mean" visual token of all pictures, or "zero"."""

    settings_allowed = ("own",)
    choices: ClassVar = {"to": ("mean", "zero")}

    setting: str = "own"
    to: str = "mean"


def run_own(setting: OwnSetting, config: Any, on_progress: OnProgress) -> Result:
    """Ablates each kind of region at every slot, for all questions."""
    n_layers, d_model = setting.model.cfg.n_layers, setting.model.cfg.d_model
    slots, kinds = list(range(n_layers + 1)), setting.region_kinds
    items = {d: setting.stimuli.items([d]) for d in setting.directions}
    if all(len({q.image.key for q in own}) < FEWEST_PAIRS for own in items.values()):
        raise CannotRunError(
            "No direction has rows of two pictures, as an interval needs. Give more pictures, or "
            "leave the column direction out."
        )
    setting.check_regions()
    # 1. What replaces the tokens.
    vectors = torch.zeros(n_layers + 1, d_model)
    if config.to == "mean":
        vectors = _mean_tokens(setting, list(setting.data.items))

    # 2. Each kind of region at each slot.
    def score(_: str, batch: list[OwnItem], told: OnProgress) -> xr.DataArray:
        inputs = setting.inputs(batch)
        at = setting.regions(batch, setting.grids(inputs), config.seed)
        with torch.no_grad():
            logits = setting.model(inputs, logits_to_keep=1)[:, -1].float().cpu()
        whole = scored_numbers(lambda rows: _scored(setting, rows, batch), logits).numpy()
        sweep = Sweep(
            inputs,
            {"kind": list(kinds), "slot": slots},
            make=lambda kind, slot: Ablate(slot, at=at[kind], to=vectors[slot]),
        )
        found = sweep.run(
            setting.model,
            lambda logits: scored_numbers(
                lambda rows: _scored(setting, rows, batch), final_logits(logits)
            ),
            dims=("pair", "quantity"),
            coords={"quantity": list(QUANTITIES)},
            on_progress=told,
            logits_to_keep=1,
        )
        clean = xr.DataArray(whole, dims=("pair", "quantity")).expand_dims(kind=["none"])
        clean = clean.expand_dims(slot=slots).assign_coords(quantity=list(QUANTITIES))
        return xr.concat([found, clean.transpose(*found.dims)], dim="kind")

    scores = over_batches(
        "ablation",
        items,
        config.batch_size,
        score,
        on_progress,
        steps=len(slots) * len(kinds),
        last=True,
    )
    by_direction = {}
    for d, parts in scores.items():
        pictures = [q.image.key for q in items[d]]
        names = {"pair": [q.id for q in items[d]], OBSERVATION: ("pair", pictures)}
        by_direction[d] = xr.concat(parts, dim="pair").assign_coords(names)
    by_direction, left_out = numbers_only(by_direction, "question")
    # 3. Its table.
    compared = [(kind, control_of(kind)) for kind in setting.compared]
    table = _table(by_direction, n_layers, config.seed, setting.stated, compared)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={f"items_{d}": values for d, values in by_direction.items()},
        images={"boxes": setting.first_with_boxes()},
        verdict="\n".join(
            [
                _verdict(table, setting.stated, compared),
                *not_tested(setting.directions, [*by_direction], why=FEW),
                *left_out,
            ]
        ),
        config={"items": len(setting.data), "seed": config.seed, "to": config.to},
        notes=_notes(config.to),
    )


def _notes(to: str) -> tuple[str, ...]:
    """Returns how the numbers were computed."""
    return (
        "The visual tokens of a region are replaced at one slot: by "
        + ("zeros" if to == "zero" else "the mean visual token of all pictures there")
        + f". '{AS_MANY}' is a random choice of as many cells as the boxes have, or as a "
        "single box has, outside all boxes: what a change of this size does anywhere.",
        f"'{FALL}' is the loss of the correct answer's probability; 'boxes - {AS_MANY}' "
        "the paired difference of two losses, with p-values of the bounded mean test over "
        "pictures, adjusted by Holm over kinds and slots. A picture counts once, whatever the "
        "number of its questions. All questions count, also those that the model answers "
        "wrongly.",
    )


def run_on(_model: Any, data: Any, _config: Config, _on_progress: OnProgress) -> Result:
    """Raises `CannotRunError`: the built-in settings have no boxes.

    On own data, the experiment is `run_own`.
    """
    raise CannotRunError(
        f"box-ablation runs on your own data, and {type(data).__name__} was given. Give "
        f"{OwnData.__name__}.read(FOLDER), or --data FOLDER."
    )


def _scored(
    setting: OwnSetting, logits: Float[Tensor, "pair d_vocab"], items: list[OwnItem]
) -> Float[Tensor, "pair quantity"]:
    answers = [item.answer for item in items]
    probability = setting.probabilities(logits, [[answer] for answer in answers])
    right = matches_answer(logits, setting.model.tokenizer, answers).to(probability)
    return torch.cat([probability, right[:, None]], dim=-1)


def _mean_tokens(setting: OwnSetting, items: list[OwnItem]) -> Float[Tensor, "slot d_model"]:
    """Returns the mean over all visual tokens of all pictures, at every slot."""
    n_layers = setting.model.cfg.n_layers
    sites = [slot_name(slot, n_layers) for slot in range(n_layers + 1)]

    def score(_: str, batch: list[OwnItem], __: OnProgress) -> dict[str, Any]:
        inputs = setting.inputs(batch)
        with torch.no_grad():
            _, cache = setting.model.run_with_cache(inputs, sites)
        grids = enumerate(setting.grids(inputs))
        places = [(i, grid.positions.flatten().long()) for i, grid in grids]
        sums = [
            torch.stack([cache[site][i].float().cpu()[own].sum(0) for i, own in places]).sum(0)
            for site in sites
        ]
        return {"sum": torch.stack(sums), "n": sum(len(own) for _, own in places)}

    pictures = list({item.image.key: item for item in items}.values())
    parts = over_batches("means", {"all": pictures}, setting.batch_size, score)["all"]
    total = torch.stack([part["sum"] for part in parts]).sum(0)
    return total / sum(part["n"] for part in parts)


def _table(
    by_direction: Mapping[str, xr.DataArray],
    n_layers: int,
    seed: int,
    stated: Sequence[str],
    compared: Sequence[tuple[str, str]],
) -> pd.DataFrame:
    together = xr.concat(list(by_direction.values()), dim="pair")
    groups = dict(by_direction) if len(by_direction) > 1 else {}
    rows = []
    for direction, values in {**groups, "all": together}.items():
        units = [str(picture) for picture in values[OBSERVATION].values]
        rows += score_rows(values, seed, units, direction=direction)
        answer = values.sel(quantity="answer").transpose("pair", "kind", "slot")
        kinds = [str(kind) for kind in values["kind"].values if kind != "none"]
        fall = answer.sel(kind="none") - answer.sel(kind=kinds)
        own = fall.transpose("pair", "kind", "slot").sel(kind=list(stated))
        axes = {"kind": list(stated), "slot": own["slot"].values.tolist()}
        about: dict[str, Any] = {"direction": direction, "quantity": FALL}
        rows += claim_rows(own.values, axes, units, seed, **about)
        for kind, control in compared:
            apart = fall.sel(kind=kind) - fall.sel(kind=control)
            about["kind"] = f"{kind} - {control}"
            values_ = apart.transpose("pair", "slot").values
            rows += claim_rows(values_, {"slot": axes["slot"]}, units, seed, **about)
    right = together.sel(kind="none", quantity="correct", slot=0).values
    units = [str(picture) for picture in together[OBSERVATION].values]
    rows += rate_rows(right, units, direction="all", kind="none", quantity="accuracy")
    table = pd.DataFrame(rows)
    slots = table["slot"]
    table["site"] = [None if pd.isna(slot) else slot_name(int(slot), n_layers) for slot in slots]
    return adjusted(table, table["quantity"] == FALL, ["direction"])


def _verdict(
    table: pd.DataFrame, stated: Sequence[str], compared: Sequence[tuple[str, str]]
) -> str:
    every = select(table, direction="all")
    clean = select(every, quantity="accuracy").iloc[0]
    parts = [f"Accuracy without ablation {format_interval(clean)}"]
    falls = select(every, quantity=FALL)
    fall, larger = "a fall of the answer's probability", "a larger fall"
    against = [(f"{kind} - {control}", larger) for kind, control in compared]
    for kind, what in [*((kind, fall) for kind in stated), *against]:
        rows = select(falls, kind=kind)
        judged = {int(row["slot"]): judge(row) for _, row in rows.iterrows()}
        found = format_slots(slot for slot, one in judged.items() if one.above)
        unclear = [slot for slot, one in judged.items() if one.outcome == "undecided"]
        most = rows.sort_values("value").iloc[-1]
        size = f"largest at slot {int(most['slot'])}: {format_interval(most)}"
        where = found + (f", undecided at {format_slots(unclear)}" if unclear else "")
        parts.append(f"{kind}: {what} at {where} ({size})")
    return "\n".join(map(sentence, parts))
