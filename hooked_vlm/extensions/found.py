"""The extensions of one kind: named by entry points of other distributions, or registered.

An entry point is loaded when its name is asked for, and not before: the import of this package
does not wait for others.  An extension that cannot be used is reported by its name and
distribution and leaves all others as they are.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError, HookedVLMError
from hooked_vlm.extensions.origin import Origin, origin_of


_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Broken:
    """An extension that cannot be used."""

    name: str
    reason: str
    """What is wrong, in one sentence that names the distribution."""


class Extensions:
    """The extensions of one kind, by name."""

    def __init__(
        self,
        group: str,
        kind: str,
        build: Callable[[str, Any, Origin], Any],
        taken: Callable[[], Collection[str]],
    ) -> None:
        """Takes the group of the entry points, and a word for one extension in messages.

        `build(name, value, origin)` returns the extension, or raises `DataError` for a value that
        is none.  `taken()` returns the names of this package's own.
        """
        self.group, self.kind = group, kind
        self._build, self._taken = build, taken
        self._registered: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    @cached_property
    def _entries(self) -> dict[str, list[metadata.EntryPoint]]:
        """The entry points by name; names with several are refused when they are asked for."""
        found: dict[str, list[metadata.EntryPoint]] = {}
        for entry in metadata.entry_points(group=self.group):
            same = found.setdefault(entry.name, [])
            # A distribution may be found twice, in two folders of the path: the first one counts.
            if _of(entry) not in map(_of, same):
                same.append(entry)
        return found

    def names(self) -> list[str]:
        """Returns the names that can be asked for; nothing is loaded."""
        listed = dict.fromkeys((*self._registered, *self._entries))
        return [name for name in listed if self._fault(name) is None]

    def get(self, name: str) -> Any:
        """Returns the extension of a name; None where there is none.

        Raises `DataError` for one that cannot be used.
        """
        if name in self._registered:
            return self._registered[name]
        if name not in self._entries:
            return None
        if (fault := self._fault(name)) is not None:
            raise DataError(fault)
        if name not in self._loaded:
            self._loaded[name] = self._load(self._entries[name][0])
        return self._loaded[name]

    def every(self) -> tuple[list[Any], list[Broken]]:
        """Returns all extensions, and those that cannot be used; all entry points are loaded."""
        working, broken = [], []
        for name in dict.fromkeys((*self._registered, *self._entries)):
            try:
                working.append(self.get(name))
            except DataError as error:
                broken.append(Broken(name, str(error)))
        return working, broken

    def register(self, name: str, value: Any, *, replace: bool = False) -> None:
        """Adds an extension for the rest of this process.

        Raises `DataError` for a name that is taken or malformed, and for a value that is none.
        """
        wrong = self._wrong_name(name)
        if wrong is None and name in {*self._registered, *self._entries} and not replace:
            wrong = (
                f"there is one of that name already. Use another name, or replace=True to use "
                f"this {self.kind} instead"
            )
        if wrong is not None:
            raise DataError(f"The {self.kind} {shown(name)} cannot be registered: {wrong}.")
        code = getattr(value, "run", value)  # an object's class may be of another package
        self._registered[name] = self._build(name, value, origin_of(code))

    def _wrong_name(self, name: object) -> str | None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return (
                "a name has small letters, digits and single hyphens and begins with a letter, as "
                "in 'my-colours'"
            )
        if name in self._taken():
            return "the name is taken by hooked_vlm itself. Use another name"
        return None

    def _fault(self, name: str) -> str | None:
        """Returns why the entry points of a name cannot be used, without loading them."""
        if name in self._registered:
            return None
        same = self._entries[name]
        wrong = self._wrong_name(name)
        if len(same) > 1:
            owners = " and ".join(map(_of, same))
            return (
                f"There are two {self.kind}s {name!r}, of {owners}. Uninstall one of these "
                "distributions."
            )
        return wrong and f"The {self.kind} {name!r} of {_of(same[0])} is refused: {wrong}."

    def _load(self, entry: metadata.EntryPoint) -> Any:
        what = f"The {self.kind} {entry.name!r} of {_of(entry)} cannot be used"
        try:
            value = entry.load()
            return self._build(entry.name, value, origin_of(value, entry.dist))
        except HookedVLMError as error:
            raise DataError(f"{what}: {error}") from error
        except (Exception, SystemExit) as error:  # of the extension's own code
            raise DataError(
                f"{what}: loading {entry.value!r} raised {type(error).__name__}: "
                f"{str(error)[:160]}. Reinstall or remove the distribution."
            ) from error


def _of(entry: metadata.EntryPoint) -> str:
    """Returns the distribution of an entry point, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def called(
    what: str, origin: Origin, function: Callable[..., Any], *given: Any, **named: Any
) -> Any:
    """Returns `function(*given, **named)`, a function of an extension.

    Raises `DataError` that names the extension for any error that is not of this package.
    """
    try:
        return function(*given, **named)
    except HookedVLMError:
        raise
    except Exception as error:  # of the extension's own code
        raise DataError(
            f"{what} of {origin} raised {type(error).__name__}: {str(error)[:160]}."
        ) from error
