"""Every example runs from top to bottom, on a shipped model, and prints what it says."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch


EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
QUICK = {
    "read_and_write",
    "patch_a_region",
    "sweep_over_slots",
    "your_own_model",
    "e3_ordering_probes",
    "e4_strip_swap",
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_example_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [path.name])
    enabled = torch.is_grad_enabled()
    try:
        runpy.run_path(str(path))
    finally:
        torch.set_grad_enabled(enabled)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) > 3
    assert not any("nan" in line for line in said)


def test_every_example_says_how_to_run_it() -> None:
    for path in EXAMPLES:
        assert f"python examples/{path.name}" in path.read_text(), path.name


STUDIES = [p for p in sorted((EXAMPLES[0].parent / "studies").glob("*.py")) if p.stem != "common"]
QUICK_STUDIES = {"zhang2025_information_flow"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in QUICK_STUDIES else pytest.mark.slow)
        for path in STUDIES
    ],
    ids=lambda path: path.stem,
)
def test_study_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(path.parent))
    enabled = torch.is_grad_enabled()
    try:
        runpy.run_path(str(path))
    finally:
        torch.set_grad_enabled(enabled)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) > 3
    assert not any("nan" in line.split() for line in said)
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 5000


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_short_cites_its_paper_and_says_how_to_run_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    doc = str(ast.get_docstring(tree))
    assert f"python examples/studies/{path.name}" in doc
    assert re.search(r"\b(19|20)\d\d\b", doc.splitlines()[0])
    code = path.read_text().split('"""', 2)[2].splitlines()
    lines = [line for line in code if line.strip()]
    lines = [line for line in lines if not line.lstrip().startswith(("#", "from ", "import "))]
    assert len(lines) <= 63, len(lines)
    assert "hooked_vlm.hooks" not in path.read_text()


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem[0] == "e"], ids=lambda p: p.stem)
def test_help_is_not_taken_for_a_model(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    enabled = torch.is_grad_enabled()
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path))
    finally:
        torch.set_grad_enabled(enabled)
    assert end.value.code == 0
    assert "MODEL" in capsys.readouterr().out
