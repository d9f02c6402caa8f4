"""The notebooks: what they store is complete, and a run gives what they store."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from notebooks import FILES, code_cells, differ, executed, read, text_of

from docs.set_repository import address, colab, install


ROOT = Path(__file__).parent.parent
QUICK = {"first-steps"}
IDS = [path.stem for path in FILES]
pytest.importorskip("nbformat", reason="the extra test is not installed")


def test_every_notebook_is_listed_where_readers_look() -> None:
    assert len(FILES) == 7
    for page, link in (
        ("README.md", "(docs/notebooks/{}.ipynb)"),
        ("docs/notebooks/index.md", "({}.md)"),
        ("mkdocs.yml", ": notebooks/{}.md"),
    ):
        text = (ROOT / page).read_text()
        assert not [path.stem for path in FILES if link.format(path.stem) not in text], page


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_what_is_stored_is_complete(path: Path) -> None:
    notebook, stored = read(path), path.read_text()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name != "stdout"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.findall(r"/(?:home|root|tmp|work|Users|mnt|opt)/|[A-Z]:\\\\", stored)
    assert path.stat().st_size < 600_000
    assert json.loads(stored)["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_opens_in_colab_and_installs_the_package(path: Path) -> None:
    title, first = read(path).cells[:2]
    assert colab(path.stem, address()) in title.source.splitlines()
    assert first.source == install(address())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_links_between_notebooks_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert link.startswith("http") or (path.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in QUICK], ids=lambda p: p.stem)
def test_a_run_prints_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which is quick; a kernel is started by the slow test."""
    transformer = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    enabled = torch.is_grad_enabled()
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(code_cells(read(path)), start=1):
            printed = io.StringIO()
            code = compile(transformer.transform_cell(cell.source), f"cell {number}", "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            stored = "".join(o.text for o in cell.outputs if o.output_type == "stream")
            assert not differ(stored, printed.getvalue()), f"cell {number}: {printed.getvalue()}"
    finally:
        torch.set_grad_enabled(enabled)
        pyplot.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_kernel_gives_what_is_stored(path: Path) -> None:
    pytest.importorskip("nbclient")
    for before, now in zip(code_cells(read(path)), code_cells(executed(path)), strict=True):
        kinds = [[sorted(o.get("data", {})) for o in cell.outputs] for cell in (before, now)]
        assert kinds[0] == kinds[1], before.source
        assert not differ(text_of(before), text_of(now)), f"{before.source}\n{text_of(now)}"
