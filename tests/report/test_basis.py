"""The key of a result changes with everything that its numbers depend on, and with nothing else."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from hooked_vlm import zoo
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.dual_mechanisms import amplification
from hooked_vlm.experiments.further import (
    alpha_transfer,
    coco_amplification,
    coco_spatial,
    grid_probes,
    photographs,
)
from hooked_vlm.experiments.options import Config
from hooked_vlm.extensions.origin import Origin
from hooked_vlm.report import basis as module
from hooked_vlm.report.basis import Basis, model_files, run_key
from hooked_vlm.report.provenance import attention_of, parameter_hash


BASIS = Basis(
    model_sha256="abc",
    model_files={"config.json": "1", "chat_template.jinja": "2"},
    attention="sdpa",
    dtype="float32",
    device="cpu",
    packages={"torch": "2.13.0", "transformers": "5.23.0", "hooked-vlm": "0.1.0"},
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Basis)])
def test_g2_every_part_of_the_basis_counts(name: str) -> None:
    value = getattr(BASIS, name)
    if isinstance(value, dict):
        other = {**value, "another": "3"}
    else:
        other = value + type(value)(2)
    changed = dataclasses.replace(BASIS, **{name: other})
    assert run_key("e", Config(), changed) != run_key("e", Config(), BASIS)


def test_g2_experiment_options_and_source_count(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = amplification.Config
    keys = {
        run_key("e", kind(), BASIS),
        run_key("other", kind(), BASIS),
        run_key("e", kind(pairs=51), BASIS),
        run_key("e", kind(alphas=(0.0, 1.0)), BASIS),
        run_key("e", kind(other_words=True), BASIS),
    }
    assert len(keys) == 5
    assert run_key("e", kind(), BASIS) in keys
    monkeypatch.setattr(module, "source_sha256", lambda: "other code of the same version")
    assert run_key("e", kind(), BASIS) not in keys


def test_g2_the_source_of_other_distributions_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for sha256 in ("1", "2"):
        found = {"experiment e": Origin("dist", "1.0", "dist.module", sha256)}
        monkeypatch.setattr(module, "origins", lambda *_, found=found: found)
        keys.add(run_key("e", Config(), BASIS))
    monkeypatch.setattr(module, "origins", lambda *_: {})
    assert len(keys | {run_key("e", Config(), BASIS)}) == 3


def changed_json(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "another": 1}))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
    ],
)
def test_g2_every_file_of_model_and_processor_counts(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.folder("tiny-gemma-3"), folder)
    path = folder / name
    assert path.exists()
    before, times = model_files(str(folder)), path.stat()
    assert model_files(str(folder)) == before == model_files("tiny-gemma-3")
    # Another content of the same size and time must count too.
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = model_files(str(folder))
    assert {n for n in before if before[n] != after[n]} == {name}


def test_g2_files_that_change_no_number_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.folder("tiny-gemma-3"), folder)
    before = model_files(str(folder))
    (folder / "NOTES.md").write_text("a note")
    (folder / "trainer_state.json").write_text("{}")
    assert model_files(str(folder)) == before
    assert "model.safetensors" not in before  # `parameter_hash` reads what was loaded
    assert model_files("no-such-model-here") == {}


def test_g2_buffers_count() -> None:
    norm = nn.BatchNorm1d(2)
    before = parameter_hash(norm)
    with torch.no_grad():
        norm.running_mean += 1  # type: ignore[operator]
    assert parameter_hash(norm) != before


def test_g2_attention_of_every_part_counts() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for part, name in zip(model, ("sdpa", "eager"), strict=True):
        part.config = type("Config", (), {"_attn_implementation": name})()  # type: ignore[assignment]
    assert attention_of(model) == "eager, sdpa"
    assert attention_of(nn.Linear(1, 1)) == ""


def picture(path: Path, color: str = "red", mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), color).save(path)


def cut_outs(folder: Path) -> Path:
    for name in ("apple", "pot", "bell", "hat", "rose"):
        image = Image.new("RGBA", (8, 8), "red")
        image.putpixel((0, 0), (0, 0, 0, 0))
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}.png")
    return folder


def coco(folder: Path) -> Path:
    ids = range(1, 4)
    for number in ids:
        picture(folder / "data" / "val2017" / f"{number:012}.jpg")
    entries = [[n, "A photo of a cat to the left of a dog", "wrong"] for n in ids]
    (folder / "data" / "coco_qa_two_obj.json").write_text(json.dumps(entries))
    boxes = {
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": n, "category_id": c, "bbox": [1, 1, 5, 5]} for n in ids for c in (1, 2)
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(boxes))
    return folder


def backgrounds_of(kind: type[Config], **options: object) -> Callable[[Path], Config]:
    def make(folder: Path) -> Config:
        picture(folder / "a.png")
        return kind(backgrounds=folder, **options)  # type: ignore[arg-type]

    return make


CASES: dict[str, tuple[Callable[[Path], Config], str]] = {
    "backgrounds": (backgrounds_of(Config, setting="shapes-photos"), "a.png"),
    "photographs": (backgrounds_of(photographs.Config), "a.png"),
    "transfer": (
        backgrounds_of(alpha_transfer.Config, settings=("squares", "squares-photos")),
        "a.png",
    ),
    "cutouts": (lambda f: Config(setting="objects", cutouts=cut_outs(f)), "apple.png"),
    "coco list": (lambda f: coco_spatial.Config(data=coco(f)), "data/coco_qa_two_obj.json"),
    "coco picture": (lambda f: coco_spatial.Config(data=coco(f)), "data/val2017/000000000002.jpg"),
    "coco boxes": (
        lambda f: coco_amplification.Config(data=coco(f)),
        "annotations/instances_val2017.json",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_g2_the_content_of_every_data_folder_counts(tmp_path: Path, case: str) -> None:
    make, changed = CASES[case]
    config = make(tmp_path / "one")
    key = run_key("e", config, BASIS)
    moved = make(tmp_path / "two")  # the same content elsewhere
    assert run_key("e", moved, BASIS) == key
    path = tmp_path / "two" / changed
    if path.suffix == ".json":
        path.write_text(path.read_text() + " ")
    else:
        with Image.open(path) as opened:
            image = opened.convert("RGBA" if path.suffix == ".png" else "RGB")
        image.putpixel((5, 5), (9, 9, 9))
        image.save(path)
    assert run_key("e", moved, BASIS) != key


def test_g2_folders_that_an_experiment_does_not_read_do_not_count(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    plain = run_key("e", Config(setting="shapes"), BASIS)
    assert run_key("e", Config(setting="shapes", backgrounds=tmp_path), BASIS) == plain
    grids = grid_probes.Config(backgrounds=tmp_path)
    assert run_key("e", grids, BASIS) == run_key("e", grid_probes.Config(), BASIS)


def test_h7_a_picture_that_cannot_be_opened_has_no_key(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    config = Config(setting="shapes-photos", backgrounds=tmp_path)
    with pytest.raises(DataError, match=r"a\.png' cannot be read as a picture"):
        run_key("e", config, BASIS)
