"""R3: What'sUp over its three references together, as the paper reports it.

The paper's composites have a chair, a table or an armchair in the middle, and its numbers of
What'sUp are over all three: one accuracy, one ordering probe fitted to pictures of all
references, and pairs that each draw their reference at random.  A pair's regions are those of
its own reference.
"""

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import pandas as pd
import xarray as xr

from hooked_vlm.analysis.scoring import normalise
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.errors import CannotRunError, HookedVLMWarning, counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import left_out, none_left, numbers_only, scored_numbers
from hooked_vlm.experiments.dual_mechanisms import final_token, strip_swap
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions, strips_of
from hooked_vlm.experiments.further.whatsup_probe import AXIS, Settings, probe_rows
from hooked_vlm.experiments.loop import independent, once, over, over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import FEWEST_PAIRS, Setting, of_config, stimuli_of
from hooked_vlm.experiments.tables import format_interval, interval_rows, score_rows, select
from hooked_vlm.experiments.verdicts import not_tested
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.stimuli.datasets import whatsup
from hooked_vlm.stimuli.pairs import (
    Question,
    final_token_pair,
    right_on_both,
    sample_draws,
    swap_pair,
)
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ABOUT = About(
    id="R3",
    name="whatsup-pooled",
    section="Table 1, 5.1-5.2 on What'sUp",
    title="What does the model do on What'sUp, over all references?",
    claim=(
        "Accuracy on 1074 composites is 0.73 for Qwen2-VL-7B and 0.62 for Gemma-3-4b; probes and "
        "swaps find the strips of the synthetic settings."
    ),
)
KINDS = ("strip", "object", "background")


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`tuples` composites, drawn with `probe_seed`, are what the probe is fitted and read on."""

    settings_allowed = ("whatsup",)
    ranges: ClassVar = {"tuples": (8, 10**6), "probe_seed": (0, common.MAX_SEED)}

    setting: str = "whatsup"
    tuples: int = 120
    probe_seed: int = 42

    @property
    def used_settings(self) -> tuple[str, ...]:
        """The settings of the three references."""
        return whatsup.SETTINGS


def data_of(config: Config) -> dict[str, StimulusSet]:
    """Returns the stimuli around each reference."""
    return {
        reference: stimuli_of(replace(config, setting=f"whatsup-{reference}"))
        for reference in whatsup.REFERENCES
    }


def run_on(
    model, data: Mapping[str, StimulusSet], config: Config, on_progress: OnProgress = silent
) -> Result:
    """Computes accuracy, probe, final-token interchange and swaps over all references."""
    on_progress(0, 4)
    if difference := _count_difference(config):
        warnings.warn(difference, HookedVLMWarning, stacklevel=2)
    settings = {name: Setting(model, own, config.batch_size) for name, own in data.items()}
    steps = {
        "behaviour": lambda: _accuracy(settings),
        "probes": lambda: probe_rows(settings, config.tuples, config.probe_seed, config.seed),
        "final-token": lambda: _interchange(settings, config),
        "strip-swap": lambda: _swaps(settings, config),
    }
    parts = []
    with independent() as each:
        for done, (name, step) in enumerate(steps.items(), start=1):
            with each.part(name):
                parts.append(step())
            on_progress(done, len(steps))
    table = pd.DataFrame([row for rows, _ in parts for row in rows])
    missing = [said for _, sentences in parts for said in sentences]
    first = next(iter(settings.values()))
    return Result(
        **vars(ABOUT),
        table=table,
        images={"a composite": first.picture(first.stimuli.items()[0])},
        verdict="\n".join([_verdict(table), *missing]),
        config={
            "items": {name: len(s.stimuli.items()) for name, s in settings.items()},
            "tuples": config.tuples,
            "probe_seed": config.probe_seed,
            "seed": config.seed,
        },
        notes=(
            difference or f"There are {whatsup.PUBLISHED_IMAGES} composites, as in the paper.",
            "A name that the model's tokenizer splits is left out, so fewer composites may be "
            "asked about than there are. Each is asked for its left and its right object.",
            f"The probe is fitted to {config.tuples} composites at most, drawn from all references "
            f"with seed {config.probe_seed}, and read on a quarter of them; the cells of an object "
            "are those of its reference's box.",
            "A pair draws its reference at random, then its other objects (the paper does not "
            "say in which order). Regions of a pair are those of its reference; where published "
            "strips cannot be paired (table, 16 tokens), the pair's strips are aligned ones.",
            "Intervals of interventions are 95 % bootstrap intervals over observations: pairs of "
            "the same two pictures, in any direction, are one.",
        ),
    )


run = of_config(run_on, data_of)


def _count_difference(config: Config) -> str:
    return whatsup.count_difference(whatsup.load(config.data)) if config.data else ""


def _accuracy(settings: Settings) -> tuple[list[dict], list[str]]:
    """Returns the rows of accuracy: of each reference, and of all composites together.

    Then sentences on questions that are left out because their logits are not numbers.
    """
    found: dict[tuple[str, str], list[bool]] = {}
    missing: list[str] = []
    asked = {
        f"{reference}, {direction}": (reference, direction, setting.stimuli.items((direction,)))
        for reference, setting in settings.items()
        for direction in setting.directions
    }
    answers = over_batches(
        "answers",
        {name: questions for name, (_, _, questions) in asked.items()},
        next(iter(settings.values())).batch_size,
        lambda name, batch, _: settings[asked[name][0]].answers(batch),
        last=True,
    )
    for name, (reference, direction, questions) in asked.items():
        both = list(zip(chain(*answers[name]), questions, strict=True))
        right = [said == normalise(q.target) for said, q in both if said is not None]
        found[reference, direction] = right
        missing += left_out(len(both) - len(right), "question", name)
    rows = []
    for reference in (*settings, "all"):
        for direction in ("left", "right", "all"):
            verdicts = [
                verdict
                for (own, asked), each in found.items()
                if reference in (own, "all") and direction in (asked, "all")
                for verdict in each
            ]
            if not verdicts:
                continue
            interval = wilson(float(sum(verdicts)), len(verdicts))
            rows += interval_rows(
                interval,
                {},
                part="behaviour",
                reference=reference,
                direction=direction,
                quantity="accuracy",
            )
    if not rows:
        raise none_left("question")
    return rows, missing


def drawn_pairs(settings: Settings, make: Any, k: int, config: Config) -> dict[str, list[Any]]:
    """Returns pairs by direction; each draws a reference, then `k - 1` other objects of it.

    Raises `CannotRunError` where a reference has too few objects, or no direction two pairs.
    """
    short = {name: len(s.names) for name, s in settings.items() if len(s.names) < k - 1}
    if short:
        raise CannotRunError(
            f"A pair needs {k - 1} different objects around a reference; these have fewer names of "
            f"one token: {short}. Run the settings whatsup-… of other references."
        )

    def draw(rng: random.Random) -> tuple[str, ...]:
        reference = rng.choice(list(settings))
        first, *others = rng.sample(settings[reference].names, k - 1)
        return first, reference, *others

    def is_right(questions: list[Question]) -> list[bool]:
        verdicts = dict.fromkeys(questions, False)
        for reference, setting in settings.items():
            own = [question for question in questions if question.reference == reference]
            if own:
                verdicts |= dict(zip(own, setting.is_right(own), strict=True))
        return [verdicts[question] for question in questions]

    directions = next(iter(settings.values())).directions
    found = once(
        "pairs",
        lambda: sample_draws(
            draw,
            right_on_both(make, is_right),
            config.pairs,
            config.seed,
            directions=directions,
        ),
    )
    pairs = {
        d: [make(d, names) for names in tuples]
        for d, tuples in found.items()
        if len(tuples) >= FEWEST_PAIRS
    }
    if not pairs:
        raise CannotRunError(
            "In no direction does the model answer two pairs of composites correctly, so there is "
            "nothing to intervene on. Run the behaviour experiment to see the model's accuracy."
        )
    return pairs


def _grouped(settings: Settings, pairs: Sequence[Any]) -> list[tuple[Setting, list[Any]]]:
    """Returns batches of pairs that share a reference, with its setting."""
    return [
        (setting, batch)
        for reference, setting in settings.items()
        for batch in setting.batches([p for p in pairs if p.clean.reference == reference])
    ]


def _interchange(settings: Settings, config: Config) -> tuple[list[dict], list[str]]:
    """Returns the rows of the final-token interchange (E2), over pairs of all references."""
    return _sweeps(
        settings,
        lambda: drawn_pairs(settings, final_token_pair, 5, config),
        final_token.scored,
        final_token.QUANTITIES,
        lambda _: {"final token": LastToken()},
        config,
        "final-token",
    )


def _swaps(settings: Settings, config: Config) -> tuple[list[dict], list[str]]:
    """Returns the rows of the swaps (E4), over pairs of all references."""
    regions = {}
    for reference, setting in settings.items():
        found = SwapRegions.of(setting.geometry, (AXIS,))
        kinds = (strips_of(found.kinds), *KINDS[1:])
        regions[reference] = {
            kind: found.pairs[AXIS][own] for kind, own in zip(KINDS, kinds, strict=True)
        }
    return _sweeps(
        settings,
        lambda: drawn_pairs(settings, swap_pair, 3, config),
        strip_swap.scored,
        strip_swap.QUANTITIES,
        lambda reference: regions[reference],
        config,
        "strip-swap",
    )


def _sweeps(
    settings: Settings,
    draw: Callable[[], dict[str, list[Any]]],
    scored: Any,
    quantities: Sequence[str],
    places: Any,
    config: Config,
    part: str,
) -> tuple[list[dict], list[str]]:
    """Returns the rows of patches at every slot, at the places of each pair's reference.

    Then sentences on directions without enough pairs, and on pairs that are left out because
    their scores are not numbers.  Where no pair is left there are no rows: accuracy and probes
    need no pairs, and stand without them.
    """
    try:
        pairs = draw()
        scores, missing = numbers_only(
            _scores(settings, pairs, scored, quantities, places), part=part
        )
    except CannotRunError as error:
        return [], [f"Not tested, {part}: {error}"]
    directions = next(iter(settings.values())).directions
    missing += not_tested(directions, list(scores), part)
    scores["all"] = xr.concat(list(scores.values()), dim="pair")
    rows = [
        {**row, "part": part}
        for direction, values in scores.items()
        for row in score_rows(
            values, config.seed, values["pair"].values.tolist(), direction=direction
        )
    ]
    return rows, missing


def _scores(
    settings: Settings,
    pairs: Mapping[str, list[Any]],
    scored: Any,
    quantities: Sequence[str],
    places: Any,
) -> dict[str, xr.DataArray]:
    """Returns the scores of patches by direction, each `[pair, kind, slot, quantity]`."""

    def score(unit: tuple[str, Setting, list[Any]], told: OnProgress) -> xr.DataArray:
        _, setting, batch = unit
        at = places(batch[0].clean.reference)
        source = setting.inputs([pair.counterfactual for pair in batch])
        sweep = Sweep(
            setting.inputs([pair.clean for pair in batch]),
            {"kind": list(at), "slot": list(range(setting.model.cfg.n_layers + 1))},
            make=lambda kind, slot: Patch(slot, at=at[kind], source=source),
        )
        found = sweep.run(
            setting.model,
            lambda logits: scored_numbers(
                lambda rows: scored(setting, rows, batch), final_logits(logits)
            ),
            dims=("pair", "quantity"),
            coords={"quantity": quantities},
            on_progress=told,
            logits_to_keep=1,
        )
        return found.assign_coords(pair=[_pictures(pair) for pair in batch])

    units = {
        f"{direction} {i}": (direction, setting, batch)
        for direction, own in pairs.items()
        for i, (setting, batch) in enumerate(_grouped(settings, own))
    }
    found = over("sweep", units, score, last=True)
    return {
        direction: xr.concat(
            [found[n] for n, unit in units.items() if unit[0] == direction], "pair"
        )
        for direction in pairs
    }


def _pictures(pair: Any) -> str:
    """Returns the two pictures of a pair, by which it is one observation with its like."""
    shown = sorted((pair.clean.entities, pair.counterfactual.entities))
    return "; ".join(", ".join(map(str, entities)) for entities in shown)


def _verdict(table: pd.DataFrame) -> str:
    accuracy = select(table, part="behaviour", direction="all").set_index("reference")
    every: Any = accuracy.loc["all"]
    probes = select(table, part="probes").set_index("quantity")
    by = ", ".join(
        f"{name} {format_interval(accuracy.loc[name])}" for name in accuracy.index if name != "all"
    )
    sentences = [
        f"Accuracy {format_interval(every)} ({counted(every['n'], 'question')}); by reference: "
        f"{by}.",
        f"One probe over all references: {format_interval(probes.loc['probe, objects'])} of "
        "held-out object tokens (control "
        f"{probes.loc['probe, objects, shuffled', 'value']:.2f}), and "
        f"{format_interval(probes.loc['probe, background'])} of background tokens given to "
        f"their strip (control {probes.loc['probe, background, shuffled', 'value']:.2f}).",
    ]
    ordering = select(table, part="final-token", direction="all", quantity="ordering")
    if len(ordering):
        peak = ordering.sort_values("value").iloc[-1]
        sentences.append(
            f"The ordering answer is most probable at slot {peak['slot']} ({peak['value']:.2f}, "
            f"{counted(peak['n'], 'observation')})."
        )
    swapped = select(table, part="strip-swap", direction="all", quantity="swapped")
    if len(swapped):
        first = [select(swapped, kind=kind, slot=0).iloc[0] for kind in KINDS]
        flips = ", ".join(
            f"{kind} {format_interval(row)}" for kind, row in zip(KINDS, first, strict=True)
        )
        sentences.append(
            f"Probability of a flipped answer after a swap at slot 0: {flips} "
            f"({counted(first[0]['n'], 'observation')})."
        )
    return "\n".join(sentences)
