"""The record of a run: model, experiment, options, software, device, time and memory.

The record identifies the model by a hash of its parameters as well as by its name, because
the weights of a hub name can change and a local folder has no version.  It has the commit
of this package's source where there is one, and the time and peak memory of the run.

`Stopwatch` measures a block, and `describe_run` makes the record, which is plain JSON.
"""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hooked_vlm.anatomy.devices import compute_dtype, execution_device
from hooked_vlm.errors import DataError
from hooked_vlm.extensions.origin import Origin


PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "torchvision",
    "numpy",
    "pillow",
    "scikit-learn",
    "pandas",
    "xarray",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """One run, with everything that is needed to repeat it."""

    model: str
    """The name or folder that the user gave."""
    model_class: str
    model_sha256: str
    """See `parameter_hash`."""
    model_files: dict[str, str]
    """SHA-256 of each file of the model that is no weight (see `basis.model_files`)."""
    attention: str
    """The attention implementations, such as `"sdpa"`."""
    n_parameters: int
    experiment: str
    config: dict[str, Any]
    seed: int
    device: str
    device_name: str
    dtype: str
    threads: int
    hooked_vlm: str
    git_commit: str | None
    """Commit of the hooked_vlm source, with `+changes` where the tree differs from it."""
    python: str
    packages: dict[str, str]
    platform: str
    started: str
    """UTC, ISO 8601."""
    wall_seconds: float
    """Duration of this run; `seconds` includes experiments that an earlier run computed."""
    seconds: dict[str, float]
    """Duration of each experiment in the run that computed it, and of units that it read."""
    reused: list[str]
    """Experiments whose results were read from an earlier run."""
    peak_memory_mib: float
    """Highest resident memory of the process since its start, not only during this run."""
    peak_cuda_memory_mib: float | None
    """Highest allocation over all CUDA devices during the run; `None` without CUDA."""
    extensions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Experiments and settings of other distributions, as `"experiment my-own of PACKAGE"`: the
    version of the distribution, and a hash of its source."""
    elsewhere: dict[str, str] = dataclasses.field(default_factory=dict)
    """Experiments whose parts were merged: how the processes that computed them differ from this
    record, as `"device cuda and cpu"` (there, and here)."""

    @property
    def title(self) -> str:
        """The model's name on a page: the full hub name, or the last part of a folder."""
        path = Path(self.model)
        return path.name if path.is_absolute() or self.model.startswith(".") else self.model

    def to_json(self) -> str:
        """Returns the record as indented JSON with keys in the order above."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Returns the record that `to_json` wrote; raises `DataError` for another text."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                "This is not the record of a run by this version of hooked_vlm "
                f"({str(error)[:120]}). Run the job again."
            ) from None


class Stopwatch:
    """Measures wall time and peak memory of a block: `with Stopwatch() as watch: …`."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.seconds = 0.0
        self.peak_cuda_mib: float | None = None

    def __enter__(self) -> "Stopwatch":
        self.started = datetime.now(UTC)
        self._start = time.perf_counter()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if torch.cuda.is_available():
            devices = range(torch.cuda.device_count())
            peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
            self.peak_cuda_mib = peak / 2**20


def describe_run(
    model: nn.Module,
    name: str,
    watch: Stopwatch,
    *,
    model_sha256: str,
    experiment: str,
    config: Mapping[str, Any],
    seed: int,
    seconds: Mapping[str, float] | None = None,
    reused: Sequence[str] = (),
    model_files: Mapping[str, str] | None = None,
    extensions: Mapping[str, Origin] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> Provenance:
    """Returns the record of one run of `experiment` on `model`; `name` is the user's name for it.

    `model_sha256` is the result of `parameter_hash`, passed because hashing is slow.
    """
    device = execution_device(model) or torch.device("cpu")
    return Provenance(
        model=name,
        model_class=type(model).__name__,
        model_sha256=model_sha256,
        model_files=dict(model_files or {}),
        attention=attention_of(model),
        n_parameters=sum(p.numel() for p in model.parameters()),
        experiment=experiment,
        config=dict(config),
        seed=seed,
        device=str(device),
        device_name=_device_name(device),
        dtype=str(compute_dtype(model)).removeprefix("torch."),
        threads=torch.get_num_threads(),
        hooked_vlm=version_of("hooked-vlm"),
        git_commit=source_commit(),
        python=platform.python_version(),
        packages={package: version_of(package) for package in PACKAGES},
        platform=platform.platform(),
        started=watch.started.isoformat(timespec="seconds"),
        wall_seconds=round(watch.seconds, 2),
        seconds={name: round(value, 2) for name, value in (seconds or {}).items()},
        reused=list(reused),
        peak_memory_mib=round(_peak_resident_mib(), 1),
        peak_cuda_memory_mib=None if watch.peak_cuda_mib is None else round(watch.peak_cuda_mib, 1),
        extensions={
            f"{use} of {origin.distribution or origin.module}": origin.record
            for use, origin in (extensions or {}).items()
        },
        elsewhere=dict(elsewhere or {}),
    )


def parameter_hash(model: nn.Module) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and bytes of parameters and buffers.

    They are sorted by name, so the hash does not depend on the order in which modules were
    built.  Tied weights count once.  For a parameter off-loaded to disk (on the meta device),
    only name, dtype and shape count.
    """
    digest = hashlib.sha256()
    everything = [*model.named_parameters(), *model.named_buffers()]
    for name, parameter in sorted(everything, key=lambda item: item[0]):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1).cpu().contiguous()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def attention_of(model: nn.Module) -> str:
    """Returns the attention implementations of a model's configurations, such as `"sdpa"`."""
    found = {
        str(implementation)
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
        and (implementation := getattr(config, "_attn_implementation", None))
    }
    return ", ".join(sorted(found))


def source_commit() -> str | None:
    """Returns the commit of the hooked_vlm source, or `None` where it is not in a repository."""
    folder = Path(__file__).parents[1]
    # An installed copy may be inside another repository, which does not track its files.
    if _git(folder, "ls-files", "--error-unmatch", "report/provenance.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or a time-out
        return None
    return answer.stdout.strip()


def version_of(package: str) -> str:
    """Returns the version of an installed package, or `"not installed"`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"


def _peak_resident_mib() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here
