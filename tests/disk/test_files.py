"""Files survive kills and second writers: old or new, never a part, and no leftovers."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import synthetic_results as synthetic
from hooked_vlm.disk import files
from hooked_vlm.disk.files import (
    remove_leftovers,
    replaced_folder,
    restore,
    temporary_name,
    write_file,
)
from hooked_vlm.report.results import load_result, save_result


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def in_a_process(function: Callable[[], Any]) -> int:
    """Runs a function in a forked process; returns the process's id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return process


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dead_process() -> int:
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


def leftover(folder: Path, name: str, kind: str, host: str | None = None) -> Path:
    """Returns the name of a temporary folder of a process that is dead."""
    host = files._host() if host is None else host
    return folder / f".{name}.{host}.{dead_process()}.{'0' * 16}.{kind}"


@forks
def test_h1_processes_that_write_one_folder_at_a_time_all_succeed(tmp_path: Path) -> None:
    def save() -> None:
        for _ in range(25):
            save_result(synthetic.e1(), tmp_path, "key")

    statuses = [status_of(process) for process in [in_a_process(save) for _ in range(4)]]
    assert statuses == [0, 0, 0, 0]
    assert load_result(tmp_path, "behaviour", "key") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["behaviour"]


@forks
def test_h1_processes_that_write_one_file_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    text = "a\n" * 1000

    def write() -> None:
        for _ in range(50):
            write_file(path, text)

    assert [status_of(p) for p in [in_a_process(write) for _ in range(4)]] == [0] * 4
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@forks
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_h2_a_kill_between_any_two_renames_leaves_a_whole_result(
    tmp_path: Path, renames: int
) -> None:
    save_result(synthetic.e1(), tmp_path, "old")
    done = [0]
    whole = Path.rename

    def save_and_die() -> None:
        def rename(self: Path, target: Path) -> Path:
            if done[0] == renames:
                os._exit(9)  # as by SIGKILL: no finally block runs
            done[0] += 1
            return whole(self, target)

        Path.rename = rename  # type: ignore[method-assign]
        files.shutil.rmtree = lambda *_, **__: os._exit(9)  # type: ignore[assignment]
        save_result(synthetic.e1(), tmp_path, "new")

    assert status_of(in_a_process(save_and_die)) == 9
    key = "new" if renames == 2 else "old"
    assert load_result(tmp_path, "behaviour", key) is not None
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["behaviour"]
    assert load_result(tmp_path, "behaviour", key) is not None


def test_h3_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    dead = leftover(tmp_path, "strip-swap-shapes", "new")
    (dead / "images").mkdir(parents=True)
    dead_file = leftover(tmp_path, "numbers.csv", "new")
    dead_file.write_text("half")
    alive = temporary_name(tmp_path / "behaviour", "new")
    alive.mkdir()
    elsewhere = leftover(tmp_path, "behaviour", "new", host="another-host")
    elsewhere.mkdir()
    own = tmp_path / ".mine"
    own.mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, elsewhere.name, own.name}
    long_ago = time.time() - 2 * files._ANOTHER_HOST_S
    os.utime(elsewhere, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, own.name}


def test_h3_a_folder_that_a_dead_process_moved_aside_comes_back(tmp_path: Path) -> None:
    aside = leftover(tmp_path, "behaviour", "old")
    aside.mkdir()
    (aside / "result.json").write_text("{}")
    restore(tmp_path / "behaviour")
    assert (tmp_path / "behaviour" / "result.json").read_text() == "{}"
    assert not aside.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_h4_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = save_result(synthetic.e1(), tmp_path / "results", "key")
        write_file(tmp_path / "report.html", "page")
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*"), tmp_path / "report.html"]:
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~mask, path


def test_h6_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        done.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink()}")
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (done.append(f"name {to}"), rename(self, to))[1]
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (done.append(f"name {to}"), replace(self, to))[1]
    )
    folder = save_result(synthetic.e1(), tmp_path, "key")
    named = done.index(f"name {folder}")
    before = "\n".join(done[:named])
    for file in ("result.json", "table.csv", "arrays.safetensors", "images/000.png", "images"):
        assert f"/{file}" in before
    assert f"fsync {tmp_path}" in done[named:]
    done.clear()
    write_file(tmp_path / "page.html", "page")
    assert [line.split()[0] for line in done] == ["fsync", "name", "fsync"]


def test_a_block_that_raises_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    with pytest.raises(ZeroDivisionError), replaced_folder(tmp_path / "made") as building:
        (building / "new").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "old"]


@pytest.mark.parametrize("newest", [0, 1])
def test_j2_of_several_folders_that_were_moved_aside_the_newest_comes_back(
    tmp_path: Path, newest: int
) -> None:
    for number in (0, 1):
        aside = leftover(tmp_path, "behaviour", "old")
        aside.mkdir()
        (aside / "result.json").write_text(str(number))
        age = 1e9 + 100 * (number == newest)
        os.utime(aside, (age, age))
    restore(tmp_path / "behaviour")
    assert (tmp_path / "behaviour" / "result.json").read_text() == str(newest)
