"""Everything that the numbers of an experiment depend on, and its hash: the key of a result.

The key covers the weights, the files of the model and its processor, the user's pictures and
lists, all options, the versions of the packages that compute, this package's source, the
attention implementation, the dtype, the kind of device and the size of a sweep's passes.  It does
not cover the number of threads or the type of GPU, which change the last bits of a number.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hooked_vlm.anatomy.devices import compute_dtype
from hooked_vlm.disk.files import sha256_of
from hooked_vlm.engine.budget import PASS_TOKENS
from hooked_vlm.experiments.options import FOLDERS, Config
from hooked_vlm.experiments.registry import origins
from hooked_vlm.model.loading import local_folder
from hooked_vlm.report.provenance import PACKAGES, attention_of, parameter_hash, version_of
from hooked_vlm.report.results import FORMAT
from hooked_vlm.stimuli.pictures import checked_sha256


_SETTINGS_OF_A_MODEL = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".py", ".yaml"}
_MADE_BY_TRAINING = {"trainer_state.json", "all_results.json", "train_results.json"}


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What all numbers of a model's run depend on; a step's options and data come in addition."""

    model_sha256: str
    """See `parameter_hash`."""
    model_files: Mapping[str, str]
    """See `model_files`."""
    attention: str
    dtype: str
    device: str
    """The kind of device: cpu, cuda or mps."""
    packages: Mapping[str, str]
    pass_tokens: int = PASS_TOKENS
    """See `Sweep.run`: passes of another size give other last bits."""

    @classmethod
    def of(cls, model: nn.Module, name: str, device: str) -> "Basis":
        """Returns the basis of a loaded model; `name` is the user's name for it."""
        return cls(
            model_sha256=parameter_hash(model),
            model_files=model_files(name),
            attention=attention_of(model),
            dtype=str(compute_dtype(model)).removeprefix("torch."),
            device=torch.device(device).type,
            packages={package: version_of(package) for package in (*PACKAGES, "hooked-vlm")},
        )


def run_key(experiment: str, config: Config, basis: Basis) -> str:
    """Returns the hash of everything that an experiment's numbers and sentences depend on.

    Of a user's folder the content counts and not the path.  Unreleased versions of this package
    can share a number and differ in source, so the source counts too, as does that of the
    distributions whose experiment or setting is used.

    Raises `DataError` for a folder or a picture that cannot be read.
    """
    return key_of(everything(experiment, config, basis))


def everything(experiment: str, config: Config, basis: Basis) -> dict[str, Any]:
    """Returns what an experiment's numbers depend on, as JSON: `run_key` is its hash.

    Raises `DataError` as `run_key` does.
    """
    chosen = {name: value for name, value in asdict(config).items() if name not in FOLDERS}
    own = origins(experiment, (config.setting, *config.used_settings))
    found = {
        "format": FORMAT,
        "experiment": experiment,
        "options": chosen,
        "data": data_files(config),
        "basis": asdict(basis),
        "source": source_sha256(),
        "extensions": {use: asdict(origin) for use, origin in own.items()},
    }
    return json.loads(json.dumps(found, default=str))


def key_of(found: Mapping[str, Any]) -> str:
    """Returns the hash of what `everything` returned."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def data_files(config: Config) -> dict[str, str]:
    """Returns the SHA-256 of each of the user's files that an experiment reads.

    Raises `DataError` for a folder or a picture that cannot be read.
    """
    return {name: checked_sha256(path) for name, path in sorted(config.files().items())}


def model_files(name: str) -> dict[str, str]:
    """Returns the SHA-256 of each file of a model that is no weight: configuration, tokenizer,
    chat template and processor.

    The weights are hashed where they are used, by `parameter_hash`.
    """
    folder = local_folder(name)
    if folder is None:
        return {}
    files = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(files)
        if path.suffix in _SETTINGS_OF_A_MODEL
        and path.name not in _MADE_BY_TRAINING
        and path.is_file()
    }


@cache
def source_sha256() -> str:
    """Returns the SHA-256 of this package's source and of the pictures that it ships."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*root.rglob("*.py"), *root.glob("stimuli/assets/*/*")]):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
