"""Q1, transfer of strength: do directions and alpha chosen on one setting help on another?

The paper chooses alpha on the items that it evaluates.  Here ordering directions are fitted
and alpha is chosen on a source setting, and both are used unchanged on every target setting.
The change is compared with that on the diagonal, where alpha is chosen on held-out items of
the target itself (as in E7).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.analysis.bounded import by_unit
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.experiments.answers import picture_of
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.dual_mechanisms import amplification
from hooked_vlm.experiments.dual_mechanisms.amplification import Plan, outcomes
from hooked_vlm.experiments.dual_mechanisms.amplified_accuracy import LEAST, held_out_change
from hooked_vlm.experiments.loop import over_batches, scope, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config, stimuli_of
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.experiments.verdicts import adjusted, claim_rows, judge, sentence
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.stimuli.settings import SCATTERED


ABOUT = About(
    id="Q1",
    name="alpha-transfer",
    section="open question on 5.4",
    title="Does the strength carry over to other data?",
    claim=(
        "The paper chooses alpha on the items that it evaluates; whether a strength chosen "
        "elsewhere helps is left open."
    ),
)
FORMULA = "released"


@dataclass(frozen=True, kw_only=True)
class Config(amplification.Config):
    """`settings` are sources and targets; `items` questions of each direction are asked."""

    settings_allowed = ("several",)

    setting: str = "several"  # see `settings`
    settings: tuple[str, ...] = (*SCATTERED, "objects-photos")
    """Answers must be wrong about the order somewhere, or there is nothing to correct."""
    items: int = 12
    alphas: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
    controls: int = 0  # compared are settings

    @property
    def used_settings(self) -> tuple[str, ...]:
        """The settings between which strengths are transferred."""
        return self.settings


def data_of(config: Config) -> dict[str, StimulusSet]:
    """Returns the stimuli of each setting."""
    return {name: stimuli_of(replace(config, setting=name)) for name in config.settings}


def run_on(
    model, data: Mapping[str, StimulusSet], config: Config, on_progress: OnProgress = silent
) -> Result:
    """Uses every setting's directions on every setting's questions, at every strength."""
    bound = {name: Setting(model, stimuli, config.batch_size) for name, stimuli in data.items()}
    axes = next(iter(bound.values())).axes
    plans = {}
    for name, setting in bound.items():
        with scope(name):
            plans |= {(name, axis): Plan.of(setting, axis, config) for axis in axes}
    crossed = {
        f"{source} on {target}, {axis}": (source, target, axis)
        for source, target, axis in product(bound, bound, axes)
    }

    def score(name: str, batch: list[Question], _: OnProgress) -> np.ndarray:
        source, target, axis = crossed[name]
        # The source's directions, the target's questions.
        directions = plans[source, axis].directions
        plan = replace(plans[target, axis], directions=directions, controls={})
        return outcomes(bound[target], plan, batch, config, (FORMULA,))[FORMULA][0]

    scores = over_batches(
        "outcomes",
        {name: plans[target, axis].asked for name, (_, target, axis) in crossed.items()},
        config.batch_size,
        score,
        on_progress,
        last=True,
    )
    right = {
        (source, target): np.concatenate(
            [part for axis in axes for part in scores[f"{source} on {target}, {axis}"]], axis=1
        )
        for source, target in product(bound, bound)
    }
    asked = {name: [q for axis in axes for q in plans[name, axis].asked] for name in bound}
    right, asked, missing = _numbers_only(right, asked)
    missing = [said for plan in plans.values() for said in plan.left_out] + missing
    table = _table(right, asked, config)
    return Result(
        **vars(ABOUT),
        table=table,
        verdict="\n".join([_verdict(table, config.settings), *missing]),
        config={"settings": list(config.settings), "items": config.items, "seed": config.seed},
        notes=(
            "The formula is the one that the paper's experiment ran ('released'), at slot 0 in all "
            "image tokens; see E7. Questions are never about pictures that the target's own probe "
            "was fitted to.",
            "'transferred': the directions of another setting, with the alpha that is best there. "
            "'itself': a setting's own directions, with alpha chosen on the other half of its "
            "pictures. Intervals are for bounded values, over pictures; an accuracy has Wilson's. "
            "The verdict counts the sources that help a target: p-values are adjusted (Holm) over "
            "all sources and targets.",
            "Transfer between models: run this on each and compare the column alpha.",
        ),
    )


run = of_config(run_on, data_of)


def _numbers_only(
    right: dict[tuple[str, str], np.ndarray], asked: dict[str, list[Question]]
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, list[Question]], list[str]]:
    """Returns answers `[alpha, item]` and questions without those that are NaN from any source.

    Then the sentences on those left out.
    """
    kept, questions, said = {}, {}, []
    for target, own in asked.items():
        from_each = {pair: values for pair, values in right.items() if pair[1] == target}
        whole = np.all([np.isfinite(values).all(0) for values in from_each.values()], axis=0)
        if not whole.any():
            raise none_left("question", "use smaller strengths")
        said += left_out(int((~whole).sum()), "question", target)
        kept |= {pair: values[:, whole] for pair, values in from_each.items()}
        questions[target] = [own[i] for i in np.flatnonzero(whole)]
    return kept, questions, said


def _table(
    right: dict[tuple[str, str], np.ndarray], asked: dict[str, list[Question]], config: Config
) -> pd.DataFrame:
    rows = []
    pictures = {target: [picture_of(q) for q in questions] for target, questions in asked.items()}
    for target, units in pictures.items():
        changes, alphas = [], []
        others = [source for source, to in right if to == target and source != target]
        for source in others:
            best = int(right[source, source].mean(1).argmax())
            changes.append(right[source, target][best] - right[source, target][0])
            alphas.append(config.alphas[best])
        about: dict[str, Any] = {"target": target, "quantity": "net"}
        own = right[target, target]
        change = held_out_change(own, own[0], units, config.seed)
        itself = {"source": target, "kind": "itself", "alpha": float("nan")}  # one for each half
        rows += claim_rows(change, {}, units, config.seed, **itself, **about)
        if others:
            axes = {"source": others}
            found = claim_rows(np.stack(changes, 1), axes, units, config.seed, **about)
            for row, alpha in zip(found, alphas, strict=True):
                rows.append({**row, "kind": "transferred", "alpha": alpha})
    for target in asked:
        intact = by_unit(right[target, target][0], pictures[target])
        about = {"source": "none", "target": target, "alpha": 0.0, "quantity": "accuracy"}
        interval = wilson(float(intact.sum()), len(intact))
        rows += interval_rows(interval, {}, kind="intact", **about)
    table = pd.DataFrame(rows)
    return adjusted(table, table["kind"] == "transferred")


def _verdict(table: pd.DataFrame, settings: Sequence[str]) -> str:
    parts = []
    for target in settings:
        own = select(table, target=target, kind="itself").iloc[0]
        others = select(table, target=target, kind="transferred")
        accuracy = select(table, target=target, kind="intact").iloc[0]
        judged = [judge(row, LEAST) for _, row in others.iterrows()]
        helped, harmed = sum(j.above for j in judged), sum(j.below for j in judged)
        unclear = sum(j.outcome == "undecided" for j in judged)
        if (others["alpha"] == 0).all() and not own["value"]:
            parts.append(
                f"{target} (accuracy {format_interval(accuracy)} without amplification): nothing "
                "to transfer, since no strength above zero is best on any setting"
            )
            continue
        words = [
            f"from {row['source']} (alpha {row['alpha']:g}) {format_interval(row)}"
            for _, row in others.iterrows()
        ]
        found = (
            f"sources that help: {helped} of {len(others)}, that harm: {harmed}, undecided: "
            f"{unclear}"
        )
        parts.append(
            f"{target} (accuracy {format_interval(accuracy)} without amplification): change with "
            f"its own directions and held-out alpha {format_interval(own)}; "
            f"{', '.join(words)}; {found}"
        )
    return "\n".join(map(sentence, parts))
