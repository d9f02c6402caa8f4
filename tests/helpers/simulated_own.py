"""Scores of experiments on own data, drawn at random, through the experiment's rows and verdict.

Every pair is there twice, as a table has it in which both pictures have a row: what is counted
must be observations.  As in `simulated`, with an effect of 0 every claim is false.
"""

import re

import numpy as np
import xarray as xr

from helpers.simulated import Rng, centred
from hooked_vlm.experiments.batches import OBSERVATION
from hooked_vlm.experiments.dual_mechanisms import strip_swap
from hooked_vlm.experiments.own import box_ablation, transfer
from hooked_vlm.experiments.own.setting import ANYWHERE, AS_MANY, OTHERS, control_of


COMPARED = (ANYWHERE, "box cup")
STATED = (ANYWHERE, OTHERS, AS_MANY, "box cup")
KINDS = (*STATED, control_of("box cup"))
EVERY = "all questions"


def scores(
    values: np.ndarray, kinds: tuple[str, ...], quantities: tuple[str, ...]
) -> dict[str, xr.DataArray]:
    """Returns values `[observation, kind, slot, quantity]`, each observation as two pairs."""
    names = [str(i) for i in range(len(values))] * 2
    made = xr.DataArray(
        np.concatenate([values, values]).clip(0, 1),
        dims=("pair", "kind", "slot", "quantity"),
        coords={
            "pair": names,
            OBSERVATION: ("pair", names),
            "kind": list(kinds),
            "slot": list(range(values.shape[2])),
            "quantity": list(quantities),
        },
    )
    return {EVERY: made}


def of_kinds(rng: Rng, shape: str, n: int, effect: float) -> np.ndarray:
    """Values `[observation, kind, slot]` around 1/2; boxes are above by the effect."""
    made = 0.5 + centred(rng, shape, n, 3 * len(KINDS)).reshape(n, len(KINDS), 3)
    made[:, [KINDS.index(kind) for kind in COMPARED]] += effect
    return made


def e2(rng: Rng, shape: str, n: int, effect: float) -> bool:
    quantities = strip_swap.QUANTITIES
    half = centred(rng, shape, n, 5).reshape(n, 1, 5)
    values = np.full((n, 1, 5, len(quantities)), 0.5)
    values[..., quantities.index("swapped")] = 0.5 + half / 2 + effect / 2
    values[..., quantities.index("clean")] = 0.5 - half / 2 - effect / 2
    table = transfer._table(scores(values, (transfer.FINAL,), quantities), 4, 0, [transfer.FINAL])
    return not transfer._stages(table).startswith("Answer by slot: slots 0-4 undecided")


def e4(rng: Rng, shape: str, n: int, effect: float) -> bool:
    quantities = strip_swap.QUANTITIES
    values = np.repeat(of_kinds(rng, shape, n, effect)[..., None], len(quantities), -1)
    table = transfer._table(scores(values, KINDS, quantities), 2, 0, STATED, COMPARED)
    said = transfer._flips(table, STATED, COMPARED)
    return bool(re.search(r" (yes|no), \d|(boxes|cup) (more|less) than", said, re.IGNORECASE))


def d1(rng: Rng, shape: str, n: int, effect: float) -> bool:
    whole = np.full((n, 1, 3), 0.5)
    values = np.concatenate([1 - of_kinds(rng, shape, n, effect), whole], axis=1)
    values = np.repeat(values[..., None], len(box_ablation.QUANTITIES), -1)
    made = scores(values, (*KINDS, "none"), box_ablation.QUANTITIES)
    compared = [(kind, control_of(kind)) for kind in COMPARED]
    table = box_ablation._table(made, 2, 0, STATED, compared)
    return bool(
        re.search(r"fall( of the [\w' ]+)? at slot", box_ablation._verdict(table, STATED, compared))
    )
