"""The script that puts faults into the code: what it changes, and which tests it then runs."""

import sys
from pathlib import Path

import mutants
import pytest

from helpers.forked_tests import in_child
from helpers.mutations import mutants_of


SOURCE = '''\
"""Not touched: 1 < 2."""
Width = int | float

def f(a: "1 < 2", n: int = 0) -> int | None:
    """Not touched: 1 < 2."""
    if a < n and not a.done:
        raise ValueError(f"{a + n} not touched", a < n)
    rows = max(a[:n], key=lambda row: row.tall * 2)
    return [x for x in rows if x % 3 == 0]
'''


def test_every_kind_of_change_is_made_once_and_parses():
    found = mutants_of("m.py", SOURCE)
    changed = [mutant.diff(SOURCE).splitlines()[1:] for mutant in found]
    lines = [line[1:].strip() for (line,) in changed]
    for expected in (
        'def f(a: "1 < 2", n: int = 1) -> int | None:',
        "if (a <= n) and not a.done:",
        "if (a < n or not a.done):",
        "if a < n and (a.done):",
        "if (not (a < n and (not a.done))):",
        "rows = min(a[:n], key=lambda row: row.tall * 2)",
        "rows = max(a[1:n], key=lambda row: row.tall * 2)",
        "rows = max(a[:n + 1], key=lambda row: row.tall * 2)",
        "rows = max(a[:n])",
        "rows = max(a[:n], key=lambda row: (row.tall / 2))",
        "rows = max(a[:n], key=lambda row: row.tall * 3)",
        "rows = max(a[:n], key=lambda row: (row.wide) * 2)",
        "return None",
        "return [x for x in rows if (x % 3 != 0)]",
        "return [x for x in cols if x % 3 == 0]".replace("cols", "(cols)"),
    ):
        assert lines.count(expected) == 1, expected
    assert all(mutant.is_fair(SOURCE) for mutant in found)
    assert not any(mutant.line in (1, 2, 5, 7) for mutant in found)
    assert len({mutant.name for mutant in found}) == len(found)


def test_a_second_check_of_lengths_is_left_alone():
    source = "a = dict(zip(b, c, strict=True))\n"
    assert [mutant.is_fair(source) for mutant in mutants_of("m.py", source)] == [False, False]


def test_a_sample_is_the_same_each_time_and_has_some_of_every_module():
    drawn = mutants.sample(120, seed=0)
    assert drawn == mutants.sample(120, seed=0) != mutants.sample(120, seed=1)
    assert len(set(drawn)) == 120
    sizes = {name: [m.module for m in drawn].count(name) for name in mutants.modules()}
    large = [name for name in sizes if name in ("regions/grid.py", "hooks/attention.py")]
    assert len(large) == 2 and all(sizes[name] >= 3 for name in large)
    assert {m.module for m in mutants.sample(5, 0, "hooks/attention")} == {"hooks/attention.py"}


def test_a_modules_own_tests_come_first_and_all_named_files_exist():
    assert mutants.files_for("regions/region.py")[:2] == [
        "tests/regions/test_region.py",
        "tests/regions/test_grid.py",
    ]
    assert mutants.files_for("engine/growing.py")[0] == "tests/engine/test_batch.py"
    for module in mutants.modules():
        files = mutants.files_for(module)
        assert files and all((mutants.ROOT / file).exists() for file in files), module


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_process_that_ends_or_hangs_or_fails(tmp_path: Path):
    def fails() -> int:
        raise ZeroDivisionError

    def works_on() -> int:
        while True:
            pass

    assert in_child(tmp_path, lambda: 3, limit=60) == 3
    assert in_child(tmp_path, fails, limit=60) == 70
    assert "ZeroDivisionError" in (tmp_path / "output.txt").read_text()
    assert in_child(tmp_path, works_on, limit=1) < 0
