"""Files that are written as a whole or not at all, where the user names the file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.disk.files import replaced_file
from hooked_vlm.errors import DataError


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, about: Mapping[str, str], what: str
) -> None:
    """Writes a safetensors file under a temporary name, and renames it.

    Raises `DataError` for a path that cannot be written to; `what` is what the file holds.
    """
    with whole_file(path, what) as building:
        save_file(dict(tensors), building, dict(about))


@contextlib.contextmanager
def whole_file(path: str | Path, what: str) -> Iterator[Path]:
    """Yields a temporary path; what is written there gets the name `path` when the block ends.

    Raises `DataError` for a path that cannot be written to; `what` is what the file holds.
    """
    try:
        with replaced_file(Path(path)) as building:
            yield building
    except (SafetensorError, OSError, ValueError) as error:  # '.' is no name of a file
        raise DataError(
            f"The {what} cannot be written to '{path}': {str(error)[:120]}. Give the path of a "
            "file in a folder that is there."
        ) from None
