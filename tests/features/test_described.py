"""Descriptions of places: two that select different tokens have different ones."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.prepared_models import prepared
from hooked_vlm import Answer, LastToken, Positions, Region, Span, TextTokens, extract
from hooked_vlm.errors import DataError
from hooked_vlm.features.described import described


SITE, WHERE = "blocks.0.hook_resid_post", -1
QUIET: dict[str, Any] = {"progress": False}


def items() -> list[tuple[Image.Image, str]]:
    return [(Image.new("RGB", (64, 64), color), "left or right") for color in ("red", "blue")]


def closure(value: Any) -> Callable[..., Any]:
    return lambda item, grids: (item, value)


def default(value: Any) -> Callable[..., Any]:
    return lambda item, grids, value=value: value


def keyword(value: Any) -> Callable[..., Any]:
    def place(item: Any, grids: Any, *, value: Any = value) -> Any:
        return value

    return place


def reader(item: Any, grids: Any) -> Any:
    return Positions((WHERE,))


def caller(item: Any, grids: Any) -> Any:
    return reader(item, grids)


class Own:
    """A place of the user's."""

    def __init__(self, k: int) -> None:
        self.k = k

    def positions(self, row: Any) -> torch.Tensor:
        return row.real[[self.k]]


class Other(Own):
    def positions(self, row: Any) -> torch.Tensor:
        return row.real[[self.k]] + 1


VALUES = [
    *(None, 1, 1.0, True, "1", 2.5, (1,), [1], [1, 2], {1: 2}, {2: 1}, {1}, frozenset({1})),
    *(torch.zeros(2), torch.ones(2), torch.ones(2).bool(), torch.ones(1, 2)),
    *(re.compile("a"), re.compile("a", re.IGNORECASE), Path("a")),
    *(Span("a"), Span("b"), LastToken(), TextTokens(), Answer(), LastToken() | Answer()),
    *(Region.column_band((4, 4), 0, 1), Region.row_band((4, 4), 0, 1), [LastToken(), Span("a")]),
    *(Own(0), Own(1), Other(0), Own(0).positions, partial(reader, 1), partial(reader, 2)),
    *(len, max, Span, LastToken, reader, caller),
]


@pytest.mark.parametrize("kind", [lambda value: value, closure, default, keyword])
def test_different_values_are_described_differently(kind: Callable[..., Any]) -> None:
    found = [described(kind(value), {}) for value in VALUES]
    assert found == [described(kind(value), {}) for value in VALUES]
    assert len({*found}) == len(VALUES)


def test_different_code_is_described_differently() -> None:
    places = [
        lambda item, grids: LastToken(),
        lambda item, grids: TextTokens(),
        lambda item, grids: Positions((0,)),
        lambda item, grids: Positions((1,)),
        lambda item, grids: Positions((1.0,)),  # type: ignore[arg-type]
        lambda item, grids: item.first,
        lambda item, grids: item.second,
        lambda item, grids: grids,
        lambda item, grids: [LastToken() for _ in grids],
        lambda item, grids: [TextTokens() for _ in grids],
    ]
    assert len({described(place, {}).split()[-1] for place in places}) == len(places)


def test_globals_are_part_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = described(reader, {}), described(caller, {})
    monkeypatch.setitem(globals(), "WHERE", 0)
    assert described(reader, {}) != before[0]
    assert described(caller, {}) != before[1]


def test_functions_that_call_each_other_are_described() -> None:
    def even(n: int) -> Any:
        return LastToken() if n == 0 else odd(n - 1)

    def odd(n: int) -> Any:
        return TextTokens() if n == 0 else even(n - 1)

    assert described(even, {}) == described(even, {}) != described(odd, {})


def test_another_process_has_the_same_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_places.py").write_text(
        "import re\n"
        "WORDS = {'left', 'right', 'above', 'below'}\n"
        "def place(item, grids, *, pattern=re.compile('a')):\n"
        "    return [w for w in WORDS if w in {'left', 'right', 'above'}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code = "import own_places\nfrom hooked_vlm.features.described import described\n"
    code += "print(described(own_places.place, {}))"
    here = described(importlib.import_module("own_places").place, {})
    # Sets have another order there, and the code is read from a compiled file.
    told = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, env=told, capture_output=True, check=True, text=True).stdout
    assert there.strip() == here


def test_a_folder_of_another_function_is_refused(tmp_path: Path) -> None:
    model, data = prepared("llava"), items()
    given: dict[str, Any] = {"out": tmp_path / "f", **QUIET}
    extract(model, data, SITE, at=lambda item, grids: LastToken(), **given)
    extract(model, data, SITE, at=lambda item, grids: LastToken(), **given)
    with pytest.raises(DataError, match="another at"):
        extract(model, data, SITE, at=lambda item, grids: TextTokens(), **given)

    def of(k: int) -> Any:
        return lambda item, grids: Positions((k,))

    given["out"] = tmp_path / "g"
    extract(model, data, SITE, at=of(0), **given)
    extract(model, data, SITE, at=of(0), **given)
    with pytest.raises(DataError, match="another at"):
        extract(model, data, SITE, at=of(-1), **given)


def test_what_cannot_be_described_is_not_resumed(tmp_path: Path) -> None:
    model, data = prepared("llava"), items()
    numbers = iter([0, 0, 0, 0])
    given: dict[str, Any] = {"out": tmp_path / "f", **QUIET}
    given["at"] = lambda item, grids: Positions((next(numbers),))
    extract(model, data, SITE, **given)
    with pytest.raises(DataError, match="reads numbers, of type list_iterator") as caught:
        extract(model, data, SITE, **given)
    assert len(str(caught.value)) <= 400
    # The model itself is known: its weights are compared.
    known = {"out": tmp_path / "g", **QUIET, "at": lambda item, grids: (model, LastToken())[1]}
    extract(model, data, SITE, **known)
    extract(model, data, SITE, **known)
