"""All simulated experiments: what is null in each, and a planted effect that it must find."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import binom

from helpers import simulated, simulated_own, simulated_probes
from helpers.simulated import SHAPES, Rng


SIZES = (2, 8, 20, 50)
"""Numbers of pictures (in each direction, or on each axis)."""


@dataclass(frozen=True)
class Case:
    """One experiment and one way in which there is no effect."""

    claims: Callable[[Rng, str, int, float], bool]
    """(rng, shape, n, effect) -> whether the verdict claims an effect in any sentence"""
    null: str
    planted: str
    """What is planted, in words, with its size."""
    effect: float
    """The size of a planted effect that is found with 50 pictures."""
    quick: int = 3
    """Draws of each shape in the quick test."""


CASES = {
    "E2": Case(simulated.e2, "the three answers alike", "clean over others, 0.8", 0.8),
    "E3, objects": Case(simulated_probes.e3, "probes at 1/3", "accuracy 1/3 + 0.4", 0.4, quick=1),
    "E3, background": Case(
        simulated_probes.e3_background, "one object alone gives as much", "three - one, 0.5", 0.5
    ),
    "E4": Case(
        simulated.e4, "strips and objects at 1/2", "strips and objects 1/2 ± 0.4", 0.4, quick=1
    ),
    "E5": Case(simulated.e5, "right end in 1/2", "right end in 1/2 + 0.35", 0.35),
    "E6": Case(simulated.e6, "objects at 1/2", "objects 1/2 + 0.45 at two slots", 0.45),
    "E7, R2": Case(
        simulated.e7, "no directions change anything", "0.8 of wrong answers corrected", 0.8, 1
    ),
    "E7, R2, against random": Case(
        partial(simulated.e7, random=0.3),
        "random directions correct as much",
        "0.8 of wrong answers corrected, 0.3 by random ones",
        0.8,
        1,
    ),
    "E8": Case(simulated_probes.e8, "probes at 1/k", "accuracy 1/k + 0.4", 0.4),
    "E9, Q4, background": Case(simulated.background_shift, "no shift", "shift of 0.45", 0.45),
    "E9, Q4, swaps": Case(simulated.compared_swaps, "no change", "change of 0.45", 0.45),
    "Q1": Case(simulated_probes.q1, "no strength helps", "0.9 of wrong answers corrected", 0.9),
    "Q5, reading": Case(
        simulated_probes.q5_reading, "probes at chance", "chance + 0.33", 0.33, quick=1
    ),
    "Q5, swaps": Case(simulated.q5_swaps, "swaps at 1/2", "swaps 1/2 ± 0.45", 0.45),
    "Q6, interaction": Case(
        simulated_probes.q6, "two signals add up", "interaction of -3 in log odds", 1.0, quick=1
    ),
    "Q6, signals": Case(
        simulated_probes.q6_none, "no signal is needed", "interaction of -4 in log odds", 1.0, 1
    ),
    "Q7": Case(
        simulated_probes.q7, "relative and absolute alike", "relative 1/2 + 0.45", 0.45, quick=1
    ),
    "Q8": Case(simulated_probes.q8, "cuts do nothing", "cuts lower the share by 0.5", 0.5),
    "E2, own data": Case(
        simulated_own.e2, "both answers alike", "the counterfactual's over clean, 0.8", 0.8, 1
    ),
    "E4, own data": Case(simulated_own.e4, "all regions at 1/2", "boxes 1/2 + 0.45", 0.45, quick=1),
    "D1": Case(simulated_own.d1, "no region is needed", "boxes lower the share by 0.45", 0.45, 1),
}
LIMIT = 0.05
"""The largest share of draws without an effect in which a verdict may claim one."""


def claimed(name: str, shape: str, n: int, effect: float, draws: int) -> int:
    """Returns in how many draws the verdict claims an effect, from one seed."""
    rng = np.random.default_rng([n, SHAPES.index(shape)])
    return sum(CASES[name].claims(rng, shape, n, effect) for _ in range(draws))


def most(draws: int) -> int:
    """Returns the most claims of so many draws that chance gives at a rate of `LIMIT`.

    More come by chance in one case of a thousand.
    """
    return int(binom.ppf(0.999, draws, LIMIT))
