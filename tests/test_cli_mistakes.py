"""Mistakes on the command line: one line, exit status 2, before a model loads, nothing stored."""

import errno
import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.main import get_command

from hooked_vlm import cli
from hooked_vlm.experiments import options, registry
from hooked_vlm.experiments.options import Config
from hooked_vlm.report import job as runner
from hooked_vlm.report.folder import folder_name
from hooked_vlm.stimuli.pictures import is_inside


ITEM = [1, "A photo of a cat to the left of a dog", "A photo of a cat to the right of a dog"]


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), "red").save(path)
    return path


def bomb(path: Path) -> None:
    """Writes a PNG that claims to have 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"0")), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def spatial(folder: Path, text: str | bytes) -> None:
    picture(folder / "data" / "val2017" / "000000000001.jpg")
    file = folder / "data" / "coco_qa_two_obj.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of good and bad data; loading a model is a failure of the test."""

    class Loader:
        @staticmethod
        def from_pretrained(name: str, **_: object) -> None:
            raise AssertionError(f"the model {name} was loaded")

    monkeypatch.setattr(runner, "HookedVLM", Loader)
    monkeypatch.setattr("hooked_vlm.model.vlm.HookedVLM", Loader)
    (tmp_path / "empty").mkdir()
    (tmp_path / "word").write_text('{"seting": "shapes"}')
    (tmp_path / "value").write_text('{"pairs": 1}')
    picture(tmp_path / "cut" / "a.png")
    whole = picture(tmp_path / "cut" / "b.png")
    whole.write_bytes(whole.read_bytes()[:60])
    bomb(tmp_path / "bomb" / "a.png")
    outside = picture(tmp_path / "secret.jpg").with_suffix("")
    spatial(tmp_path / "latin", '[["é"]]'.encode("latin-1"))
    spatial(tmp_path / "null", "null")
    spatial(tmp_path / "deep", "[" * 200_000)
    spatial(tmp_path / "short", json.dumps([[1, 2], None, "a", {"a": 1}]))
    spatial(tmp_path / "up", json.dumps([["../../../secret", *ITEM[1:]]]))
    spatial(tmp_path / "absolute", json.dumps([[str(outside), *ITEM[1:]]]))
    spatial(tmp_path / "good", json.dumps([ITEM]))
    (tmp_path / "good" / "data" / "val2017" / "000000000001.jpg").write_bytes(b"no picture")
    return tmp_path


def status(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


CASES: dict[str, tuple[str, str]] = {
    "g1 a setting": ("final-token --set setting=shapes", "Use --setting."),
    "g1 a seed": ("final-token --set seed=3", "Use --seed."),
    "g1 a folder": ("final-token --set data=x", "Use --data."),
    "g3 an empty folder": (
        "dual-mechanisms --setting squares-photos --backgrounds {empty}",
        "There are no pictures",
    ),
    "g3 no folder": ("final-token --cutouts {nowhere}", "There is no folder"),
    "g3 a reproduction": ("reproduce --backgrounds {empty}", "There are no pictures"),
    "g6 grids on shapes": ("grid-probes --setting shapes", "Use one of: grids."),
    "g6 several on one": ("alpha-transfer --setting shapes", "Use one of: several."),
    "g6 photographs twice": ("photographs --setting shapes-photos", "Did you mean 'shapes'?"),
    "g6 composites on photographs": (
        "composite-artefacts --setting shapes-photos",
        "Did you mean 'shapes'?",
    ),
    "g6 a list on shapes": ("coco-spatial --setting shapes", "Use one of: coco."),
    "g6 one object alone": ("redundancy --setting whatsup-chair", "There is no setting"),
    "g6 two values": (
        "amplification --set controls=1 --set controls=2",
        "--set controls was given twice, as '1' and '2'",
    ),
    "g6 nan": ("amplification --set alphas=0,nan", "alphas must be finite (got nan)"),
    "g6 infinite": ("amplification --set alphas=0,inf", "must be finite (got inf)"),
    "g6 no alpha": ("amplification --set alphas=", "alphas is empty"),
    "g6 no control": ("amplification --set controls=-1", "from 0 to 1000 (got -1)"),
    "i1 one pair": ("final-token --pairs 1", "--pairs must be a whole number from 2"),
    "i1 one item": ("redundancy --set items=1", "items must be 0 (all questions) or at least 2"),
    "i2 a setting": ("behaviour --setting shaps", "Did you mean 'shapes'?"),
    "i2 a setting of a suite": ("dual-mechanisms --setting shaps", "Did you mean 'shapes'?"),
    "i2 a setting of an option": (
        "alpha-transfer --set settings=squares,shaps",
        "Did you mean 'shapes'?",
    ),
    "i2 data without a list": (
        "behaviour --setting whatsup-chair --data {empty}",
        "There is no 'data/controlled_images_dataset.json'",
    ),
    "i2 no data": ("coco-spatial", "give --data FOLDER"),
    "i2 no boxes": ("coco-amplification --data {good}", "instances_val2017.json"),
    "i2 a value": ("amplification --set alphas=0,a", "alphas='a' is no number"),
    "i2 a name": ("amplification --set alpha=1", "Did you mean 'alphas'?"),
    "i2 no option": ("final-token --set alphas=1", "The experiment has none."),
    "i2 a style": ("coco-spatial --data {good} --set style=chioce", "Did you mean 'choice'?"),
    "i2 a list": ("coco-spatial --data {good} --set name=coco_qa", "must be one of"),
    "i2 a picture cut short": (
        "behaviour --setting squares-photos --backgrounds {cut}",
        "b.png' cannot be read as a picture",
    ),
    "i2 a photograph that is none": (
        "coco-spatial --data {good}",
        "000000000001.jpg' cannot be read as a picture",
    ),
    "i3 a negative seed": ("ordering-probes --seed -1", "--seed must be a whole number from 0"),
    "i3 a large seed": (f"ordering-probes --seed {2**64}", "--seed must be a whole number from 0"),
    "i3 meta": ("behaviour --device meta", "experiments run on cpu, cuda or mps"),
    "i3 no device": ("behaviour --device=", "--device was given '', an empty text"),
    "i3 no batch": ("behaviour --batch-size 0", "--batch-size must be a whole number from 1"),
    "i3 an empty batch": ("behaviour --set batch_size=0", "Use --batch-size."),
    "i3 no image": ("grid-probes --set images=0", "images must be a whole number from 8"),
    "i3 no grid": ("grid-probes --set ks=0", "ks must be a whole number from 2 to 8"),
    "i3 a bomb": (
        "behaviour --setting squares-photos --backgrounds {bomb}",
        "pixels, the most that PIL opens",
    ),
    "i3 latin-1": ("coco-spatial --data {latin}", "is not JSON in UTF-8"),
    "i3 null": ("coco-spatial --data {null}", "expected a list"),
    "i3 nested": ("coco-spatial --data {deep}", "nested too deeply"),
    "i3 entries": ("coco-spatial --data {short}", "has no usable item"),
    "i2 no path of boxes": (
        "coco-amplification --data {good} --set boxes=",
        "Option boxes='' is no path (or none)",
    ),
    "i1 a limit": ("behaviour --limit 1", "--limit must be a whole number of at least 2 (got 1)"),
    "i2 a choice": ("redundancy --set cut=al", "must be one of: objects, all (got 'al'). Did you"),
    "i2 no file": ("behaviour --config {nowhere}", "cannot be read as JSON"),
    "i2 a word in a file": ("behaviour --config {word}", "Did you mean 'setting' or 'set'?"),
    "i2 a value in a file": ("behaviour --config {value}", "--pairs must be a whole number"),
    "i2 an option without a name": ("behaviour --set =3", "--set '=3' was given; expected NAME="),
    "h7 a list that leads out": ("coco-spatial --data {up}", "has no usable item"),
    "h7 an absolute path": ("coco-spatial --data {absolute}", "has no usable item"),
}


@pytest.mark.parametrize("case", CASES)
def test_g1_g3_g6_i1_i2_i3_h7_a_mistake_is_found_before_a_model_loads(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    line, says = CASES[case]
    names = {path.name: str(path) for path in files.iterdir()}
    words = line.format_map({**names, "nowhere": files / "nowhere"}).split()
    out = files / "out"
    assert status(monkeypatch, "run", *words, "--model", "tiny-gemma-3", "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("hooked-vlm: ") and said.count("\n") == 1
    assert len(said) <= 400 + len("hooked-vlm: ") + 2 * len(str(files))
    assert not out.exists()


def test_i3_check_refuses_a_dtype_and_a_device_before_it_loads(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, "check", "tiny-gemma-3", "--dtype", "f32") == 2
    assert "Did you mean 'float32'?" in capsys.readouterr().err
    assert status(monkeypatch, "check", "tiny-gemma-3", "--device", "meta") == 2
    assert "experiments run on cpu, cuda or mps" in capsys.readouterr().err


EMPTY = {
    "run": "behaviour --model tiny-gemma-3 --out out",
    "demo": "--out out",
    "reproduce": "--out out",
    "sites": "tiny-gemma-3",
    "check": "tiny-gemma-3",
    "view": "tiny-gemma-3 --out v.html",
    "report": "out",
    "options": "E5",
    "merge": "out",
    "plan": "behaviour --model tiny-gemma-3",
    "compare": "one two --out out",
    "list": "",
}


def test_every_command_is_among_those_that_refuse_empty_texts() -> None:
    assert set(EMPTY) == set(get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", EMPTY)
def test_i2_an_empty_text_is_refused_everywhere(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    # As a path it would be the current folder.
    monkeypatch.chdir(files / "empty")
    parameters = get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    flags = [p.opts[0] for p in parameters if not getattr(p, "is_flag", False)]
    positional = [flag for flag in flags if flag[0] != "-"]
    for flag in flags:
        for empty in ("", "  "):
            words = EMPTY[command].split()
            if flag in positional:
                words[positional.index(flag)] = empty
            else:
                words.append(f"{flag}={empty}")
            assert status(monkeypatch, command, *words) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"hooked-vlm: {flag} was given {empty!r}, an empty text.")
    assert list(Path.cwd().iterdir()) == []


def test_g6_in_a_suite_an_experiment_keeps_the_one_setting_that_it_has() -> None:
    made = {step.experiment.name: step.setting for step in registry.steps("reproduce", "objects")}
    assert made["grid-probes"] == "grids"
    assert made["alpha-transfer"] == "several"
    assert made["encoder-depth"] == "objects"


def test_g6_every_experiment_runs_on_its_own_default() -> None:
    for experiment in registry.EXPERIMENTS.values():
        config = experiment.config()
        assert not config.settings_allowed or config.setting in config.settings_allowed


def test_i1_the_configuration_itself_refuses_what_the_command_line_does() -> None:
    for wrong in ({"pairs": 1}, {"seed": -1}, {"seed": 2**40}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be a whole number"):
            Config(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("data/a.jpeg", True),
        ("a..b.jpeg", True),
        ("../a.jpeg", False),
        ("a/../../b.jpeg", False),
        ("a/../b.jpeg", False),
        ("/etc/passwd", False),
        ("..\\a.jpeg", False),
        ("C:\\a.jpeg", False),
        ("\\\\host\\a.jpeg", False),
        ("a\0.jpeg", False),
    ],
)
def test_h7_a_name_that_leads_out_of_its_folder(name: str, inside: bool) -> None:
    assert is_inside(name) == inside


def test_h5_models_of_one_name_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "checkpoint").mkdir(parents=True)
    names = [str(tmp_path / parent / "checkpoint") for parent in ("one", "two")]
    folders = [folder_name(name) for name in (*names, "a/model", "b/model", "model")]
    assert len(set(folders)) == 5
    assert folders[0].startswith("checkpoint-") and folders[4] == "model"
    monkeypatch.chdir(tmp_path / "one")
    assert folder_name("checkpoint") == folders[0]
    out = tmp_path / "out"
    for name in ("..", ".", "../..", "/", "../one/checkpoint", "...", "..\\x", "~", ""):
        folder = (out / folder_name(name)).resolve()
        assert folder.parent == out.resolve(), name


FAILURES: dict[str, tuple[Callable[[], BaseException], str]] = {
    "disk full": (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "The disk is full"),
    "quota": (lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "The disk is full"),
    "memory": (lambda: MemoryError(), "Out of memory"),
    "cuda": (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried"), "Out of memory"),
    "cpu": (
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        "Out of memory",
    ),
    "permission": (lambda: PermissionError(13, "Permission denied", "/x"), "'/x' cannot be read"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_i3_what_the_machine_lacks_is_one_sentence_that_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    make, says = FAILURES[case]

    def fail(*_: object, **__: object) -> None:
        raise make()

    monkeypatch.setattr(runner, "run", fail)
    words = ("run", "behaviour", "--model", "tiny-gemma-3", "--out", str(tmp_path / "out"))
    assert status(monkeypatch, *words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"hooked-vlm: {says}")
    assert f"results and finished units are kept in {tmp_path / 'out'}." in said
    assert "run the command again to resume" in said

    monkeypatch.setattr(options, "from_words", fail)  # outside of a run
    assert status(monkeypatch, *words) == 1
    assert capsys.readouterr().err.startswith(f"hooked-vlm: {says}")


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(options, "from_words", fail)
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "run", "e", "--model", "m", "--out", "o"])
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("option", ["--backgrounds", "--cutouts"])
def test_i3_a_pipe_among_pictures_is_not_waited_for(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    (files / "pipes").mkdir()
    for name in ("a", "b", "c"):
        os.mkfifo(files / "pipes" / f"{name}.png")
    setting = "squares-photos" if option == "--backgrounds" else "objects"
    words = ["run", "behaviour", "--model", "tiny-gemma-3", "--out", str(files / "out")]
    signal.alarm(60)  # else the test would wait, too
    try:
        assert status(monkeypatch, *words, "--setting", setting, option, str(files / "pipes")) == 2
    finally:
        signal.alarm(0)
    assert "a.png' is no file. Replace it" in capsys.readouterr().err


def test_i3_a_path_that_is_too_long_is_named_by_its_end(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "behaviour", "--model", "tiny-gemma-3", "--out", str(files / "out")]
    assert status(monkeypatch, *words, "--data", "x" * 5000) == 1
    said = capsys.readouterr().err
    assert "cannot be read or written" in said and len(said) <= 400
