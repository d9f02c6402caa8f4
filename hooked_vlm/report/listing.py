"""The texts of `hooked-vlm list` and `options`: experiments, models, and what can be set."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hooked_vlm import zoo
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.options import COMMON, OF_OWN_DATA, Config
from hooked_vlm.stimuli import settings


MANY = 10**6
"""The upper bound of numbers that have none of their own."""


def listing() -> str:
    """Returns the lists as text; extensions that cannot be used are listed with the reason."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "suites"
    for name, members in registry.SUITES.items():
        yield f"  {name:<18} {', '.join(members)}"
    yield "experiments"
    for name, experiment in registry.EXPERIMENTS.items():
        yield f"  {experiment.id:<3} {name:<22} paper, {experiment.section}: {experiment.title}"
        yield f"      {experiment.claim}"
    own, broken = registry.EXTENSIONS.every()
    own_settings, broken_settings = settings.EXTENSIONS.every()
    if own:
        yield "experiments of other packages"
    for one in own:
        yield f"  {one.id:<3} {one.name:<22} {one.origin}, {one.section}: {one.title}"
        yield f"      {one.claim}"
    if own_settings:
        yield "settings of other packages"
    for setting in own_settings:
        yield f"  {setting.name:<26} {setting.origin}"
    if broken or broken_settings:
        yield "not usable"
    for found in (*broken, *broken_settings):
        yield f"  {found.name:<26} {found.reason}"
    yield "shipped models"
    for name in zoo.available():
        yield f"  {name:<26} {zoo.summary(name)}"


def as_data() -> dict[str, Any]:
    """Returns what `listing` lists, for `--json`."""
    own, _ = registry.EXTENSIONS.every()
    known = [*registry.EXPERIMENTS.values(), *own]
    about = ("id", "name", "title", "claim", "section")
    return {
        "suites": {name: list(members) for name, members in registry.SUITES.items()},
        "experiments": [{name: getattr(one, name) for name in about} for one in known],
        "models": zoo.available(),
    }


@dataclass(frozen=True)
class ExperimentOptions:
    """The options of one experiment; `print` it."""

    experiment: str
    id: str
    settings: tuple[str, ...]
    """The settings that it runs on; empty: all."""
    meaning: str
    options: tuple[Mapping[str, Any], ...]
    """Of each option its name, default, and range or choices."""

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**vars(self)}

    def __str__(self) -> str:
        """Returns the options as a table, with what they mean and how they are given."""
        lines = [f"{self.id} {self.experiment}"]
        lines += [f"  {line}".rstrip() for line in self.meaning.splitlines()]
        if self.settings:
            lines.append(f"  --setting is one of: {', '.join(self.settings)}.")
        rows = [(f"--set {o['name']}=…", _default(o["default"]), o["values"]) for o in self.options]
        if not rows:
            lines.append("  It has no options of its own.")
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)] if rows else [0, 0]
        for name, default, values in rows:
            lines.append(f"  {name:<{widths[0]}}  default {default:<{widths[1]}}  {values}")
        common = ", ".join(f"--{name.replace('_', '-')}" for name in COMMON)
        lines += [f"  As all experiments: {common}, --limit (see hooked-vlm run --help)."]
        return "\n".join(lines)


def options_of(name: str) -> ExperimentOptions:
    """Returns the options of an experiment by its name or id; raises `DataError` for another name.

    >>> [option["name"] for option in options_of("E5").options]
    ['items']
    """
    experiment = registry.select(name)
    kind = experiment.config
    inherited = kind.__doc__ == Config.__doc__
    own = [f for f in fields(kind) if f.name not in (*COMMON, *OF_OWN_DATA)]
    return ExperimentOptions(
        experiment=experiment.name,
        id=experiment.id,
        settings=tuple(kind.settings_allowed),
        meaning="" if inherited else inspect.cleandoc(kind.__doc__ or "").replace("`", ""),
        options=tuple(
            {
                "name": field.name,
                "default": None if field.default is MISSING else field.default,
                "values": _values(kind, field.name, field.default),
            }
            for field in own
        ),
    )


def _default(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _values(kind: type[Config], name: str, default: Any) -> str:
    """Returns the values that an option takes, in words."""
    several = ", several with commas" if isinstance(default, tuple) else ""
    if name in kind.choices:
        return f"one of: {', '.join(kind.choices[name])}"
    if name in kind.ranges:
        low, high = kind.ranges[name]
        upper = f"from {low} to {high}" if high < MANY else f"of at least {low}"
        return f"whole number {upper}{several}"
    hint = get_type_hints(kind)[name]
    if get_origin(hint) is Literal:
        return f"one of: {', '.join(get_args(hint))}"
    of = default[0] if isinstance(default, tuple) and default else default
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return words.get(type(of), "path or none") + several
