"""R3: What'sUp over its three references together, as the paper reports it.

The paper's composites have a chair, a table or an armchair in the middle, and its numbers of
What'sUp are over all three: one accuracy, one ordering probe fitted to pictures of all
references, and pairs that each draw their reference at random.  A pair's regions are those of
its own reference.
"""

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr

from hooked_vlm.analysis.probes import (
    Examples,
    LinearProbe,
    held_out_accuracy,
    object_examples,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.analysis.statistics import bootstrap, wilson
from hooked_vlm.errors import CannotRunError, HookedVLMWarning, counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.dual_mechanisms import final_token, strip_swap
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import projected
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions, strips_of
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import FEWEST_PAIRS, Setting
from hooked_vlm.experiments.tables import format_interval, interval_rows, score_rows, select
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.datasets import whatsup
from hooked_vlm.stimuli.pairs import (
    Question,
    final_token_pair,
    right_on_both,
    sample_draws,
    swap_pair,
)
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
AXIS = "horizontal"
KINDS = ("strip", "object", "background")
Settings = Mapping[str, Setting]
"""The setting of each reference, by its name."""


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


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Computes accuracy, probe, final-token interchange and swaps over all references."""
    on_progress(0, 4)
    if difference := _count_difference(config):
        warnings.warn(difference, HookedVLMWarning, stacklevel=2)
    settings = {
        reference: Setting.of(model, replace(config, setting=f"whatsup-{reference}"))
        for reference in whatsup.REFERENCES
    }
    parts = [_accuracy(settings)]
    on_progress(1, 4)
    parts.append(_probe(settings, config))
    on_progress(2, 4)
    parts.append(_interchange(settings, config))
    on_progress(3, 4)
    parts.append(_swaps(settings, config))
    on_progress(4, 4)
    table = pd.DataFrame([row for rows in parts for row in rows])
    first = next(iter(settings.values()))
    return Result(
        **vars(ABOUT),
        table=table,
        images={"a composite": first.picture(first.stimuli.items()[0])},
        verdict=_verdict(table),
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
        ),
    )


def _count_difference(config: Config) -> str:
    return whatsup.count_difference(whatsup.load(config.data)) if config.data else ""


def _accuracy(settings: Settings) -> list[dict]:
    """Returns the rows of accuracy: of each reference, and of all composites together."""
    found: dict[tuple[str, str], list[bool]] = {}
    for reference, setting in settings.items():
        for direction in setting.directions:
            questions = setting.stimuli.items((direction,))
            found[reference, direction] = setting.is_right(questions)
    rows = []
    for reference in (*settings, "all"):
        for direction in ("left", "right", "all"):
            verdicts = [
                verdict
                for (own, asked), each in found.items()
                if reference in (own, "all") and direction in (asked, "all")
                for verdict in each
            ]
            interval = wilson(float(sum(verdicts)), len(verdicts))
            rows += interval_rows(
                interval,
                {},
                part="behaviour",
                reference=reference,
                direction=direction,
                quantity="accuracy",
            )
    return rows


def drawn_tuples(settings: Settings, at_most: int, seed: int) -> list[Question]:
    """Returns composites of all references in the order of a seeded shuffle, `at_most` of them."""
    every = [q for setting in settings.values() for q in setting.stimuli.items(("left",))]
    random.Random(int(seed)).shuffle(every)
    return every[:at_most]


def _probe(settings: Settings, config: Config) -> list[dict]:
    """Returns the rows of one probe, fitted to and read on composites of all references."""
    # 1. Examples of each reference at its own boxes; images are numbered in the drawn order.
    asked = drawn_tuples(settings, config.tuples, config.probe_seed)
    parts, features = [], {}
    for reference, setting in settings.items():
        own = [i for i, question in enumerate(asked) if question.reference == reference]
        if not own:
            continue
        batches = setting.batches([asked[i] for i in own])
        tokens = torch.cat([projected(setting, batch) for batch in batches])
        features |= {i: tokens[at] for at, i in enumerate(own)}
        found = object_examples(tokens, _boxes(setting.geometry))
        numbers = np.array(own)
        parts.append(
            replace(
                found,
                images=numbers[found.images],
                objects=3 * numbers[found.images] + found.objects % 3,
            )
        )
    examples = Examples(
        torch.cat([part.X for part in parts]),
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("y", "images", "objects")
        ),
    )
    # 2. The probe and its control, both split by image.
    train, test = split_by_image(len(asked), seed=config.seed)
    rows = []
    shuffled = shuffled_labels(examples, seed=config.seed)
    for suffix, data in (("", examples), (", shuffled", shuffled)):
        part = data.of_images(train)
        probe = LinearProbe(seed=config.seed).fit(part.X, part.y)
        accuracy = held_out_accuracy(probe, data.of_images(test))
        shares = [_own_strip(settings, asked[i], features[i], probe) for i in test]
        for quantity, interval in (
            ("probe, objects", accuracy),
            ("probe, background", bootstrap(np.array(shares), seed=config.seed)),
        ):
            rows += interval_rows(interval, {}, part="probes", quantity=quantity + suffix)
    return rows


def _boxes(layout: Any) -> list[Region]:
    """Returns the cells of each place's object that the probe is fitted to."""
    return [layout.probe_region(AXIS, place) for place in range(3)]


def _own_strip(
    settings: Settings, question: Question, tokens: torch.Tensor, probe: LinearProbe
) -> float:
    """Returns the share of a picture's background tokens that a probe gives to their strip."""
    layout = settings[question.reference].geometry
    strip = np.zeros(layout.shape, dtype=int)
    for place in range(3):
        strip[layout.strip_region(AXIS, place).mask] = place
    given = probe.probability_map(tokens.unflatten(0, layout.shape)).argmax(-1).cpu().numpy()
    return float((given == strip)[layout.background(AXIS).mask].mean())


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
    found = sample_draws(
        draw,
        right_on_both(make, is_right),
        config.pairs,
        config.seed,
        directions=directions,
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


def _interchange(settings: Settings, config: Config) -> list[dict]:
    """Returns the rows of the final-token interchange (E2), over pairs of all references."""
    return _sweeps(
        settings,
        drawn_pairs(settings, final_token_pair, 5, config),
        final_token.scored,
        final_token.QUANTITIES,
        lambda _: {"final token": LastToken()},
        config,
        "final-token",
    )


def _swaps(settings: Settings, config: Config) -> list[dict]:
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
        drawn_pairs(settings, swap_pair, 3, config),
        strip_swap.scored,
        strip_swap.QUANTITIES,
        lambda reference: regions[reference],
        config,
        "strip-swap",
    )


def _sweeps(
    settings: Settings,
    pairs: Mapping[str, list[Any]],
    scored: Any,
    quantities: Sequence[str],
    places: Any,
    config: Config,
    part: str,
) -> list[dict]:
    """Returns the rows of patches at every slot, at the places of each pair's reference."""
    scores = {}
    for direction, own in pairs.items():
        found = []
        for setting, batch in _grouped(settings, own):
            at = places(batch[0].clean.reference)
            source = setting.inputs([pair.counterfactual for pair in batch])
            sweep = Sweep(
                setting.inputs([pair.clean for pair in batch]),
                {"kind": list(at), "slot": list(range(setting.model.cfg.n_layers + 1))},
                make=lambda kind, slot, at=at, source=source: Patch(
                    slot, at=at[kind], source=source
                ),
            )
            found.append(
                sweep.run(
                    setting.model,
                    lambda logits, s=setting, b=batch: scored(s, final_logits(logits), b),
                    dims=("pair", "quantity"),
                    coords={"quantity": quantities},
                    logits_to_keep=1,
                )
            )
        scores[direction] = xr.concat(found, dim="pair")
    scores["all"] = xr.concat(list(scores.values()), dim="pair")
    return [
        {**row, "part": part}
        for direction, values in scores.items()
        for row in score_rows(values, config.seed, direction=direction)
    ]


def _verdict(table: pd.DataFrame) -> str:
    accuracy = select(table, part="behaviour", direction="all").set_index("reference")
    every: Any = accuracy.loc["all"]
    probes = select(table, part="probes").set_index("quantity")
    by = ", ".join(
        f"{name} {format_interval(accuracy.loc[name])}" for name in accuracy.index if name != "all"
    )
    swapped = select(table, part="strip-swap", direction="all", quantity="swapped")
    first = [select(swapped, kind=kind, slot=0).iloc[0] for kind in KINDS]
    ordering = select(table, part="final-token", direction="all", quantity="ordering")
    peak = ordering.sort_values("value").iloc[-1]
    return "\n".join(
        [
            f"Accuracy {format_interval(every)} ({counted(every['n'], 'question')}); by reference: "
            f"{by}.",
            f"One probe over all references: {format_interval(probes.loc['probe, objects'])} of "
            "held-out object tokens (control "
            f"{probes.loc['probe, objects, shuffled', 'value']:.2f}), and "
            f"{format_interval(probes.loc['probe, background'])} of background tokens given to "
            f"their strip (control {probes.loc['probe, background, shuffled', 'value']:.2f}).",
            f"The ordering answer is most probable at slot {peak['slot']} ({peak['value']:.2f}, "
            f"{counted(peak['n'], 'pair')}). Probability of a flipped answer after a swap at slot "
            "0: "
            + ", ".join(
                f"{kind} {format_interval(row)}" for kind, row in zip(KINDS, first, strict=True)
            )
            + f" ({counted(first[0]['n'], 'pair')}).",
        ]
    )
