"""Sweeps of every kind, and a growing batch compared with plain passes."""

import re
from typing import Any

import torch

from helpers.tiny_models import make_inputs
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.run import run_plain
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep


BOUND = 5e-6
"""Of the largest logit: what another order of the same sums may change in fp32."""


def grid_side(family: str) -> int:
    return 6 if family == "llava" else 3


def make_region(family: str) -> Region:
    n = grid_side(family)
    return Region.column_band((n, n), 0, 1)


def make(family: str, kind: str, site: Any, batch: int) -> Any:
    source, n = make_inputs(family, batch, seed=2), grid_side(family)
    left, right = Region.column_band((n, n), 0, 1), Region.column_band((n, n), n - 1, n)
    if kind != "zero" and isinstance(site, str) and re.search("hook_[zqv]$", site):
        kind = "zero" if kind == "steer" else kind
    return {
        "clean": lambda: None,
        "swap": lambda: Patch(site, at=swap_pairs(left, right), source=source),
        "last": lambda: Patch(site, at=LastToken(), source=source),
        "all": lambda: Patch(site, source=source),
        "zero": lambda: Ablate(site, at=left),
        "steer": lambda: Steer(site, at=right, directions=torch.ones(48), alpha=2.0),
        "chain": lambda: Chain(
            Ablate(0, at=left), Patch(site, at=LastToken(), source=source), Ablate(2, at=right)
        ),
    }[kind]()


def sweep_of(family: str, kinds: list[str], sites: list[Any], batch: int = 2) -> Sweep:
    return Sweep(
        make_inputs(family, batch, seed=1),
        {"kind": kinds, "site": sites},
        make=lambda kind, site: make(family, kind, site, batch),
    )


def compared(model: HookedVLM, sweep: Sweep, bound: float = BOUND, **kwargs: Any) -> Any:
    """Checks every cell's logits against plain passes, and returns how they were made."""
    cells = sweep.recorded(model)
    plain = run_plain(model, sweep.inputs, cells, lambda x: x, None, kwargs)
    grown, report = run_growing(model, sweep.inputs, cells, lambda x: x, None, kwargs)
    largest = max(float(x.abs().max()) for x in plain)
    for one, other in zip(grown, plain, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= bound * largest
    return report
