"""E2, final-token interchange: at which slots does the last position hold ordering and attribute?

(paper, 5.1, Fig. 3)  The residual vector of the last input position is replaced, at one slot
at a time, by that of a run on other colours with the opposite question.  The answer shows what
was transferred: the clean answer (nothing), the clean image's colour at the place that the
counterfactual asks for (the ordering), or the counterfactual's own colour (the attribute).
"""

from collections.abc import Sequence

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.scoring import logit_difference, matches_answer
from hooked_vlm.experiments.batches import sweep_pairs
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import format_interval, format_slots, score_rows, select
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.stimuli.pairs import FinalTokenPair, final_token_pair
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


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Patches the final token at every slot, in up to `config.pairs` pairs per direction."""
    setting = Setting.of(model, config)
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
    table = _table(by_direction, model.cfg.n_layers, config.seed)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={f"pairs_{d}": values for d, values in by_direction.items()},
        verdict=_verdict(table),
        config={"pairs": {d: len(found) for d, found in pairs.items()}, "seed": config.seed},
        notes=(
            "Slot 0 is the input of block 0 (visual tokens merged in), slot l the output of block "
            "l-1; the last input position, generation prompt included, is written at one slot.",
            "Probabilities, which the paper calls IIA, sum over the spellings of a colour that are "
            "single tokens. 'agreement' is the share of pairs with this top answer, 'log odds' "
            "the log odds against the clean answer. Intervals are 95 % bootstrap intervals over "
            "pairs. A pair counts only if the model answers both of its images correctly without "
            "intervention.",
            "The verdict names for each slot the most probable of the three answers: 'clean' keeps "
            "the clean answer, 'ordering' and 'attribute' transfer these from the counterfactual.",
        ),
    )


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
    for direction, values in {**by_direction, "all": together}.items():
        rows += score_rows(values, seed, direction=direction)
    table = pd.DataFrame(rows)
    table["site"] = [slot_name(slot, n_layers) for slot in table["slot"]]
    return table


def _verdict(table: pd.DataFrame) -> str:
    every = select(table, direction="all")
    wide = every.pivot(index="slot", columns="quantity", values="value")
    winner = wide[list(ANSWERS)].idxmax(axis=1)
    spans = [
        f"{format_slots(winner.index[winner == q]).partition(' ')[2]} {q}"
        for q in ANSWERS
        if (winner == q).any()
    ]
    ordering = select(every, quantity="ordering")
    peak = ordering.sort_values("value").iloc[-1]
    return (
        f"Top answer by slot: {'; '.join(spans)}. The ordering answer peaks "
        f"at slot {peak['slot']} with {format_interval(peak)}. {_against_the_paper(winner)}"
    )


def _against_the_paper(winner: pd.Series) -> str:
    missing = [q for q in ANSWERS if not (winner == q).any()]
    if missing:
        return f"Unlike in the paper, there is no {' and no '.join(missing)} stage."
    if winner.tolist() == sorted(winner, key=ANSWERS.index):
        return "The three stages follow each other as in the paper."
    return "All three stages appear, but not in the paper's order."
