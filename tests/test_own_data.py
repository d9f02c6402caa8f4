"""The command line on a user's own data: what the guide's page tells, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_readme import ROOT, blocks

from hooked_vlm import cli


PAGE = ROOT / "docs" / "guide" / "own-data.md"
RUN = ("--model", "tiny-qwen2-vl", "--out", "out")


def status(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two rows, as a folder `own` in the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "own" / "a.png")
    rows = [{"image": "a.png", "question": f"Q{i}", "answer": "red"} for i in range(2)]
    (tmp_path / "own" / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "own"


REFUSED = {
    "E4": "hooked-vlm: E4 needs `counterfactual` in every row; 2 of 2 rows have none, and",
    "D1": "hooked-vlm: D1 needs `boxes` in every row; 2 of 2 rows have none.",
    "ordering-ablation": "hooked-vlm: E5 needs single-object pictures",
    "swap-under-ablation": "hooked-vlm: E6 needs single-object pictures",
    "grid-probes": "hooked-vlm: E8 needs pictures that it draws itself",
    "dual-mechanisms": "hooked-vlm: E2 needs `counterfactual` in every row; 2 of 2 rows have none",
    "reproduce": "hooked-vlm: --data 'own' was given, and nothing of it is read by reproduce",
}


@pytest.mark.parametrize(("name", "said"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_run_is_said_before_a_model_loads(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
) -> None:
    assert status(monkeypatch, "run", name, "--data", folder.name, *RUN) == 2
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == 1
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_problems_are_listed_before_a_model_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "items.jsonl").write_text('{"image": "b.png", "question": "", "answer": "red"}')
    assert status(monkeypatch, "run", "behaviour", "--data", folder.name, *RUN) == 2
    assert capsys.readouterr().err == (
        "hooked-vlm: 2 problems in items.jsonl; nothing was run.\n"
        "  items.jsonl:1: question is empty\n"
        "  items.jsonl:1: image 'own/b.png' is missing\n"
    )


def test_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status(monkeypatch, "run", "box-ablation", *RUN) == 2
    assert "The setting 'own' needs your data: give data=FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_the_guides_page_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks(PAGE, "python")[0], {})
    for line in "".join(blocks(PAGE, "bash")).splitlines():
        command, *words = line.split()
        assert command == "hooked-vlm"
        assert status(monkeypatch, *words) == 0
    page = Path("out/report.html").read_text()
    for name in ("E1-own", "E2-own", "E3-own", "E4-own"):
        assert f'id="{name}"' in page
    assert len(list(Path("out/figures").glob("*.png"))) >= 4
