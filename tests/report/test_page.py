"""The page stands alone, shows every number, and says what the results say."""

import dataclasses
import functools
import io
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import synthetic_results as synthetic
from hooked_vlm.experiments.result import Result
from hooked_vlm.report import page as report
from hooked_vlm.report.look import to_png
from hooked_vlm.report.page import key_numbers, numbers, write_index, write_report
from hooked_vlm.report.provenance import Provenance


class Page(HTMLParser):
    """What a page links to, shows and says, and whether its tags close."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.sources, self.ids = [], [], set()
        self.tags, self.text, self.alts = [], [], []
        self._open: list[str] = []
        self.feed(path.read_text())
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [given[key] for key in ("href",) if key in given]
        self.sources += [given[key] for key in ("src",) if key in given]
        self.alts += [given.get("alt")] * (tag == "img")
        self.ids |= {given[key] for key in ("id",) if key in given}
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text.append(" ".join(data.split()))


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """Draws figures in a quarter of their resolution, which is most of the time saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "to_png", functools.partial(to_png, dpi=40))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(synthetic.all_results(), synthetic.provenance(), out)
    return out


def test_page_needs_nothing_but_itself(written: Path) -> None:
    page = Page(written / "report.html")
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    text = (written / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (written / link).exists()


def test_page_says_what_the_results_say(written: Path) -> None:
    page = Page(written / "report.html")
    for result in synthetic.all_results():
        assert {result.id} <= page.ids
        assert page.text.count(result.claim) == 2  # in the summary and in its section
        assert page.text.count(result.verdict) == 2
        assert all(note in page.text for note in result.notes)
    assert all(alt and len(alt) > 10 for alt in page.alts)


def test_every_number_is_on_the_page_and_in_the_csv(written: Path) -> None:
    page = Page(written / "report.html")
    table = pd.read_csv(written / "numbers.csv")
    assert len(table) == sum(len(result.table) for result in synthetic.all_results())
    for result in synthetic.all_results():
        rows = table[table["experiment"] == result.id]
        np.testing.assert_allclose(rows["value"], result.table["value"], rtol=1e-12)
        assert all(f"{value:.3f}" in page.text for value in result.table["value"])
    assert set(table["model"]) == {"tiny-qwen2-vl"}


def test_files_beside_the_page(written: Path) -> None:
    record = Provenance.from_json((written / "provenance.json").read_text())
    assert record == synthetic.provenance()
    figures = sorted(path.name for path in (written / "figures").iterdir())
    assert figures == [
        "E1-accuracy.png",
        "E2-final-token.png",
        "E3-probe-accuracy.png",
        "E3-probe-maps-items.png",
        "E3-probe-maps.png",
        "E4-swap-by-slot.png",
    ]
    for name in figures:
        with Image.open(written / "figures" / name) as picture:
            assert min(picture.size) > 40
    assert not list(written.rglob("*.tmp"))


def test_same_results_same_bytes(written: Path, tmp_path: Path) -> None:
    write_report(synthetic.all_results(), synthetic.provenance(), tmp_path)
    for path in written.rglob("*.*"):
        assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_markup_in_a_name_is_shown_not_obeyed(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script>"
    table = synthetic.e1().table.replace({"direction": {"left": odd}})
    result = dataclasses.replace(synthetic.e1(), verdict=odd, table=table)
    page = Page(write_report([result], synthetic.provenance(odd), tmp_path))
    assert "script" not in page.tags
    assert odd in page.text


def test_a_result_without_figures_has_its_table(tmp_path: Path) -> None:
    result = dataclasses.replace(synthetic.e1(), id="E99", images={})
    page = Page(write_report([result], synthetic.provenance(), tmp_path))
    assert page.sources == []
    assert "All numbers (4 rows)" in page.text


def test_missing_intervals_leave_their_cells_empty(tmp_path: Path) -> None:
    table = synthetic.e1().table.assign(low=np.nan, high=np.nan)
    result = dataclasses.replace(synthetic.e1(), id="E99", table=table)
    assert "nan" not in Page(write_report([result], synthetic.provenance(), tmp_path)).text


def test_a_page_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report([synthetic.e1()], synthetic.provenance(), tmp_path)
    before = page.read_bytes()

    def fail(_: Result) -> list:
        raise MemoryError

    monkeypatch.setattr(report, "drawings", fail)
    with pytest.raises(MemoryError):
        write_report([synthetic.e1()], synthetic.provenance("another"), tmp_path)
    assert page.read_bytes() == before


def test_numbers_keeps_slots_whole() -> None:
    table = numbers([synthetic.e1(), synthetic.e4()], "m")
    read = pd.read_csv(io.StringIO(table.to_csv(index=False)), dtype=str)
    assert set(read["slot"].dropna()) == {str(slot) for slot in range(9)}
    assert read["slot"].isna().sum() == 4
    assert list(read.columns[:3]) == ["model", "experiment", "name"]


def test_numbers_of_nothing() -> None:
    assert numbers([], "m").empty


def test_key_numbers_are_ranges_of_the_best_slots() -> None:
    table = pd.DataFrame(
        {
            "direction": ["left", "left", "above", "above"],
            "kind": "strip",
            "quantity": "swapped",
            "slot": [0, 1, 0, 1],
            "value": [0.2, 0.9, 0.4, 0.3],
        }
    )
    (tile,) = key_numbers([dataclasses.replace(synthetic.e4(), table=table)])
    assert tile.value == "0.40–0.90"
    (tile,) = key_numbers([dataclasses.replace(synthetic.e4(), table=table[:2])])
    assert tile.value == "0.90"


def test_index_sets_models_side_by_side(tmp_path: Path) -> None:
    both = {"one": [synthetic.e1(), synthetic.e3()], "two": [synthetic.e1()]}
    reports = {}
    for folder, results in both.items():
        record = synthetic.provenance(f"model {folder}")
        write_report(results, record, tmp_path / folder)
        reports[folder] = (results, record)
    page = Page(write_index(reports, tmp_path, title="Two models"))
    for link in page.links:
        path, _, anchor = link.partition("#")
        target = Page(tmp_path / path) if path else page
        assert anchor == "" or anchor in target.ids
    assert page.text.count("Not run.") == 1  # E3 of the second
    assert page.text.count(synthetic.e1().verdict) == 2
    assert {"E1", "E3"} <= page.ids


def test_key_numbers_of_results_without_single_directions_or_axes() -> None:
    table = pd.DataFrame(
        {
            "direction": ["all", None],
            "axis": [None, "horizontal"],
            "kind": ["released", "released"],
            "quantity": ["net, held-out alpha", "background"],
            "ground": [None, "photographs"],
            "value": [0.25, 0.75],
        }
    )
    for made, value in (("E7", "0.25"), ("E9", "0.75")):
        result = dataclasses.replace(synthetic.e1(), id=made, table=table)
        assert value in {tile.value for tile in key_numbers([result])}
