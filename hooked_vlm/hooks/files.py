"""Files that are written as a whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.errors import DataError


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, about: Mapping[str, str], what: str
) -> None:
    """Writes a safetensors file under a temporary name, and renames it.

    Raises `DataError` for a path that cannot be written to; `what` is what the file holds.
    """
    with whole_file(path, what) as part:
        save_file(dict(tensors), part, dict(about))


@contextlib.contextmanager
def whole_file(path: str | Path, what: str) -> Iterator[Path]:
    """Yields a temporary path; what is written there gets the name `path` when the block ends.

    Raises `DataError` for a path that cannot be written to; `what` is what the file holds.
    """
    # A name of its own for each writer, so that two of them cannot mix their bytes.
    part = Path(f"{path}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before it gets its name
        part.replace(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"The {what} cannot be written to '{path}': {str(error)[:120]}. Give the path of a "
            "file in a folder that is there."
        ) from None
    finally:
        part.unlink(missing_ok=True)
