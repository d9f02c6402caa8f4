"""E7, amplification: does a stronger ordering signal correct wrong answers? (paper, 5.4)

The directions of an ordering probe are amplified in every image token at the language
model's input.  The paper's formula is `h + alpha w`; its released experiment used `h + alpha
sum_k <h, w_k> w_k / |w_k|^2` over the probe's classes.  Both are computed, and the second also
with orthonormal directions, which count the axis shared by the classes once.

There are three additions to the paper.  All items are asked, so *broken* answers are reported
as well as corrected ones.  Random directions are seeded and matched in norm or in projection
energy.  Alpha is chosen on one half of the items and reported on the other half, in addition
to the best alpha on the same items.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.directions import orthonormalise, random_controls, stack
from hooked_vlm.analysis.probes import LinearProbe, class_directions, object_examples
from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.answers import named, picture_of, without_numbers
from hooked_vlm.experiments.batches import left_out, none_left, scored_numbers
from hooked_vlm.experiments.dual_mechanisms.amplified_accuracy import (
    CONTROLS,
    FEWEST_CONTROLS,
    FORMULAS,
    table_of,
    verdict_of,
)
from hooked_vlm.experiments.dual_mechanisms.order_reading import probe_regions, whole_pictures
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import SEEDS, projected_all
from hooked_vlm.experiments.loop import once, over_batches, scope, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.datasets import whatsup
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ABOUT = About(
    id="E7",
    name="amplification",
    section="5.4, Table 2",
    title="Does amplified ordering correct wrong answers?",
    claim=(
        "On What'sUp more than half of Gemma-3-4b's and more than 0.30 of Qwen2-VL-7B's wrong "
        "answers are corrected; on COCO-spatial accuracy rises from 0.53 to 0.72 (random "
        "directions 0.57) for Gemma-3-4b and from 0.60 to 0.82 (random 0.65) for Qwen2-VL-2B."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Strengths(common.Config):
    """The strengths of amplification, and the number of random directions as controls.

    Raises `DataError` unless strengths are different numbers, with 0 first: what is changed by a
    strength is the accuracy without amplification.
    """

    ranges: ClassVar = {"controls": (0, 1000)}

    alphas: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0)
    """Strengths of the directions and of the random ones: the best of few is seldom as good."""
    controls: int = FEWEST_CONTROLS
    """Seeds of the random directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or self.alphas[0] != 0 or len(set(self.alphas)) < len(self.alphas):
            given = ", ".join(f"{alpha:g}" for alpha in self.alphas)
            raise DataError(
                f"Option alphas={shown(given)} was given; expected different strengths, first 0 "
                "(no amplification, which all others are compared with), as in alphas=0,4,8."
            )


@dataclass(frozen=True, kw_only=True)
class Config(Strengths):
    """`items` questions of each direction (0: all), none of whose pictures the probe has seen."""

    ranges: ClassVar = {**Strengths.ranges, "items": (0, 10**6)}
    reads_cells = False  # of the pictures that are asked about: probes are fitted to rows

    setting: str = "objects-photos"
    items: int = 24


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Asks a sample of the setting's questions at every strength of every kind of direction."""
    setting = Setting(model, data, config.batch_size)
    plans = {axis: Plan.of(setting, axis, config, SEEDS) for axis in setting.axes}
    asked = [question for plan in plans.values() for question in plan.asked]

    def score(axis: str, batch: list[Question], _: OnProgress) -> dict[str, Any]:
        plan = plans[axis]
        each = [outcomes(setting, plan, batch, config)]
        for other in plan.by_other_probes():
            each.append(outcomes(setting, other, batch, config, FORMULAS))
        return {"right": each, "named": _named(setting, batch)}

    by_axis = over_batches(
        "outcomes",
        {axis: plan.asked for axis, plan in plans.items()},
        config.batch_size,
        score,
        on_progress,
        last=True,
    )
    scores = [one for own in by_axis.values() for one in own]
    found, kinds = ([one[what] for one in scores] for what in ("right", "named"))
    by_probe = [joined([each[probe] for each in found]) for probe in range(SEEDS)]
    whole = answered_throughout(by_probe)
    asked = [asked[i] for i in np.flatnonzero(whole)]
    right, *again = ({k: v[..., whole] > 0 for k, v in own.items()} for own in by_probe)
    pictures = [picture_of(q) for q in asked]
    named_ = np.concatenate(kinds)[whole]
    table = table_of(right, pictures, config.alphas, config.seed, named_, again)
    missing = [said for plan in plans.values() for said in plan.left_out]
    missing += left_out(int((~whole).sum()), "question")
    return Result(
        **vars(ABOUT),
        table=table,
        images={"a question's picture": setting.picture(asked[0])},
        verdict="\n".join([verdict_of(table), *missing]),
        config={"items": len(asked), "seed": config.seed, "controls": config.controls},
        notes=(
            "Directions are the class weights of E3's probe, one for each axis, fitted to the "
            "pictures of half of the setting's triples; questions are about the other half's. They "
            "are amplified at slot 0, in all image tokens.",
            "'released' is the formula that the paper's experiment ran; 'orthonormal' the same "
            "over centred, orthonormal directions. 'written' is h + alpha w; the paper does not "
            "specify w, so the probe's first and last class are both reported; neither depends "
            "on the question.",
            "'corrected' is a share of the answers that were wrong at alpha 0, 'broken' of those "
            "that were correct (Wilson intervals over pictures), 'corrected, order' of those that "
            "named the other end; 'net' is the change in accuracy (bootstrap over pictures, each "
            "with its two questions). Random directions are random rotations of the directions, "
            f"for {config.controls} seeds, at the same strengths: with the same norms and angles, "
            "in addition with the same projection energy on the image tokens, orthonormal ones, "
            "and single ones for 'written'; a picture counts by its mean over seeds.",
            "'held-out alpha': chosen for accuracy on half of the pictures, reported on the other "
            "half, for both halves. 'best alpha': chosen on the reported items, as published.",
            "The verdict compares each formula with its own random directions, picture by picture "
            "at the held-out alpha ('real - random'), and by its rank among them ('p, random'); "
            "p-values are adjusted (Holm) over the formulas. It "
            f"says how many of {SEEDS} probes with other initialisations give the same outcome, "
            "each compared with the same random directions. "
            "Amplified order can only repair answers that name the other end.",
            *of_rows(data),
            *stand_in(config.setting),
        ),
    )


run = of_config(run_on)


def of_rows(data: StimulusSet) -> tuple[str, ...]:
    """Returns a note on the probe's pictures where questions are about scattered objects."""
    if not data.is_scattered:
        return ()
    return ("The probe is fitted to rows and columns; questions are about scattered objects.",)


def stand_in(setting: str) -> tuple[str, ...]:
    """Returns a note on the stimuli, unless they are the paper's."""
    if setting in whatsup.SETTINGS:
        return ()
    return (
        f"The paper amplifies on photographs, What'sUp (v1) and COCO-spatial (v2), of which you "
        f"need a copy; {setting!r} stands in for them. For the paper's own: --setting "
        f"{whatsup.SETTINGS[0]} --data FOLDER, and the experiment coco-amplification.",
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """The questions of one axis, and the directions along which tokens are moved."""

    asked: Sequence[Question]
    directions: Float[Tensor, "class d_model"]
    controls: Mapping[str, Float[Tensor, "seed class d_model"]]
    region: Region
    others: Sequence[Float[Tensor, "class d_model"]] = ()
    """The directions of probes with other initialisations."""
    left_out: Sequence[str] = ()
    """A sentence on pictures that no probe is fitted to, if their tokens are not numbers."""

    @classmethod
    def of(cls, setting: Setting, axis: str, config: Config, n_probes: int = 1) -> "Plan":
        """Returns a seeded plan: half of the triples for the probe, the others to ask about."""
        directions = [d for d in setting.directions if axis == AXIS_OF[d]]
        triples = [q.entities for q in setting.stimuli.items(directions[:1])]
        random.Random(f"{config.seed}/{axis}").shuffle(triples)
        half = len(triples) // 2
        seen = [Question(triple, directions[0]) for triple in triples[:half]]
        left = triples[half:][: config.items or None]
        asked = [Question(triple, d) for d in directions for triple in left]
        with scope(axis):
            (fitted, *others), tokens = fit_directions(
                setting.in_rows(), seen, config.seed, n_probes
            )
        wrong = len(seen) - len(tokens)
        seeds = range(config.seed, config.seed + config.controls)
        rows, cols = setting.geometry.shape
        return cls(
            asked,
            fitted,
            matched_controls(fitted, tokens, seeds),
            Region.rectangle(setting.geometry.shape, rows=(0, rows), cols=(0, cols), name="image"),
            others,
            left_out(wrong, "picture", f"{setting.stimuli.name}, {axis}, of the probe", "tokens"),
        )

    def by_other_probes(self) -> list["Plan"]:
        """Returns the plan with the directions of each other probe, without controls."""
        return [replace(self, directions=own, controls={}) for own in self.others]

    def conditions(self, config: Config) -> dict["Condition", Steer]:
        """Returns the intervention of every condition."""
        return conditions(self.directions, self.controls, self.region, config)


Condition = tuple[str, int, float]
"""(kind, seed, alpha)"""


def conditions(
    w: Float[Tensor, "class d_model"],
    controls: Mapping[str, Float[Tensor, "seed class d_model"]],
    region: Any,
    config: Strengths,
) -> dict[Condition, Steer]:
    """Returns every formula at every strength, and every control at its own strengths.

    `region` is a place, or a list with one for each prompt.
    """
    real = {
        "written, first": (w[0], "add"),
        "written, last": (w[-1], "add"),
        "released": (w, "project"),
        "orthonormal": (orthonormalise(w), "project"),
    }
    made = {
        (kind, 0, alpha): Steer(0, at=region, directions=rows, alpha=alpha, mode=mode)
        for kind, (rows, mode) in real.items()
        for alpha in config.alphas
    }
    for kind, seeds in controls.items():
        mode = "add" if kind == "random, written" else "project"
        for seed, rows in enumerate(seeds):
            for alpha in config.alphas:
                made[kind, seed, alpha] = Steer(
                    0, at=region, directions=rows, alpha=alpha, mode=mode
                )
    return made


def matched_controls(
    fitted: Float[Tensor, "class d_model"], tokens: Float[Tensor, "*batch d_model"], seeds: range
) -> dict[str, Float[Tensor, "seed class d_model"]]:
    """Returns random directions for each formula: see `CONTROLS`."""
    if not seeds:
        return {}
    norms = random_controls(fitted, seeds)
    energy = random_controls(fitted, seeds, match_energy_on=tokens)
    orthonormal = torch.stack([orthonormalise(rows) for rows in norms])
    written = torch.stack([rows[:1] for rows in norms])
    return dict(zip(CONTROLS, (norms, energy, orthonormal, written), strict=True))


def fit_directions(
    setting: Setting, questions: Sequence[Question], seed: int, n_probes: int = 1
) -> tuple[list[Float[Tensor, "class d_model"]], Float[Tensor, "image token d_model"]]:
    """Returns the class weights of ordering probes of one axis, and the tokens of their fit.

    Pictures whose tokens are not numbers are left out.  Raises `CannotRunError` where all are.
    """
    axis = questions[0].axis
    features = projected_all(setting, {axis: questions})[axis]
    features = features[torch.from_numpy(whole_pictures(features))]
    if not len(features):
        raise none_left("picture")
    examples = object_examples(features, probe_regions(setting.geometry, axis))

    def fit() -> list[Tensor]:
        probes = [
            LinearProbe(seed=own).fit(examples.X, examples.y)
            for own in range(seed, seed + n_probes)
        ]
        return [stack(class_directions(probe)) for probe in probes]

    return once("directions", fit), features


def outcomes(
    setting: Setting,
    plan: Plan,
    batch: Sequence[Question],
    config: Config,
    kinds: Sequence[str] = (*FORMULAS, *CONTROLS),
) -> dict[str, Float[np.ndarray, "seed alpha item"]]:
    """Returns 1 for correct answers and 0 for others, for every kind, seed and strength.

    It is NaN where logits are not numbers.
    """
    made = {key: steer for key, steer in plan.conditions(config).items() if key[0] in kinds}
    targets = [normalise(question.target) for question in batch]
    return answered(setting.model, setting.inputs(batch), targets, made)


def answered(
    model: Any, inputs: Inputs, targets: Sequence[str], made: Mapping[Condition, Steer]
) -> dict[str, Float[np.ndarray, "seed alpha item"]]:
    """Returns 1 where a row's top answer is its target and else 0, under every condition.

    It is NaN where logits are not numbers.
    """

    def is_right(logits: Tensor) -> Tensor:
        answers = top_answer(logits, model.tokenizer)
        right = [float(a == t) for a, t in zip(answers, targets, strict=True)]
        return torch.tensor(right)

    def metric(logits: Tensor) -> Tensor:
        return scored_numbers(is_right, final_logits(logits))

    keys = list(made)
    sweep = Sweep(
        inputs, {"condition": range(len(keys))}, make=lambda condition: made[keys[condition]]
    )
    scores = sweep.run(model, metric, dims=("item",), logits_to_keep=1).values
    found = {}
    for kind in dict.fromkeys(kind for kind, _, _ in keys):
        rows = [score for key, score in zip(keys, scores, strict=True) if key[0] == kind]
        n_seeds = len({seed for k, seed, _ in keys if k == kind})
        found[kind] = np.stack(rows).reshape(n_seeds, -1, len(targets))
    return found


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the answers of several batches, each by kind, as one."""
    return {kind: np.concatenate([part[kind] for part in parts], axis=-1) for kind in parts[0]}


def answered_throughout(found: Sequence[Mapping[str, np.ndarray]]) -> Bool[np.ndarray, " item"]:
    """Returns which items have answers that are numbers under every condition.

    Raises `CannotRunError` where none has.
    """
    every = [np.isfinite(values).all((0, 1)) for own in found for values in own.values()]
    whole = np.all(every, axis=0)
    if not whole.any():
        raise none_left("question", "use smaller strengths")
    return whole


def _named(setting: Setting, batch: Sequence[Question]) -> np.ndarray:
    """Returns what answers name; of logits that are not numbers any, since these are left out."""
    logits = setting.logits(batch)
    logits = logits.masked_fill(without_numbers(logits)[:, None], 0.0)
    return named(logits, setting.model.tokenizer, batch)
