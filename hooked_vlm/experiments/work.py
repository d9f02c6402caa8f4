"""How much there is to compute in each experiment: prompts, pictures and cells.

The counts follow from the options and the setting alone, for a model that answers every question
correctly: a pair that is answered wrongly is replaced by another, which costs its two passes more.
Pictures are counted once in an experiment, since inside `shared_runs` each is encoded once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil, perm
from typing import Any, Literal

from hooked_vlm.experiments.dual_mechanisms.amplified_accuracy import FORMULAS
from hooked_vlm.experiments.dual_mechanisms.order_removal import REMOVALS
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import REFERENCES
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import SEEDS
from hooked_vlm.experiments.further.composite_artefacts import VARIANTS
from hooked_vlm.experiments.further.encoder_cuts import CUTS
from hooked_vlm.experiments.further.encoder_depth import KINDS as SWAPS
from hooked_vlm.experiments.further.encoder_depth import LOOKED_AT
from hooked_vlm.experiments.further.photographs import GROUNDS
from hooked_vlm.experiments.options import Config, common_at
from hooked_vlm.experiments.setting import stimuli_of
from hooked_vlm.stimuli.pairs import final_token_pair, sample_tuples, swap_pair
from hooked_vlm.stimuli.sets import StimulusSet


Kind = Literal[
    "pass",
    "picture",
    "final token",
    "regions",
    "regions, order removed",
    "first slot",
    "encoder sites",
]
"""Kinds of work.  "pass": a prompt through the language model; "picture": one through the encoder
and the projector.  The others are sweeps of a pair: over all slots at the final token; over all
slots and some kinds of regions, with a source (the same under the removal of vision's order); at
slot 0 with some strengths; and over the encoder's sites and some kinds of regions."""


@dataclass(frozen=True)
class Work:
    """So many prompts, pairs or pictures of one kind of work."""

    kind: Kind
    n: int
    cells: int = 1
    """Of a sweep: kinds of regions, or strengths."""
    groups: int = 0
    """Axes or directions, whose batches are apart: each batch is a part.  0: no parts, such as the
    choice of pairs, which comes before them."""

    def batches(self, size: int) -> int:
        """Returns the number of its parts."""
        return self.groups * ceil(self.n / max(self.groups, 1) / size)


@dataclass(frozen=True)
class Depth:
    """What of a model the amount of work depends on."""

    encoder_layers: int
    region_kinds: int
    """Kinds of regions that a swap has: three, or four where strips and objects do not align."""


Count = Callable[[Config, Depth], list[Work]]


def work_of(name: str, config: Config, depth: Depth) -> list[Work] | None:
    """Returns the work of an experiment, or None for one whose work is not known."""
    count = _COUNTS.get(name)
    return None if count is None else [work for work in count(config, depth) if work.n]


def _items(stimuli: StimulusSet) -> int:
    """Returns the number of questions of a direction."""
    return perm(len(stimuli.names), 2 if stimuli.middle else 3)


def _pictures(stimuli: StimulusSet) -> int:
    """Returns the number of pictures: two directions of an axis share theirs."""
    return _items(stimuli) * len(stimuli.axes)


def _drawn(stimuli: StimulusSet, make: Any, k: int, config: Config) -> tuple[int, int, int]:
    """Returns the numbers of pairs, of their questions and of their pictures."""
    k -= stimuli.middle is not None
    directions: Any = stimuli.directions
    most = min(config.pairs, perm(len(stimuli.names), k))
    drawn = sample_tuples(stimuli.names, k, most, config.seed, directions=directions)
    pairs = [make(d, stimuli.with_middle(t)) for d, found in drawn.items() for t in found]
    questions = {question for pair in pairs for question in pair.questions}
    shown = {(question.axis, question.entities) for question in questions}
    return len(pairs), len(questions), len(shown)


def _behaviour(config: Any, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    n = _sampled(stimuli, config.items) * len(stimuli.directions)
    return [Work("pass", n, groups=1), Work("picture", min(n, _pictures(stimuli)))]


def _final_token(config: Config, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    pairs, questions, pictures = _drawn(stimuli, final_token_pair, 5, config)
    sweeps = Work("final token", pairs, groups=len(stimuli.axes))
    return [*_chosen(questions, pictures), sweeps]


def _chosen(questions: int, pictures: int) -> list[Work]:
    """Returns the work of choosing pairs."""
    return [
        Work("pass", questions),
        Work("picture", pictures),
    ]


def _probes(config: Config, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    held_out = ceil(_pictures(stimuli) / 4)  # a quarter, shown with one object too
    alone = len(stimuli.names) * len(stimuli.axes)
    axes = len(stimuli.axes)
    return [
        Work("picture", _pictures(stimuli), groups=axes),
        Work("picture", min(held_out, alone), groups=axes),
    ]


def _swaps_of(stimuli: StimulusSet, config: Config, depth: Depth) -> list[Work]:
    pairs, questions, pictures = _drawn(stimuli, swap_pair, 3, config)
    sweeps = Work("regions", pairs, depth.region_kinds, len(stimuli.axes))
    return [*_chosen(questions, pictures), sweeps]


def _strip_swap(config: Config, depth: Depth) -> list[Work]:
    return _swaps_of(stimuli_of(config), config, depth)


def _sampled(stimuli: StimulusSet, n: int) -> int:
    """Returns the number of questions of a direction in a sample of `n` (0: all)."""
    return min(n, _items(stimuli)) if n else _items(stimuli)


def _references(stimuli: StimulusSet, places: int = 1) -> int:
    """Returns the number of pictures with one object or none, that a removal reads."""
    return (len(stimuli.names) * places + 1) * len(stimuli.axes)


def _ablation(config: Any, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    names, directions = len(stimuli.names), len(stimuli.directions)
    n = _sampled(stimuli, config.items) * directions
    return [
        Work("pass", names * min(REFERENCES, names - 1) * directions),
        Work("picture", min(n, _pictures(stimuli))),
        Work("picture", _references(stimuli, places=3)),
        Work("first slot", n, len(REMOVALS) - 2, directions),  # two change nothing
    ]


def _swap_under_ablation(config: Config, depth: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    pairs, questions, pictures = _drawn(stimuli, swap_pair, 3, config)
    return [
        *_chosen(questions, pictures),
        Work("picture", _references(stimuli)),
        Work("pass", pairs),  # the sources
        Work("regions, order removed", pairs, depth.region_kinds, len(stimuli.axes)),
    ]


def _amplification(config: Any, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    half = _items(stimuli) // 2
    left = min(config.items or half, _items(stimuli) - half)
    n, alphas = left * len(stimuli.directions), len(config.alphas) - 1
    kinds = len(FORMULAS) * (SEEDS + config.controls)
    return [
        Work("picture", half * len(stimuli.axes)),
        Work("picture", left * len(stimuli.axes)),
        Work("pass", n),
        Work("first slot", n, kinds * alphas, len(stimuli.axes)),
    ]


def _transfer(config: Any, _: Depth) -> list[Work]:
    found: list[Work] = []
    for setting in config.settings:
        own = stimuli_of(common_at(config, setting))
        half = _items(own) // 2
        left = min(config.items or half, _items(own) - half)
        n = left * len(own.directions)
        found += [
            Work("picture", (half + left) * len(own.axes)),
            *[Work("first slot", n, len(config.alphas) - 1, len(own.axes))] * len(config.settings),
        ]
    return found


def _grids(config: Any, _: Depth) -> list[Work]:
    return [Work("picture", config.images, groups=1) for _k in config.ks]


def _photographs(config: Config, depth: Depth) -> list[Work]:
    grounds = [common_at(config, config.setting + ending) for ending in GROUNDS.values()]
    return [w for own in grounds for part in (_probes, _strip_swap) for w in part(own, depth)]


def _composites(config: Config, depth: Depth) -> list[Work]:
    stimuli = replace(stimuli_of(config), directions=("left", "right"))
    own = [
        Work("picture", _pictures(stimuli), groups=1),
        Work("picture", len(stimuli.names), groups=1),
        *_swaps_of(stimuli, config, depth),
    ]
    return own * len(VARIANTS)


def _encoder_depth(config: Any, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    pairs, questions, pictures = _drawn(stimuli, swap_pair, 3, config)
    images = _sampled(stimuli, config.images) * len(stimuli.axes)
    return [
        *_chosen(questions, pictures),
        Work("picture", images, groups=len(stimuli.axes)),
        Work("picture", LOOKED_AT * len(stimuli.axes)),
        Work("encoder sites", pairs, len(SWAPS), len(stimuli.directions)),
    ]


def _redundancy(config: Any, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    n = _sampled(stimuli, config.items) * len(stimuli.directions)
    return [
        Work("picture", min(n, _pictures(stimuli))),
        Work("picture", _references(stimuli)),
        *[Work("pass", n, groups=len(stimuli.directions))] * 4,
    ]


def _absolute(config: Any, _: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    images = _sampled(stimuli, config.images)
    held_out, axes = ceil(images / 2), len(stimuli.axes)
    alone = 5 * len(stimuli.names)  # of three objects at two edges, about five are out of place
    shown = 3 * held_out + alone
    found = [Work("picture", images * axes, groups=axes)]
    return found + [Work("picture", shown * axes, groups=axes) for _gap in config.gaps]


def _why_strips(config: Any, depth: Depth) -> list[Work]:
    stimuli = stimuli_of(config)
    images, axes = _sampled(stimuli, config.images), len(stimuli.axes)
    layers = 1 + (depth.encoder_layers if config.by != "none" else 0)
    cuts = len(CUTS) * (1 + config.random_cuts) * layers
    cut = Work("picture", ceil(images / 2) * axes, groups=axes)
    return [Work("picture", images * axes, groups=axes), *[cut] * cuts]


_COUNTS: dict[str, Count] = {
    "behaviour": _behaviour,
    "final-token": _final_token,
    "ordering-probes": _probes,
    "strip-swap": _strip_swap,
    "ordering-ablation": _ablation,
    "swap-under-ablation": _swap_under_ablation,
    "amplification": _amplification,
    "grid-probes": _grids,
    "photographs": _photographs,
    "alpha-transfer": _transfer,
    "composite-artefacts": _composites,
    "encoder-depth": _encoder_depth,
    "redundancy": _redundancy,
    "absolute-or-relative": _absolute,
    "why-strips": _why_strips,
}


def totals(work: Iterable[Work], size: int) -> int:
    """Returns the number of parts: batches that can be computed apart."""
    return sum(each.batches(size) for each in work)
