"""The experiments by name, and the suites that group them.

The command line, the reports and the tests know experiments from here alone.  An
experiment is a function of a model, a configuration and a callback that it tells how far
it is; everything else here is words for a reader.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.experiments import behaviour, final_token, ordering_probes, strip_swap
from hooked_vlm.experiments.config import Config as Config
from hooked_vlm.experiments.config import OnProgress as OnProgress
from hooked_vlm.experiments.result import Result


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One claim of the paper as something that runs."""

    id: str
    name: str
    title: str
    section: str
    run: Callable[[Any, Config, OnProgress], Result]
    """`run(model, config, on_progress)`, with a `HookedVLM` as its model."""


EXPERIMENTS: dict[str, Experiment] = {
    module.NAME: Experiment(
        id=module.ID, name=module.NAME, title=module.TITLE, section=module.SECTION, run=module.run
    )
    for module in (behaviour, final_token, ordering_probes, strip_swap)
}
SUITES: dict[str, tuple[str, ...]] = {
    "dual-mechanisms": ("behaviour", "final-token", "ordering-probes", "strip-swap"),
}


def select(name: str) -> list[Experiment]:
    """Returns the experiments of a suite, or the one of that name, in the order to run them.

    Raises `DataError` with the nearest names for a name that is neither.
    """
    if name in SUITES:
        return [EXPERIMENTS[member] for member in SUITES[name]]
    if name in EXPERIMENTS:
        return [EXPERIMENTS[name]]
    known = [*SUITES, *EXPERIMENTS]
    raise DataError(
        f"There is no experiment {name!r}.{did_you_mean(name, known)} "
        f"Known are: {', '.join(known)}."
    )
