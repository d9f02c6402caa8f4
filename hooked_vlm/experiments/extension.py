"""Experiments of other distributions: what is needed of them, verified before they run.

An experiment is a module, or another object, with the names of this package's own experiments:
`ABOUT`, `run`, and where it has options, `Config`.  Besides, it may have `draw`, which makes the
figures of its result, and `HEADLINES`, the numbers at the top of a report.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any

from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.options import Config, OnProgress
from hooked_vlm.experiments.result import About, Result


Draw = Callable[[Result], Iterable[Any]]
"""From a result to its figures (`report.figures.Drawing`)."""
Headlines = tuple[tuple[Mapping[str, str | None], str], ...]
"""Columns and values that select rows of the table, and their label."""


@dataclass(frozen=True)
class Verified:
    """What an experiment consists of, verified."""

    about: About
    run: Callable[[Any, Any, OnProgress], Result]
    config: type[Config]
    draw: Draw | None
    headlines: Headlines


def verified(name: str, source: Any, ids: Iterable[str]) -> Verified:
    """Returns what a module, or another object with the names of an experiment, consists of.

    `ids` are the ids of this package's own experiments.  Raises `DataError` for an object without
    these names, with values of another kind, or with a name or an id that cannot be its own.
    """
    about, config = getattr(source, "ABOUT", None), getattr(source, "Config", Config)
    if not isinstance(about, About):
        raise DataError(
            f"ABOUT is {shown(about)}; expected About(id=…, name=…, title=…, claim=…, section=…), "
            "of hooked_vlm.experiments.result"
        )
    if about.name != name:
        raise DataError(f"its ABOUT.name is {about.name!r}, and it was found as {name!r}: use one")
    wrong = [f.name for f in fields(About) if not isinstance(getattr(about, f.name), str)]
    if wrong or not about.id:
        raise DataError(f"ABOUT.{(wrong or ['id'])[0]} is no text. Give texts to all its fields")
    if about.id.lower() in {known.lower() for known in ids}:
        raise DataError(f"the id {about.id!r} is taken by hooked_vlm itself. Use another id")
    if not (isinstance(config, type) and issubclass(config, Config) and is_dataclass(config)):
        raise DataError(
            f"Config is {shown(config)}; expected a @dataclass(frozen=True, kw_only=True) that "
            "inherits from hooked_vlm.experiments.options.Config"
        )
    try:
        config()
    except TypeError:
        raise DataError("a field of Config has no default. Give each one a default") from None
    headlines = tuple(getattr(source, "HEADLINES", ()))
    draw = _drawing(getattr(source, "draw", None))
    return Verified(
        about, _verified_run(about, getattr(source, "run", None)), config, draw, headlines
    )


def _drawing(draw: Any) -> Any:
    """Returns the function that draws a result, or None; raises `DataError` for anything else."""
    if draw is not None and not callable(draw):
        raise DataError(f"draw is {shown(draw)}; expected a function of a result")
    return draw


def _verified_run(about: About, run: Any) -> Callable[[Any, Any, OnProgress], Result]:
    """Returns `run` with its arguments and its result verified."""
    if not callable(run):
        raise DataError(f"run is {shown(run)}; expected a function run(model, config, on_progress)")
    try:
        inspect.signature(run).bind(None, None, None)
    except TypeError:
        raise DataError(
            f"run takes {inspect.signature(run)}; it is called as run(model, config, on_progress)"
        ) from None
    except ValueError:  # a built-in function without a signature
        pass

    @wraps(run)
    def verified(model: Any, config: Any, on_progress: OnProgress) -> Result:
        found = run(model, config, on_progress)
        what = f"The experiment {about.name!r} returned"
        if not isinstance(found, Result):
            raise DataError(
                f"{what} {shown(found)}; expected Result(**vars(ABOUT), table=…, verdict=…) of "
                "hooked_vlm.experiments.result."
            )
        if (found.name, found.id) != (about.name, about.id):
            raise DataError(
                f"{what} a result of {found.name!r} ({found.id}); expected {about.name!r} "
                f"({about.id}). Make it with Result(**vars(ABOUT), …)."
            )
        if len(found.table) and "value" not in found.table:
            raise DataError(
                f"{what} a table with the columns {', '.join(map(str, found.table))[:120]}; "
                "expected one row per number, with the number in 'value'."
            )
        return found

    return verified
