"""Entry points of made-up distributions, and what is registered: found, loaded late, refused."""

import functools
import types
from pathlib import Path

import pytest

from hooked_vlm.errors import DataError
from hooked_vlm.extensions.found import Extensions
from hooked_vlm.extensions.origin import Origin, origin_of, source_sha256_of


def install(folder: Path, distribution: str, points: dict[str, str], code: str = "") -> str:
    """Puts a distribution with one module into a folder; returns the module's name."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[things]", *lines]) + "\n")
    return module


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def build(name: str, value: object, origin: Origin) -> tuple[str, object, str]:
    if value is None:
        raise DataError("it is None")
    return name, value, str(origin)


def extensions() -> Extensions:
    return Extensions("things", "thing", build, taken=lambda: ("taken",))


def test_an_entry_point_is_loaded_when_it_is_asked_for(path: Path) -> None:
    install(path, "one-dist", {"first": "one_dist:ONE"}, "ONE = 1")
    install(path, "bad-dist", {"broken": "bad_dist:ONE"}, "raise RuntimeError('out of order')")
    found = extensions()
    assert sorted(found.names()) == ["broken", "first"]
    assert found.get("first") == ("first", 1, "one-dist 1.0")
    assert found.get("other") is None
    working, (broken,) = found.every()
    assert working == [("first", 1, "one-dist 1.0")]
    assert broken.name == "broken"
    for part in ("thing 'broken' of bad-dist 1.0", "RuntimeError: out of order"):
        assert part in broken.reason


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("taken", "d:ONE", "'taken' of d 1.0 is refused: the name is taken"),
        ("Not a name", "d:ONE", "small letters"),
        ("gone", "d:GONE", "loading 'd:GONE' raised AttributeError"),
        ("none", "d:NONE", "'none' of d 1.0 cannot be used: it is None"),
        ("leaves", "d_leaves:X", "raised ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_used_is_said_by_name(path: Path, name: str, value: str, said: str) -> None:
    install(path, "d", {name: value, "good": "d:ONE"}, "ONE, NONE = 1, None")
    found = extensions()
    with pytest.raises(DataError, match=said):
        found.get(name)
    assert found.get("good")[1] == 1
    assert [broken.name for broken in found.every()[1]] == [name]


def test_two_distributions_of_one_name_are_both_refused(path: Path) -> None:
    for distribution in ("a", "b"):
        install(path, distribution, {"same": f"{distribution}:ONE"}, "ONE = 1")
    with pytest.raises(DataError, match=r"two things 'same', of [ab] 1.0 and [ab] 1.0"):
        extensions().get("same")


def test_register_takes_a_free_name_and_no_other(path: Path) -> None:
    install(path, "d", {"there": "d:ONE"}, "ONE = 1")
    found, value = extensions(), types.SimpleNamespace()
    found.register("mine", value)
    assert found.get("mine")[1] is value and found.names() == ["mine", "there"]
    for name, said in (("mine", "already"), ("there", "already"), ("taken", "taken by hooked_vlm")):
        with pytest.raises(DataError, match=rf"thing '{name}' cannot be registered: .*{said}"):
            found.register(name, value)
    found.register("there", value, replace=True)
    assert found.get("there")[1] is value
    with pytest.raises(DataError, match="taken"):
        found.register("taken", value, replace=True)


def test_an_origin_names_the_distribution_and_changes_with_the_source(path: Path) -> None:
    module = install(path, "src-dist", {}, "def make(): ...\n")
    make = __import__(module).make
    first = origin_of(make)
    assert (first.distribution, first.version, first.module) == ("", "", module)  # no RECORD
    assert str(first) == "the module src_dist" and first == origin_of(make)
    (path / f"{module}.py").write_text("def make(): return 1\n")
    source_sha256_of.cache_clear()  # as in another process
    assert origin_of(make).sha256 != first.sha256
    assert origin_of(functools.partial(make)) == origin_of(make)
    assert origin_of(types.SimpleNamespace()).sha256.startswith("unknown")
    exec("def unfiled(): ...", made := {"__name__": "no_such_file"})
    one = origin_of(made["unfiled"]).sha256
    source_sha256_of.cache_clear()
    assert one.startswith("unknown") and origin_of(made["unfiled"]).sha256 != one
