"""Opens a user's pictures and lists; every fault names its file.

Folders and lists may come from others.  A list therefore names pictures only inside its own
folder, and a picture that is damaged or far too large raises `DataError`.
"""

import contextlib
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import ExifTags, Image, ImageOps

from hooked_vlm.disk.files import sha256_of
from hooked_vlm.errors import DataError


LISTS = (".json", ".jsonl", ".csv", ".tsv", ".arrow")
"""The endings of a user's files that are no pictures."""
# The exceptions with which PIL refuses the content of a file.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
)


def open_picture(
    path: Path, mode: str | Callable[[Image.Image], Image.Image] = "RGB"
) -> Image.Image:
    """Returns a file's picture in a mode, or as a function returns it.

    Raises `DataError` with the file's name if it is unreadable.
    """
    _require_no_pipe(path)
    try:
        with warnings.catch_warnings():
            # Shown for pictures of half the size that PIL refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return opened.convert(mode) if isinstance(mode, str) else mode(opened)
    except DataError as error:
        raise DataError(f"'{path}' {error}.") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"'{path}' has more than {most:,} pixels, the most that PIL opens. Give a smaller "
            "picture."
        ) from None
    except UNREADABLE as error:
        raise DataError(
            f"'{path}' cannot be read as a picture: {str(error)[:120]}. Replace the file or remove "
            "it."
        ) from None


def size_of(source: Path, whole: bool = True) -> tuple[int, int]:
    """Returns the size of a picture as `upright` returns it, (width, height); keeps no pixel.

    `whole` decodes the picture to find damage after its header.  Raises `DataError`, without a
    name, for what cannot be read.
    """
    _require_no_pipe(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as opened:
                return upright_size(opened, whole)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError("has more pixels than PIL opens; give a smaller picture") from None
    except UNREADABLE as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot be read as a picture: {said[:120]}") from None


DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Modes of more than 8 bits, whose values a conversion to RGB cuts off at 255."""


def upright_size(opened: Image.Image, whole: bool) -> tuple[int, int]:
    """Returns the size of a picture as `upright` returns it; raises `DataError` as it does."""
    if opened.mode in DEEP:
        raise DataError(f"has values of more than 8 bits (mode {opened.mode}); save it with 8")
    if whole:
        opened.load()
    width, height = opened.size
    turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def upright(picture: Image.Image, ground: str = "white") -> Image.Image:
    """Returns a picture in RGB as viewers show it: turned as its EXIF says, over a colour.

    Raises `DataError`, without a name, for values of more than 8 bits.
    """
    upright_size(picture, whole=False)
    turned = ImageOps.exif_transpose(picture)
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    whole = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, ground), whole).convert("RGB")


def _require_no_pipe(path: Path) -> None:
    """Raises `DataError` for what would be waited for: a pipe, a socket or a device."""
    with contextlib.suppress(OSError):  # named by whoever opens it
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise DataError(f"'{path}' is no file. Replace it or remove it.")


def checked_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file; raises `DataError` for a picture that cannot be opened.

    A file is decoded once in a process, as long as it is the same (`stamp_of`).
    """
    try:
        stamp = stamp_of(path)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
    _require_no_pipe(path)
    return _checked(path, stamp)


def stamp_of(path: Path) -> tuple[int, ...]:
    """Returns what changes when a file is written or replaced, also by one of the same size.

    Raises `OSError` where there is none.
    """
    status = path.stat()
    # The time of modification can be set to an older one, as copies keep it; the last cannot.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@cache
def _checked(path: Path, _stamp: tuple[int, ...]) -> str:
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
    if path.suffix.lower() not in LISTS:
        open_picture(path)
    return digest


def is_inside(name: str) -> bool:
    """Returns whether a relative path of a list stays inside the folder that it is relative to.

    >>> is_inside("data/images/a.jpeg"), is_inside("../a.jpeg"), is_inside("/a.jpeg")
    (True, False, False)
    """
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            return False
    return "\0" not in name


def read_list(path: Path) -> list[Any]:
    """Returns the list in a JSON file, or raises `DataError`."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"'{path}' has a {type(entries).__name__}; expected a list.")
    return entries


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises `DataError` for another file."""
    _require_no_pipe(path)
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not JSON in UTF-8: {error}. Convert the file.") from None
    except RecursionError:
        raise DataError(f"'{path}' is not a list of items: it is nested too deeply.") from None
    except ValueError as error:
        raise DataError(f"'{path}' is not JSON: {error}") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
