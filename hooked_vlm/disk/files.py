"""Writes files and folders so that an interruption or a second writer cannot damage them.

A file or folder is written under a temporary name, synchronised to the disk, and then renamed.
A reader therefore sees the old content or the new content, never a part of either.  Several
processes may write the same path; the last one to finish wins.

A temporary name is `.NAME.HOST.PID.RANDOM.new` or `….old`, so that leftovers of a process
that was killed can be recognised and removed.
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hooked_vlm.errors import DataError


_LEFTOVER = re.compile(r"\.(.+)\.([\w-]+)\.(\d+)\.[0-9a-f]{16}\.(new|old)")
_ANOTHER_HOST_S = 24 * 3600
"""Age in seconds from which a temporary file of another host counts as a leftover."""
_ATTEMPTS = 100
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def writable_folder(path: Path) -> Path:
    """Creates the folder `path` if needed and returns it; raises `DataError` if not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(path / "probe", "new")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"Cannot write to the output folder '{path}': {error.strerror or error}. "
            "Name a folder with write permission."
        ) from None
    return path


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file completely, or leaves the existing file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as building:
        building.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which replaces the file `target` when the block ends.

    After an exception in the block, `target` is unchanged.
    """
    building = temporary_name(target, "new")
    try:
        yield building
        with building.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before it gets its name
        building.replace(target)
        synchronise(target.parent)
    finally:
        building.unlink(missing_ok=True)


def write_synced(path: Path, content: str | bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder, which replaces the folder `target` when the block ends.

    After an exception in the block, `target` is unchanged.  The old folder is moved aside
    before the new one takes its name: a kill between the two leaves both, and `restore` brings
    the old one back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = temporary_name(target, "new")
    building.mkdir()
    try:
        yield building
        synchronise(building)
        _take_name(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _take_name(building: Path, target: Path) -> None:
    """Renames a folder to `target`, after moving aside what other processes put there."""
    for _ in range(_ATTEMPTS):
        aside = temporary_name(target, "old")
        with contextlib.suppress(FileNotFoundError):  # there is none, or another process took it
            target.rename(aside)
        try:
            building.rename(target)
        except OSError as error:
            # Another process was faster, and its result is moved aside in the next round.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            continue
        synchronise(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
        return
    raise DataError(
        f"'{target}' could not be replaced in {_ATTEMPTS} attempts, because other processes write "
        "to it. Give each process its own output folder."
    )


def restore(target: Path) -> None:
    """Brings back the folder `target` that a killed process had moved aside."""
    if target.exists():
        return
    for path in sorted(_temporaries(target.parent), key=_modified, reverse=True):
        name, kind, abandoned = _parsed(path)
        if kind == "old" and name == target.name and abandoned:
            with contextlib.suppress(OSError):  # another process was faster
                path.rename(target)
            return


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders of dead processes; restores folders moved aside."""
    for path in _temporaries(folder):
        name, _, abandoned = _parsed(path)
        if not abandoned:
            continue
        restore(folder / name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def temporary_name(path: Path, kind: str) -> Path:
    """Returns an unused name beside `path` that names this process; `kind` is new or old."""
    # File systems allow 255 bytes in a name; the ending has up to 80.
    return path.with_name(
        f".{path.name[:120]}.{_host()}.{os.getpid()}.{secrets.token_hex(8)}.{kind}"
    )


def synchronise(folder: Path) -> None:
    """Waits until the disk has the names in a folder; does nothing where this is impossible."""
    with contextlib.suppress(OSError):  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporaries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]
    except OSError:  # no such folder
        return []


def _parsed(path: Path) -> tuple[str, str, bool]:
    """Returns a temporary path's final name, its kind, and whether its process is dead."""
    match = _LEFTOVER.fullmatch(path.name)
    assert match is not None
    name, host, process, kind = match.groups()
    if host != _host() or os.name != "posix":  # only POSIX can ask whether a process lives
        return name, kind, time.time() - _modified(path) > _ANOTHER_HOST_S
    return name, kind, not _is_alive(int(process))


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # removed in the meantime: as if new
        return time.time()


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def _host() -> str:
    return re.sub(r"[^\w-]", "-", platform.node())[:40] or "host"


def lacking(error: Exception) -> tuple[str, str] | None:
    """Returns what the machine lacks and the remedy, or None for another error."""
    text = str(error).lower()
    memory = "out of memory" in text or "can't allocate memory" in text
    if isinstance(error, MemoryError) or memory:
        return "Out of memory", "Give a smaller --batch-size, or --dtype bfloat16"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "The disk is full", "Free space on it"
    if isinstance(error, OSError) and error.filename is not None:
        what = f"'{str(error.filename)[-200:]}' cannot be read or written: {error.strerror}"
        return what, "Correct the folder or its permissions"
    return None
