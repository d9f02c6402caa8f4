"""Settings of other distributions: what is needed of them, and the files that they read."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError
from hooked_vlm.extensions.found import called
from hooked_vlm.extensions.origin import Origin
from hooked_vlm.stimuli.sets import StimulusSet


FOLDERS = ("cutouts", "backgrounds", "data")
"""The options that are folders of the user's."""
OPTIONS = (*FOLDERS, "other_words")


@dataclass(frozen=True)
class AddedSetting:
    """A setting of another distribution."""

    name: str
    make: Callable[..., StimulusSet]
    reads: tuple[str, ...]
    """Those of the options that `make` takes."""
    origin: Origin

    def stimuli(self, **options: Any) -> StimulusSet:
        """Returns the stimuli that `make` returns for the options that it takes.

        Raises `DataError` for an option that it does not take, and for what is no `StimulusSet`.
        """
        for name, value in options.items():
            if value and name not in self.reads:
                raise DataError(
                    f"The setting {self.name!r} does not read {name}={shown(value)}. Leave it out."
                )
        given = {name: options[name] for name in self.reads if name in options}
        made = called(f"The setting {self.name!r}", self.origin, self.make, **given)
        what = f"The setting {self.name!r} of {self.origin} returned"
        if not isinstance(made, StimulusSet):
            raise DataError(
                f"{what} {shown(made)}; expected a StimulusSet of hooked_vlm.stimuli.settings."
            )
        if made.name != self.name:
            raise DataError(f"{what} a StimulusSet named {made.name!r}; expected {self.name!r}.")
        return made

    def files(self, **folders: Path | None) -> dict[str, Path]:
        """Returns all files of the user's folders that it reads, by folder and path inside it."""
        found = {}
        for name in FOLDERS:
            folder = folders.get(name)
            if folder is None or name not in self.reads:
                continue
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            found |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in files}
        return found


def setting_of(name: str, make: Any, origin: Origin) -> AddedSetting:
    """Returns a function as a setting; raises `DataError` for one with other arguments."""
    if not callable(make):
        raise DataError(f"{shown(make)} is no function that returns a StimulusSet")
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # a built-in function without a signature
        raise DataError(f"{shown(make)} has no signature; give a function") from None
    for parameter in parameters:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        optional = variadic or parameter.default is not parameter.empty
        if parameter.name not in OPTIONS and not optional:
            raise DataError(
                f"its function takes {parameter.name!r}; it may take {', '.join(OPTIONS)} by name"
            )
    reads = tuple(p.name for p in parameters if p.name in OPTIONS)
    function: Any = make
    return AddedSetting(name, function, reads, origin)
