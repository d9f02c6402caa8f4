"""The documentation's site builds strictly, loads nothing from elsewhere, and has every name."""

import json
import re
from pathlib import Path

import pytest

import hooked_vlm
from helpers.built_site import built_site


ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "reference" / "api"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    return built_site(tmp_path_factory.mktemp("project"))


def test_every_page_of_the_documentation_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", config, re.MULTILINE)) == pages


def test_every_public_name_is_in_the_reference() -> None:
    listed = "\n".join(page.read_text() for page in API.glob("*.md"))
    homes = hooked_vlm._homes()
    named = set(re.findall(r"^::: (\S+)$", listed, re.MULTILINE))
    missing = [n for n, home in homes.items() if not {home, f"{home}.{n}"} & named]
    assert not missing


def test_search_finds_every_public_name(site: Path) -> None:
    found = json.loads((site / "search.json").read_text())
    titles = {entry["title"] for entry in found["items"]}
    assert set(hooked_vlm.__all__) <= titles


def test_notebooks_are_shown_with_their_figures(site: Path) -> None:
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        shown = (site / "notebooks" / path.stem / "index.html").read_text()
        assert shown.count("data:image/png;base64,") == path.read_text().count('"image/png"')
        cells = json.loads(path.read_text())["cells"]
        assert shown.count('class="highlight"') >= sum(c["cell_type"] == "code" for c in cells)


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = r"""<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)|<link[^>]*\shref="(https?:[^"]*)"""
    for page in site.rglob("*.html"):
        assert not re.findall(loads, page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?https?:", style.read_text()), style


def test_every_column_has_a_name(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"<th[^>]*></th>", page.read_text()), page


def test_examples_are_shown_as_code(site: Path) -> None:
    for page in (site / "reference" / "api").rglob("index.html"):
        text = page.read_text()
        assert not re.search(r"<(?:p|blockquote)>\s*(?:&gt;){3}", text), page
        assert text.count("<blockquote>") == 0, page
