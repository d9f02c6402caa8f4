"""The experiments by name, and the suites that group them.

The command line, the reports and the tests know experiments from here alone.  An
experiment is a function of a model, a configuration and a callback that it tells how far
it is; everything else here is words for a reader.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.experiments import (
    behaviour,
    final_token,
    ordering_probes,
    strip_swap,
)
from hooked_vlm.experiments.config import Config as Config
from hooked_vlm.experiments.config import OnProgress as OnProgress
from hooked_vlm.experiments.result import Result


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One claim of the paper, or one question that it leaves open, as something that runs."""

    id: str
    name: str
    title: str
    section: str
    claim: str
    run: Callable[[Any, Any, OnProgress], Result]
    """`run(model, config, on_progress)`, with a `HookedVLM` as its model."""
    config: type[Config]
    """What `run` takes; its defaults are the paper's."""


def _experiment(module: Any) -> Experiment:
    return Experiment(
        id=module.ID,
        name=module.NAME,
        title=module.TITLE,
        section=module.SECTION,
        claim=module.CLAIM,
        run=module.run,
        config=module.Config,
    )


MODULES = (
    behaviour,
    final_token,
    ordering_probes,
    strip_swap,
)
EXPERIMENTS: dict[str, Experiment] = {module.NAME: _experiment(module) for module in MODULES}
SUITES: dict[str, tuple[str, ...]] = {
    "dual-mechanisms": ("behaviour", "final-token", "ordering-probes", "strip-swap"),
}


def select(name: str) -> list[Experiment]:
    """Returns the experiments of a suite, or the one of that name or id, in the order to run them.

    Raises `DataError` with the nearest names for a name that is neither.
    """
    if name in SUITES:
        return [EXPERIMENTS[member] for member in SUITES[name]]
    for experiment in EXPERIMENTS.values():
        if name in (experiment.name, experiment.id, experiment.id.lower()):
            return [experiment]
    known = [*SUITES, *EXPERIMENTS]
    raise DataError(
        f"There is no experiment {name!r}.{did_you_mean(name, known)} "
        f"Known are: {', '.join(known)}."
    )
