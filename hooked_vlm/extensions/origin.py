"""Where the code of an extension comes from: distribution, version and a hash of the source.

A number that an extension computed depends on its code as on this package's.  The origin is
therefore part of the record of a run and of the key of a remembered result.
"""

import hashlib
import secrets
import sys
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Origin:
    """The distribution, module and source of an extension."""

    distribution: str
    """The name of the installed distribution; empty where the code belongs to none."""
    version: str
    """The version of the distribution; empty without one."""
    module: str
    sha256: str
    """The hash of all files of the module's outermost package, or of its single file.  Code
    without a file (a notebook) has another hash in each process, so that none of its results is
    taken for one of other code."""

    def __str__(self) -> str:
        """Names the distribution and its version, or the module."""
        if self.distribution:
            return f"{self.distribution} {self.version}"
        return f"the module {self.module}"

    @property
    def record(self) -> str:
        """The version and the hash, for the record of a run."""
        return f"{self.version or 'no version'}, source sha256 {self.sha256}"


def origin_of(value: Any, distribution: metadata.Distribution | None = None) -> Origin:
    """Returns the origin of a module, a class, a function or another object.

    `distribution` is the one that an entry point belongs to; without it, the installed
    distribution that has the module's outermost package is found, if there is one.
    """
    while isinstance(value, partial):
        value = value.func
    if isinstance(value, ModuleType):
        module = value.__name__
    else:
        module = str(getattr(value, "__module__", None) or type(value).__module__)
    top = module.partition(".")[0]
    if distribution is not None:
        name, version = distribution.name, distribution.version
    else:
        name = next(iter(metadata.packages_distributions().get(top, ())), "")
        version = metadata.version(name) if name else ""
    return Origin(name, version, module, source_sha256_of(top))


@cache
def source_sha256_of(top: str) -> str:
    """Returns the SHA-256 of all files of an imported package, or of a module's file.

    Compiled files are left out.  Where there is no file, the result is a random text, another one
    in each process, and so it is for a package of Python's own: an object of one of its classes
    says nothing about the code that made it.
    """
    if top in sys.stdlib_module_names - {"__main__"}:
        return f"unknown ({secrets.token_hex(8)})"
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None)
    roots = [Path(path) for path in getattr(module, "__path__", ())]
    paths = [
        (path, path.relative_to(root))
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    if not roots and file is not None and Path(file).is_file():
        paths = [(Path(file), Path(Path(file).name))]
    if not paths:
        return f"unknown ({secrets.token_hex(8)})"
    digest = hashlib.sha256()
    for path, name in paths:
        digest.update(f"{name.as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
