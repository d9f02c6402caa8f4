"""Parts: the units of an experiment's loops, each in a file of its own.

They lie in `OUT/parts/<experiment>-<setting>-<key>/`.  The key is that of the experiment's result
(see `basis`), so a part is read only by a run that would compute the same bits.  A part is
written under a temporary name and renamed, so an interruption at any moment costs the unit that
was being computed.  Any number of processes may write one folder: where two compute the same
unit, they write the same value.

`Parts` computes the units that are missing, all of them or, with a `Share`, some; `offer` is how
it has them computed elsewhere (see `workers`).
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vlm.disk.files import remove_leftovers
from hooked_vlm.errors import DataError, HookedVLMWarning, callers_level
from hooked_vlm.experiments.loop import Loop, UnfinishedError, following, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.report.values import packed, seconds_of, unpacked, write_value


PARTS = "parts"
"""The folder, inside the output folder, that holds the units of unfinished experiments."""
ABOUT = "about.json"


@dataclass(frozen=True)
class Share:
    """The share `index` of `of` equal ones: units whose number leaves `index` when divided.

    Raises `DataError` unless `index` is from 0 to `of` - 1.

    >>> Share.read("1/3").has(4), Share.read("1/3").has(5)
    (True, False)
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise DataError(
                f"--part {self.index}/{self.of} was given; expected I/N with I from 0 to N - 1, as "
                "in --part 0/8."
            )

    @classmethod
    def read(cls, text: str) -> "Share":
        """Returns the share of a text such as `"0/8"`; raises `DataError` for another one."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if match is None:
            raise DataError(
                f"--part {text[:40]!r} was given; expected I/N with I from 0 to N - 1, as in "
                "--part 0/8."
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, number: int) -> bool:
        """Returns whether the unit with this number belongs to the share."""
        return number % self.of == self.index


Offer = Callable[[Loop, Sequence[str]], Iterator[tuple[str, bytes]]]
"""Has units computed elsewhere; yields the name and the `packed` value of each that is done."""


class Parts:
    """The units of one experiment: read from files, else computed and written.

    `folders` are read; the first one is written to.  With `share`, a loop whose units no later
    loop needs is left to the other processes once the own units are done (`UnfinishedError`);
    units that later loops need are computed whatever share they are in.  With `read_only`, nothing
    is computed, and without `write` nothing is written.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        share: Share | None = None,
        offer: Offer | None = None,
        read_only: bool = False,
        write: bool = True,
    ) -> None:
        self.folders, self.share, self.offer, self.read_only = folders, share, offer, read_only
        self.write = write
        self.read, self.computed = 0, 0
        """Units that were read, and units that were computed."""
        self.seconds = 0.0
        """Of the units that were read: the time that their computation took, wherever it was."""
        self._numbered = 0
        self._seen: set[str] = set()

    def values(self, loop: Loop, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the value of each unit, by its name, in their order."""
        if loop.name in self._seen:
            raise DataError(
                f"Two loops of the experiment have the name {loop.name!r}. Give each its own."
            )
        self._seen.add(loop.name)
        first, self._numbered = self._numbered, self._numbered + len(loop.units)
        if self.read_only or self.offer is not None:
            found = self._from_elsewhere(loop, on_progress)
        else:
            found = self._computed(loop, self._order(loop, first), on_progress)
        missing = [f"{loop.name}: {name}" for name in loop.units if name not in found]
        if missing:
            raise UnfinishedError(missing)
        return {name: found[name] for name in loop.units}

    def remove(self) -> None:
        """Removes the files, once the experiment's result is saved."""
        if not self.read_only:
            shutil.rmtree(self.folders[0], ignore_errors=True)
            with contextlib.suppress(OSError):  # there are parts of other experiments
                self.folders[0].parent.rmdir()

    def _order(self, loop: Loop, first: int) -> list[tuple[str, bool]]:
        """Returns the units in the order of computing, and whether each is to be computed here."""
        names = list(loop.units)
        if self.share is None:
            return [(name, True) for name in names]
        own = [name for i, name in enumerate(names, first) if self.share.has(i)]
        # Each process begins with another one of the others' units.
        start = names.index(own[-1]) + 1 if own else 0
        others = [name for name in names[start:] + names[:start] if name not in own]
        return [(name, True) for name in own] + [(name, not loop.last) for name in others]

    def _computed(
        self, loop: Loop, order: Sequence[tuple[str, bool]], on_progress: OnProgress
    ) -> dict[str, Any]:
        found = {}
        units = {name: (loop.units[name], here) for name, here in order}
        whole = on_progress if self.share is None else silent
        for name, (_, here), told in following(units, whole, loop.steps):
            with contextlib.suppress(KeyError):
                found[name] = self._loaded(loop, name)
                continue
            if here:
                found[name] = self._kept(loop, name, unit_of(loop, name, told))
                if self.share is not None:  # what all processes have done together
                    on_progress(loop.steps * self._there(loop), loop.steps * len(loop.units))
        return found

    def _there(self, loop: Loop) -> int:
        """Returns how many units have a file."""
        return sum((self.folders[0] / file_of(loop, name)).exists() for name in loop.units)

    def _from_elsewhere(self, loop: Loop, on_progress: OnProgress) -> dict[str, Any]:
        found = {}
        for name in loop.units:
            with contextlib.suppress(KeyError):
                found[name] = self._loaded(loop, name)
        total = loop.steps * len(loop.units)
        on_progress(loop.steps * len(found), total)
        missing = [name for name in loop.units if name not in found]
        if self.offer is not None and missing:
            for name, data in self.offer(loop, missing):
                found[name] = self._kept(loop, name, data)
                on_progress(loop.steps * len(found), total)
        return found

    def _kept(self, loop: Loop, name: str, data: bytes) -> Any:
        """Writes a unit, and returns its value as it will be read."""
        if self.write:
            write_value(self.folders[0] / file_of(loop, name), data)
        self.computed += 1
        return unpacked(data, *identity(loop, name))

    def _loaded(self, loop: Loop, name: str) -> Any:
        """Returns a unit that is there; raises `KeyError` where it is not, or is damaged."""
        for folder in self.folders:
            try:
                data = (folder / file_of(loop, name)).read_bytes()
            except OSError:
                continue
            try:
                value = unpacked(data, *identity(loop, name))
            except DataError as error:
                again = "" if self.read_only else " It is computed again."
                warnings.warn(f"{error}{again}", HookedVLMWarning, stacklevel=callers_level())
                continue
            self.read += 1
            self.seconds += seconds_of(data)
            return value
        raise KeyError(name)


def unit_of(loop: Loop, name: str, told: OnProgress) -> bytes:
    """Computes a unit; returns its `packed` value, with the time that this took."""
    start = time.perf_counter()
    value = loop.score(loop.units[name], told)
    return packed(value, *identity(loop, name), seconds=time.perf_counter() - start)


def identity(loop: Loop, name: str) -> tuple[str, str]:
    """Returns a unit's name and a hash of what it is about, which its file must have."""
    text = json.dumps(_described(loop.units[name]))
    return f"{loop.name}: {name}", hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(item: Any) -> Any:
    """Returns what a unit is about, as JSON that is the same in every process."""
    if item is None or isinstance(item, bool | int | float | str):
        return item
    if isinstance(item, Mapping):
        return [[_described(k), _described(v)] for k, v in item.items()]
    if isinstance(item, list | tuple | range):
        return [_described(each) for each in item]
    if dataclasses.is_dataclass(item):
        fields = dataclasses.fields(item)
        return [type(item).__name__, *(_described(getattr(item, f.name)) for f in fields)]
    return type(item).__name__


def file_of(loop: Loop, name: str) -> str:
    """Returns the name of a unit's file."""
    whole = hashlib.sha256(f"{loop.name}\n{name}".encode()).hexdigest()[:12]
    slug = re.sub(r"[^\w]+", "-", f"{loop.name} {name}").strip("-")[:80]
    return f"{slug}-{whole}.safetensors"


def folder_of(out: Path, step: str, key: str) -> Path:
    """Returns the folder of an experiment's parts; `step` is its `Step.key`, `key` its hash."""
    return out / PARTS / f"{step}-{key[:16]}"


def opened(folder: Path, about: Mapping[str, Any], *, anew: bool = False) -> None:
    """Makes the folder of parts where it is missing, with a file on what they depend on.

    With `anew`, parts that are there are removed.
    """
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    text = json.dumps(about, indent=2, sort_keys=True, default=str) + "\n"
    path = folder / ABOUT
    with contextlib.suppress(FileNotFoundError):  # another process may remove it at any moment
        if path.read_text() == text:
            return
    write_value(path, text.encode())
