"""E2, final-token interchange: at which slots does the last position hold ordering and attribute?

(paper, 5.1, Fig. 3)  The residual vector of the last input position is replaced, at one slot
at a time, by that of a run on other colours with the opposite question.  The answer shows what
was transferred: the clean answer (nothing), the clean image's colour at the place that the
counterfactual asks for (the ordering), or the counterfactual's own colour (the attribute).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.scoring import logit_difference, matches_answer
from hooked_vlm.experiments.batches import numbers_only, sweep_pairs
from hooked_vlm.experiments.dual_mechanisms.failed_pairs import (
    CASE,
    HALF,
    failing_pictures,
    peaks,
)
from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import About, Cases, Result
from hooked_vlm.experiments.setting import Setting, of_config
from hooked_vlm.experiments.tables import (
    format_interval,
    format_slots,
    highest_row,
    score_rows,
    select,
)
from hooked_vlm.experiments.verdicts import LEAST, claim_rows, judge, not_tested, sentence
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.stimuli.pairs import FinalTokenPair, final_token_pair
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.sweeps.sweep import Sweep


ABOUT = About(
    id="E2",
    name="final-token",
    section="5.1, Fig. 3",
    title="At which slots does the final token hold ordering and attribute?",
    claim=(
        "In Qwen2-VL-7B (28 layers) on Squares, layers 0-19 keep the clean answer, 20-22 transfer "
        "the ordering and 23-27 the attribute."
    ),
)
ANSWERS = ("clean", "ordering", "attribute")
"""Probability of each of the three answers (the paper's "IIA")."""
AGREEMENTS = tuple(f"agreement, {answer}" for answer in ANSWERS)
"""Whether the top answer is each of the three."""
LOG_ODDS = ("log odds, ordering", "log odds, attribute")
"""Log odds of the ordering and the attribute answer against the clean answer."""
QUANTITIES = (*ANSWERS, *AGREEMENTS, *LOG_ODDS)
HIGHEST = "ordering, highest slot"


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Patches the final token at every slot, in up to `config.pairs` pairs per direction."""
    setting = Setting(model, data, config.batch_size)
    pairs = setting.pairs(final_token_pair, 5, config)
    slots = range(model.cfg.n_layers + 1)
    by_direction = sweep_pairs(
        setting,
        pairs,
        lambda _, batch: _sweep(setting, batch, slots),
        scored,
        QUANTITIES,
        on_progress,
        cells=len(slots),
    )
    by_direction = {
        d: values.assign_coords(
            {
                "pair": [_pictures(pair) for pair in pairs[d]],
                CASE: ("pair", [_name(pair) for pair in pairs[d]]),
            }
        )
        for d, values in by_direction.items()
    }
    by_direction, left_out = numbers_only(by_direction)
    table = _table(by_direction, model.cfg.n_layers, config.seed)
    cases = cases_of(by_direction)
    clean = {_name(pair): pair.clean for found in pairs.values() for pair in found}
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        images=failing_pictures(setting, clean, cases),
        cases=cases,
        verdict=" ".join([_verdict(table, setting.directions), *left_out]),
        config={"pairs": {d: len(found) for d, found in pairs.items()}, "seed": config.seed},
        notes=(
            "Slot 0 is the input of block 0 (visual tokens merged in), slot l the output of block "
            "l-1; the last input position, generation prompt included, is written at one slot.",
            "Probabilities, which the paper calls IIA, sum over the spellings of a colour that are "
            "single tokens. 'agreement' is the share of pairs with this top answer, 'log odds' "
            "the log odds against the clean answer. Intervals are 95 % bootstrap intervals over "
            "pairs; of all directions together, pairs of the same two pictures are one "
            f"observation. That of '{HIGHEST}' holds whichever slot is the highest. A pair counts "
            "only if the model answers both of its images correctly without intervention.",
            "The verdict gives a slot to one of the three answers: 'clean' keeps the clean answer, "
            "'ordering' and 'attribute' transfer these from the counterfactual. It does so where "
            f"the answer is more probable than both others by at least {LEAST} in a paired test "
            "over pairs (rows '… over others'; p_holm is adjusted over slots and answers); all "
            "other slots are undecided.",
        ),
    )


run = of_config(run_on)


def scored(
    setting: Setting, logits: Float[Tensor, "pair d_vocab"], pairs: Sequence[FinalTokenPair]
) -> Float[Tensor, "pair quantity"]:
    """Returns each pair's `QUANTITIES` from the final position's logits."""
    answers = [(p.clean_answer, p.ordering_answer, p.attribute_answer) for p in pairs]
    found = setting.probabilities(logits, answers)
    tokenizer = setting.model.tokenizer
    columns = [[row[i] for row in answers] for i in range(len(ANSWERS))]
    more = [matches_answer(logits, tokenizer, column) for column in columns]
    more += [logit_difference(logits, tokenizer, column, columns[0]) for column in columns[1:]]
    return torch.cat([found, *(column.to(found)[:, None] for column in more)], dim=-1)


def _pictures(pair: FinalTokenPair) -> str:
    """Returns the two pictures of a pair, by which it is one observation with its like."""
    shown = (pair.clean.entities, pair.counterfactual.entities)
    return f"{pair.clean.axis}: {'; '.join(', '.join(entities) for entities in shown)}"


def _name(pair: FinalTokenPair) -> str:
    """Returns a pair's direction, and the names in its clean and in its counterfactual picture."""
    return f"{pair.clean.direction}, {_pictures(pair)}"


def cases_of(by_direction: Mapping[str, xr.DataArray]) -> Cases:
    """Returns how probable the ordering answer becomes in each pair, and at which slot."""
    ordering = {d: values.sel(quantity="ordering") for d, values in by_direction.items()}
    failed = f"pairs whose ordering answer is at no slot more probable than {HALF}"
    return peaks(ordering, "ordering", failed)


def _sweep(setting: Setting, pairs: list[FinalTokenPair], slots: range) -> Sweep:
    source = setting.inputs([pair.counterfactual for pair in pairs])
    return Sweep(
        setting.inputs([pair.clean for pair in pairs]),
        {"slot": list(slots)},
        make=lambda slot: Patch(slot, at=LastToken(), source=source),
    )


def _table(by_direction: dict[str, xr.DataArray], n_layers: int, seed: int) -> pd.DataFrame:
    rows = []
    together = xr.concat(list(by_direction.values()), dim="pair")
    units = [str(pair) for pair in together["pair"].values]
    for direction, values in by_direction.items():
        rows += score_rows(values, seed, direction=direction)
    rows += score_rows(together, seed, units, direction="all")
    slots = together["slot"].values.tolist()
    answers = together.sel(quantity=list(ANSWERS)).transpose("pair", "slot", "quantity").values
    over = np.stack(
        [
            answers[..., i] - np.delete(answers, i, axis=-1).max(axis=-1)
            for i in range(len(ANSWERS))
        ],
        axis=-1,
    )
    names = [f"{answer} over others" for answer in ANSWERS]
    rows += claim_rows(over, {"slot": slots, "quantity": names}, units, seed, direction="all")
    ordering = together.sel(quantity="ordering").transpose("pair", "slot").values
    rows.append(highest_row(ordering, slots, units, seed, quantity=HIGHEST, direction="all"))
    table = pd.DataFrame(rows)
    table["site"] = [slot_name(slot, n_layers) for slot in table["slot"]]
    return table


def _verdict(table: pd.DataFrame, directions: Sequence[str]) -> str:
    every = select(table, direction="all")
    stages = {
        answer: [
            int(row["slot"])
            for _, row in select(every, quantity=f"{answer} over others").iterrows()
            if judge(row).above
        ]
        for answer in ANSWERS
    }
    slots = sorted(int(slot) for slot in set(every["slot"]))
    unclear = [slot for slot in slots if not any(slot in found for found in stages.values())]
    spans = [f"{format_slots(found)} {answer}" for answer, found in stages.items() if found]
    if unclear:
        spans.append(f"{format_slots(unclear)} undecided")
    peak = select(every, quantity=HIGHEST).iloc[0]
    parts = [
        f"Answer by slot: {'; '.join(spans)}",
        f"The ordering answer is highest at slot {peak['slot']}, {format_interval(peak)}",
        _against_the_paper(stages, unclear),
        *not_tested(directions, list(table["direction"])),
    ]
    return " ".join(map(sentence, parts))


def _against_the_paper(stages: Mapping[str, Sequence[int]], unclear: Sequence[int]) -> str:
    missing = [answer for answer, found in stages.items() if not found]
    if missing and unclear:
        return (
            f"Undecided whether there is a stage of {' and of '.join(missing)}: no answer is "
            f"clearly more probable than both others at {format_slots(unclear)}"
        )
    if missing:
        return f"Unlike in the paper, there is no {' and no '.join(missing)} stage"
    in_turn = [answer for _, answer in sorted((s, a) for a, found in stages.items() for s in found)]
    if in_turn == sorted(in_turn, key=ANSWERS.index):
        return "The three stages follow each other as in the paper"
    return "All three stages appear, but not in the paper's order"
