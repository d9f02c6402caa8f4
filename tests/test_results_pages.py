"""The documentation's results are made from a run, figure by figure and word by word."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from helpers import synthetic_results as synthetic
from hooked_vlm.disk.files import write_file
from hooked_vlm.report.results import save_result


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = Path(__file__).parent.parent / "docs" / "make_results.py"
    spec = importlib.util.spec_from_file_location("make_results", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path / "pages")
    return module


def test_pages_say_what_the_results_say(pages: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = {}
    for setting in ("squares", "shapes"):
        made = dataclasses.replace(synthetic.e1(), setting=setting, verdict=f"Found on {setting}.")
        save_result(made, run / "tiny-one" / "results", "key")
        results[setting] = made
    record = synthetic.provenance("tiny-one")
    write_file(run / "tiny-one" / "provenance.json", record.to_json())
    runs = pages.read(run)
    assert set(runs["tiny-one"][1]) == {"behaviour-squares", "behaviour-shapes"}
    page = pages.page("E1", runs)
    assert "Found on squares." in page and "Found on shapes." in page
    assert results["shapes"].claim not in page  # the claim is the experiment's own
    for line in page.splitlines():
        if line.startswith("!["):
            assert (pages.OUT / line.split("(")[1][:-1]).exists()
    index = pages.index(runs)
    assert "| squares | Found on squares. |" in index
    assert "| shapes | not run |" in index.split("## [E4](e4.md)")[1]
    with pytest.raises(SystemExit, match="no finished run"):
        pages.read(tmp_path / "nowhere")
