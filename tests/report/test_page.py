"""The page stands alone, shows every number, and says what the results say."""

import dataclasses
import functools
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import synthetic_results as synthetic
from hooked_vlm.experiments.result import Result
from hooked_vlm.report import index
from hooked_vlm.report import page as report
from hooked_vlm.report.explore import charts_of
from hooked_vlm.report.figures import drawings
from hooked_vlm.report.index import write_index
from hooked_vlm.report.look import CLASSES, KINDS, to_png
from hooked_vlm.report.page import key_numbers, numbers, write_report
from hooked_vlm.report.provenance import Provenance


SCRIPT = re.compile("<script.*?</script>", re.DOTALL)


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
        if not self._open or self._open[-1] not in {"style", "script"}:
            self.text.append(" ".join(data.split()))


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """Draws figures in a quarter of their resolution, without vectors, which saves most time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "to_png", functools.partial(to_png, dpi=40))
        patch.setattr(index, "to_png", functools.partial(to_png, dpi=40))
        patch.setattr(report, "vector_files", lambda _: {"svg": b"<svg/>", "pdf": b"%PDF"})
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(synthetic.all_results(), synthetic.provenance(), out)
    return out


def test_page_needs_nothing_but_itself(written: Path) -> None:
    page = Page(written / "report.html")
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"link", "iframe"} & set(page.tags)  # scripts stand in the page: no sources
    text = SCRIPT.sub("", (written / "report.html").read_text())
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
        assert page.text.count(result.verdict) >= 1
        assert result.headline in page.text
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
        f"{name}.{ending}"
        for name in (
            "E1-accuracy",
            "E2-final-token",
            "E3-probe-accuracy",
            "E3-probe-maps-items",
            "E3-probe-maps",
            "E4-swap-by-slot",
        )
        for ending in ("pdf", "png", "svg")
    ]
    for name in (name for name in figures if name.endswith("png")):
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


def explored(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The numbers of the charts and maps to explore on a page, by their result."""
    found = re.search('id="explored">(.*?)</script>', path.read_text())
    return json.loads(found[1]) if found else {}


def test_lines_to_explore_have_the_numbers_over_slots(written: Path) -> None:
    charts = {anchor: own["charts"] for anchor, own in explored(written / "report.html").items()}
    assert set(charts) == {synthetic.e2().anchor, synthetic.e4().anchor}
    for result, line, labels in (
        (synthetic.e2(), "direction", {}),
        (synthetic.e4(), "kind", KINDS),
    ):
        table, own = result.table, charts[result.anchor]
        assert sum(len(chart["rows"]) for chart in own) == len(table)
        for chart in own:
            here = table
            for part in chart["label"].split(" · "):
                here = here[(here["direction"] == part) | (here["quantity"] == part)]
            assert here["quantity"].nunique() == 1  # one unit on one chart
            names = [labels[name].label if labels else name for name in here[line]]
            assert set(chart["names"]) == set(names) and len(chart["colors"]) == len(set(names))
            found = pd.DataFrame(chart["rows"])
            assert list(found["name"]) == names and list(found["slot"]) == list(here["slot"])
            for column in ("value", "low", "high"):
                np.testing.assert_allclose(found[column], here[column], atol=1e-4)


def test_a_page_without_numbers_over_slots_has_no_script(tmp_path: Path) -> None:
    page = Page(write_report([synthetic.e1()], synthetic.provenance(), tmp_path))
    assert "script" not in page.tags


def test_maps_to_explore_have_the_numbers_of_every_layer(tmp_path: Path) -> None:
    result = synthetic.depth()
    path = write_report([result], synthetic.provenance(), tmp_path)
    (own,) = explored(path).values()
    assert own["charts"] == []
    assert [found["label"] for found in own["maps"]] == ["horizontal", "vertical"]
    for found, expected in zip(own["maps"], result.arrays["maps"].values, strict=True):
        assert found["sites"] == result.config["sites"]
        np.testing.assert_allclose(found["values"], expected, atol=0.51e-4)
    assert own["maps"][1]["classes"] == list(CLASSES["vertical"])
    assert f'id="{result.anchor}-maps"' in path.read_text()


def test_cases_that_failed_are_listed_with_their_pictures(tmp_path: Path) -> None:
    result = synthetic.e1()
    page = Page(write_report([result], synthetic.provenance(), tmp_path))
    assert "Which failed: 2 of 3 questions answered wrongly" in page.text
    assert "left of <b>" in page.text and "above blue" not in page.text
    assert result.cases is not None
    none = dataclasses.replace(result.cases, table=result.cases.table.assign(ok=True))
    result = dataclasses.replace(result, cases=none)
    text = Page(write_report([result], synthetic.provenance(), tmp_path)).text
    assert "Which failed: 0 of 3 questions answered wrongly." in text


def test_a_name_cannot_end_the_script(tmp_path: Path) -> None:
    odd = "</script><b>"
    table = synthetic.e4().table.replace({"direction": {"left": odd}})
    result = dataclasses.replace(synthetic.e4(), table=table)
    path = write_report([result], synthetic.provenance(), tmp_path)
    assert any(odd in chart["label"] for chart in explored(path)[result.anchor]["charts"])


def charts_for(**columns: list[Any]) -> list[dict[str, Any]]:
    table = pd.DataFrame({"quantity": "q", "value": 0.5, **columns})
    return charts_of(dataclasses.replace(synthetic.e1(), table=table))


def test_single_probes_and_single_slots_have_no_line() -> None:
    (chart,) = charts_for(
        slot=[0, 1, 0, 1, 2],
        quantity=["q", "q", "q", "q", "other"],
        probe=[None, None, 1.0, 1.0, None],
    )
    line = {"name": "q", "value": 0.5}
    assert chart["rows"] == [{"slot": 0, **line}, {"slot": 1, **line}]


def test_whatever_tells_numbers_apart_is_chosen() -> None:
    charts = charts_for(slot=[0, 1] * 2, ground=["white"] * 2 + ["photograph"] * 2)
    assert [chart["label"] for chart in charts] == ["white", "photograph"]
    # Of two values of one line at one slot neither is shown.
    assert charts_for(slot=[0, 1, 1]) == []


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
    assert page.text.count("Not run.") == 2  # E3 of the second: in the summary and its section
    assert page.text.count(synthetic.e1().headline) == 4
    assert page.text.count(synthetic.e1().claim) == 2
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


def with_probes(table: pd.DataFrame) -> pd.DataFrame:
    """A table of E3 with claims about the mean over probes and about each of two."""
    rows = [
        {"axis": axis, "quantity": "accuracy, claim", "value": value, "low": 0.4, "high": 0.9}
        | {"n": 90, "null": 1 / 3, "p": 0.01, "p_holm": 0.02, "probe": probe}
        for axis in ("horizontal", "vertical")
        for probe, value in ((None, 0.6125), (0, 0.7135), (1, 0.5145))
    ]
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def test_what_e3_concludes_from_is_a_table_of_means_over_probes(tmp_path: Path) -> None:
    result = synthetic.e3()
    result = dataclasses.replace(result, table=with_probes(result.table))
    page = write_report([result], synthetic.provenance(), tmp_path).read_text()
    means = page.split("<summary>Means over probes</summary>")[1].split("</details>")[0]
    assert "0.613" in means or "0.612" in means
    assert "0.514" not in means and "0.713" not in means and "0.714" not in means
    assert (
        "Means over probes"
        not in write_report(
            [synthetic.e1()], synthetic.provenance(), tmp_path / "other"
        ).read_text()
    )


def test_figures_of_probes_show_means_and_no_claims() -> None:
    result = synthetic.e3()
    both = [result, dataclasses.replace(result, table=with_probes(result.table))]
    first, second = (next(iter(drawings(one))).figure for one in both)
    marks = [len(figure.axes[0].containers) for figure in (first, second)]
    labels = [t.get_text() for t in second.legends[0].get_texts()]
    assert marks[0] == marks[1] and not any("claim" in label for label in labels)


def test_captions_say_what_a_dotted_line_is() -> None:
    """Each line at chance or zero that a figure's code draws is named in its caption."""
    folder = Path(report.__file__).parent / "figures"
    for path in folder.glob("*.py"):
        for call in path.read_text().split("yield Drawing(")[1:]:
            if re.search(r"chance=", call):
                assert re.search("[Dd]otted|OF_ENTITIES|OF_PLACES|ZERO", call), path
