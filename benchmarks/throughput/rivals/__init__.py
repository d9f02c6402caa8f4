"""Other tools, each as its documentation recommends and at its best, on one interface.

An adapter is made from a transformers model and its family, and has `run(task)`, which returns
the last position's logits `[cell, batch, d_vocab]`, from pixels on, as `HookLoop` and `Ours` do.
It raises `Cannot` where its tool has no way to do the task.  Nothing is imported before it is
asked for: this package needs none of them.
"""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rival:
    """Where a tool and its adapter are."""

    package: str
    """As `import` spells it."""
    distribution: str
    module: str
    adapter: str


RIVALS = {
    "transformer-lens": Rival("transformer_lens", "transformer-lens", "lens", "TransformerLens"),
    "nnsight": Rival("nnsight", "nnsight", "tracing", "Tracing"),
    "pyvene": Rival("pyvene", "pyvene", "intervenable", "Intervenable"),
}
COMMAND = "python -m benchmarks.throughput.environment --at .venv-rivals"


class MissingRivalError(Exception):
    """A tool is not installed in this Python; says how to get one where it is."""


def require(name: str, run: str = "benchmarks.throughput --rivals") -> Rival:
    """Returns a tool's row; raises `MissingRivalError` where its package is not installed.

    `run` is the module to run where it is, up to the tool's name.
    """
    rival = RIVALS[name]
    if importlib.util.find_spec(rival.package) is None:
        raise MissingRivalError(
            f"The rival {name!r} needs the package {rival.distribution!r}, which is not installed "
            f"in this Python. Make an environment that has it, and run there:\n"
            f"    {COMMAND}\n"
            f"    .venv-rivals/bin/python -m {run} {name}"
        )
    return rival


def make(name: str, hf_model: Any, family: str) -> Any:
    """Returns the adapter of a tool around (a twin of) a model."""
    rival = require(name)
    module = importlib.import_module(f"benchmarks.throughput.rivals.{rival.module}")
    return getattr(module, rival.adapter)(hf_model, family)


def version(name: str) -> str:
    """Returns the installed version of a tool."""
    return importlib.metadata.version(RIVALS[name].distribution)
