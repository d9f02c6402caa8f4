"""The experiments by name, and the suites that group them.

The command line, the reports and the tests find experiments only here, those of other
distributions too (`register_experiment`).  An experiment is a function of a model, a
configuration and a progress callback; the other fields are text for readers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.experiments.dual_mechanisms import (
    amplification,
    behaviour,
    final_token,
    ordering_ablation,
    ordering_probes,
    strip_swap,
    swap_under_ablation,
)
from hooked_vlm.experiments.extension import Draw, Headlines, verified
from hooked_vlm.experiments.further import (
    absolute_or_relative,
    alpha_transfer,
    coco_amplification,
    coco_spatial,
    composite_artefacts,
    encoder_depth,
    grid_probes,
    photographs,
    redundancy,
    whatsup_pooled,
    why_strips,
)
from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.notes import notes_of, with_notes
from hooked_vlm.experiments.options import Config as Config
from hooked_vlm.experiments.options import OnProgress as OnProgress
from hooked_vlm.experiments.own import box_ablation, probed, transfer
from hooked_vlm.experiments.own.needs import (
    BOXES,
    DRAWN,
    LABELS,
    LISTED,
    PAIRS,
    SINGLE,
    Needs,
)
from hooked_vlm.experiments.own.setting import OwnSetting
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import of_config, stimuli_of
from hooked_vlm.extensions.found import Extensions
from hooked_vlm.extensions.origin import Origin
from hooked_vlm.stimuli.datasets import whatsup
from hooked_vlm.stimuli.own import OwnData
from hooked_vlm.stimuli.settings import (
    INSET,
    OWN,
    SCATTERED,
    SETTINGS,
    added_setting,
    own_data,
    require_known,
)


RunOwn = Callable[[OwnSetting, Any, OnProgress], Result]
"""`run_own(setting, config, on_progress)`, on a user's own data."""


@dataclass(frozen=True, kw_only=True)
class Experiment(About):
    """A runnable experiment on one claim of the paper, or on one question that it leaves open."""

    run: Callable[[Any, Any, OnProgress], Result]
    """`run(model, config, on_progress)`, with a `HookedVLM` as its model."""
    run_on: Callable[..., Result] | None = None
    """`run_on(model, data, config, on_progress)`, on given data: most experiments take a
    `StimulusSet`, those of several settings a dict of them by name, R1 and R2 their list."""
    config: type[Config]
    """The configuration of `run`; its defaults are the paper's."""
    draw: Draw | None = None
    """The function that makes its figures, of an experiment of another distribution."""
    headlines: Headlines = ()
    """Its numbers at the top of a report, of an experiment of another distribution."""
    origin: Origin | None = None
    """Where its code comes from; None: this package."""
    needs: Needs = DRAWN
    """What it needs of a user's own data, with which `run_on` takes an `OwnData`."""


MODULES = (
    behaviour,
    final_token,
    ordering_probes,
    strip_swap,
    ordering_ablation,
    swap_under_ablation,
    amplification,
    grid_probes,
    photographs,
    alpha_transfer,
    composite_artefacts,
    encoder_depth,
    redundancy,
    absolute_or_relative,
    why_strips,
    coco_spatial,
    coco_amplification,
    whatsup_pooled,
    box_ablation,
)
NEED_DATA = (coco_spatial, coco_amplification, whatsup_pooled, box_ablation)
"""Experiments that need a user's copy of What'sUp or COCO-spatial, or a user's own data."""
PAPER = tuple(
    name
    for name in (
        "final-token",
        "ordering-probes",
        "strip-swap",
        "ordering-ablation",
        "swap-under-ablation",
    )
    if name in {module.ABOUT.name for module in MODULES}
)
"""The paper's experiments on each of its synthetic settings."""
TASKS = ("squares", "shapes", "objects")
ON_TASKS = (*PAPER, redundancy.ABOUT.name)
"""The experiments that a reproduction runs on each of the tasks."""
AMPLIFIED_ON = (amplification.Config().setting, "squares-scattered")
"""The settings of E7 in a reproduction; on scattered squares most wrong answers are about order."""


OWN_RUNS: dict[str, tuple[Needs, RunOwn]] = {
    behaviour.ABOUT.name: (Needs(), behaviour.run_in),
    final_token.ABOUT.name: (Needs(PAIRS), transfer.run_final_token),
    ordering_probes.ABOUT.name: (
        Needs(LABELS, further=probed.check_control),
        probed.run_probes,
    ),
    strip_swap.ABOUT.name: (Needs((*PAIRS, *BOXES)), transfer.run_regions),
    amplification.ABOUT.name: (Needs(LABELS, further=probed.pictures_of), probed.run_amplified),
    box_ablation.ABOUT.name: (Needs(BOXES), box_ablation.run_own),
}
"""By name: what an experiment needs of own data, and how it runs on them."""
NEED_SINGLE = (ordering_ablation, swap_under_ablation, redundancy)
"""Experiments that remove order by pictures of single objects."""


def experiment_of(module: Any) -> Experiment:
    """Returns the experiment of a module, whose data is `data_of(config)` or its setting."""
    about, data_of = module.ABOUT, getattr(module, "data_of", None)
    else_ = SINGLE if module in NEED_SINGLE else LISTED if module in NEED_DATA else DRAWN
    needs, run_own = OWN_RUNS.get(about.name, (else_, None))
    run_on = on_own_too(about.id, needs, run_own, with_notes(module.run_on))

    def data_for(config: Any) -> Any:
        return own_data(config.data) if config.setting == OWN else (data_of or stimuli_of)(config)

    run = of_config(run_on, data_for)
    return Experiment(**vars(about), run=run, run_on=run_on, config=module.Config, needs=needs)


def on_own_too(
    id_: str, needs: Needs, run_own: RunOwn | None, run_on: Callable[..., Result]
) -> Callable[..., Result]:
    """Returns `run_on`, which takes an `OwnData` as well where the experiment runs on one.

    It raises `CannotRunError`, in one line, for data that lack what the experiment needs.
    """

    @wraps(run_on)
    def run(model: Any, data: Any, config: Any, on_progress: OnProgress = silent) -> Result:
        if not isinstance(data, OwnData):
            return run_on(model, data, config, on_progress)
        needs.check(id_, data)
        setting = OwnSetting(
            model, data, config.batch_size, leave_out=config.leave_out_long_answers
        )
        found = (run_own or run_on)(setting, config, on_progress)
        return replace(found, setting=OWN, notes=(*found.notes, *setting.notes))

    return run


def check_own(experiment: Experiment, config: Config) -> None:
    """Raises `DataError` for own data with problems, or without what an experiment needs."""
    if config.setting == OWN:
        experiment.needs.check(experiment.id, own_data(config.data))


EXPERIMENTS: dict[str, Experiment] = {
    module.ABOUT.name: experiment_of(module) for module in MODULES
}
SUITES: dict[str, tuple[str, ...]] = {
    "dual-mechanisms": ("behaviour", "final-token", "ordering-probes", "strip-swap"),
    "reproduce": (
        *(f"behaviour:{setting}" for setting in (*SETTINGS, *SCATTERED) if setting != INSET),
        *(f"{name}:{setting}" for name in ON_TASKS for setting in TASKS),
        *(f"amplification:{setting}" for setting in AMPLIFIED_ON),
        *(
            m.ABOUT.name
            for m in MODULES
            if m.ABOUT.name not in ("behaviour", "amplification", *ON_TASKS) and m not in NEED_DATA
        ),
    ),
    "whatsup": (
        whatsup_pooled.ABOUT.name,
        *(
            f"{name}:{setting}"
            for name in (
                "behaviour",
                "final-token",
                "ordering-probes",
                "strip-swap",
                "amplification",
            )
            for setting in whatsup.SETTINGS
        ),
    ),
}
"""Lists of experiments; a fixed setting follows after a colon."""


@dataclass(frozen=True)
class Step:
    """An experiment on a setting."""

    experiment: Experiment
    setting: str

    @property
    def name(self) -> str:
        """Its name in a record: `"strip-swap on shapes"`."""
        return f"{self.experiment.name} on {self.setting}"

    @property
    def key(self) -> str:
        """The `Result.key` of its result."""
        return f"{self.experiment.name}-{self.setting}"


def steps(name: str, setting: str | None = None) -> list[Step]:
    """Returns the steps of a suite, or of the experiment with this name or id, in order.

    The setting is the suite's, else `setting`, else the experiment's default.  In a suite,
    experiments that do not run on `setting` keep their default.

    Raises `DataError` for an unknown name, and for a setting on which nothing runs.
    """
    if setting is not None and name in SUITES:
        require_known(setting)
    found = []
    for member in SUITES.get(name, (name,)):
        experiment_name, _, fixed = member.partition(":")
        experiment = select(experiment_name)
        if setting is not None and name not in SUITES:
            if setting == OWN:
                experiment.needs.check_possible(experiment.id)
            experiment.config.require_taken(setting)
        chosen = setting if setting and experiment.config.takes(setting) else None
        found.append(Step(experiment, fixed or chosen or experiment.config().setting))
    return found


def takes_own(name: str) -> bool:
    """Returns whether a folder of own data is meant for an experiment, or for a suite.

    It is not for suites of fixed settings, and not where the data are a list of another form.
    """
    if name in SUITES:
        return not any(":" in member for member in SUITES[name])
    return select(name).needs is not LISTED


def select(name: str) -> Experiment:
    """Returns the experiment with a name or id; those of other distributions have a name alone.

    Raises `DataError` with the nearest names for an unknown name, and for an experiment of another
    distribution that cannot be used.
    """
    for experiment in EXPERIMENTS.values():
        if name in (experiment.name, experiment.id, experiment.id.lower()):
            return experiment
    if (own := EXTENSIONS.get(name)) is not None:
        return own
    known = [*SUITES, *EXPERIMENTS, *EXTENSIONS.names()]
    raise DataError(
        f"There is no experiment {name!r}.{did_you_mean(name, known)} "
        f"Use one of: {', '.join(known)}."
    )


@checked(DataError)
def register_experiment(experiment: Any, *, replace: bool = False) -> None:
    """Adds an experiment for the rest of this process.

    `experiment` is a module, or another object, with the names of this package's own experiments:
    `ABOUT` (an `About`), `run(model, config, on_progress) -> Result`, and if it has options,
    `Config`.  It may have `draw(result)`, which yields figures (`report.figures.Drawing`), and
    `HEADLINES`, numbers at the top of a report.

    A distribution makes an experiment known for good, and to the command line, by an entry point
    `name = "module"` in the group `hooked_vlm.experiments`.

    Raises `DataError` for a name or an id that is taken (a name of another distribution's may be
    taken with `replace`), and for an object without these names.

    >>> import pandas as pd
    >>> from hooked_vlm.experiments.result import About, Result
    >>> class Blank:
    ...     ABOUT = About(id="X0", name="blank", title="?", claim="None.", section="none")
    ...
    ...     def run(model, config, on_progress):
    ...         table = pd.DataFrame([{"quantity": "pairs", "value": config.pairs}])
    ...         return Result(**vars(Blank.ABOUT), table=table, verdict="Nothing was measured.")
    >>> register_experiment(Blank)
    >>> select("blank").run(None, select("blank").config(pairs=3), print).table["value"].item()
    3
    """
    name = getattr(getattr(experiment, "ABOUT", None), "name", None)
    if name is None:
        raise DataError(
            "An experiment has no ABOUT with a name. Give a module (or another object) with "
            "ABOUT = About(…) and run(model, config, on_progress)."
        )
    EXTENSIONS.register(name, experiment, replace=replace)


def _of_another(name: str, source: Any, origin: Origin) -> Experiment:
    """Returns an experiment of another distribution; see `verified`."""
    own = verified(name, source, [known.id for known in EXPERIMENTS.values()])

    @wraps(own.run)
    def run(model: Any, config: Any, on_progress: OnProgress = silent) -> Result:
        found = own.run(model, config, on_progress)
        # Stimuli tell which names the model's tokenizer leaves out.
        data = None if model is None or config.setting == OWN else stimuli_of(config)
        return replace(found, notes=(*found.notes, *notes_of(model, data, config)))

    return Experiment(
        **vars(own.about),
        run=run,
        config=own.config,
        draw=own.draw,
        headlines=own.headlines,
        origin=origin,
    )


EXTENSIONS = Extensions(
    "hooked_vlm.experiments",
    "experiment",
    _of_another,
    taken=lambda: (*SUITES, *EXPERIMENTS, *(known.id.lower() for known in EXPERIMENTS.values())),
)
"""The experiments of other distributions."""


def origins(experiment: str, settings: Iterable[str]) -> dict[str, Origin]:
    """Returns where code of other distributions comes from that an experiment runs, by its use."""
    own = None if experiment in EXPERIMENTS else EXTENSIONS.get(experiment)
    found = {} if own is None else {f"experiment {experiment}": own.origin}
    for name in settings:
        if (setting := added_setting(name)) is not None:
            found[f"setting {name}"] = setting.origin
    return found
