"""Pages have no accessibility errors, and none scrolls sideways on a phone: axe-core in a browser.

The rules' script comes with a package: `pip install --no-deps axe-playwright-python`.
"""

import contextlib
import functools
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import synthetic_results as synthetic
from helpers.browser import Browser, chromium
from helpers.built_site import built_site
from helpers.made_view import made_view
from hooked_vlm.disk.files import writable_folder
from hooked_vlm.report.compare import compare
from hooked_vlm.report.page import write_report
from hooked_vlm.report.results import RESULTS, save_result


pytestmark = pytest.mark.slow
WIDTHS = (390, 1200)
SCHEME = "return document.body.dataset.mdColorScheme"


@pytest.fixture(scope="module")
def rules() -> str:
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("needs axe-core: pip install --no-deps axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder; yields its address.  The site's own scripts do not run from files."""
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each on stderr."""

    def log_message(self, *_: object) -> None:
        pass


def violations(browser: Browser, rules: str, part: str = "html") -> list[str]:
    """What the rules find on a part as it is shown, with the first element of each finding."""
    browser.run(rules)
    found: Any = browser.wait_for(f"axe.run('{part}', {{resultTypes: ['violations']}})")
    wide = browser.run("return document.documentElement.scrollWidth - window.innerWidth")
    said = [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found["violations"]]
    return [*said, *([f"wider than the screen by {wide}"] if wide > 0 else [])]


def test_every_page_of_the_site(
    browser: Browser, rules: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = built_site(tmp_path_factory.mktemp("project"))
    pages = sorted(site.rglob("index.html"))
    assert len(pages) > 40
    wrong = {}
    with served(site) as address:
        for width, dark in ((390, True), (1200, False)):
            browser.as_seen(width=width, dark=dark)
            browser.show(address)  # the site keeps the first scheme that it was seen in
            browser.run("localStorage.clear()")
            for page in pages:
                name = page.parent.relative_to(site).as_posix()
                browser.show(f"{address}/{name}/")
                browser.wait_for("new Promise((drawn) => setTimeout(drawn, 300))")
                assert browser.run(SCHEME) == ("slate" if dark else "default")
                if found := violations(browser, rules):
                    wrong[f"{name}, {width} px"] = found
    assert not wrong, "\n".join(f"{page}: {found}" for page, found in wrong.items())


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_with_all_parts_open(
    browser: Browser, rules: str, width: int, dark: bool, tmp_path: Path
) -> None:
    results = [*synthetic.all_results(), synthetic.depth()]
    browser.as_seen(width=width, dark=dark)
    browser.open(write_report(results, synthetic.provenance(), tmp_path))
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    browser.wait_for("new Promise((drawn) => setTimeout(drawn, 300))")
    assert browser.run("return document.querySelectorAll('.chart svg').length") >= 3
    assert violations(browser, rules) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_two_runs_compared(
    browser: Browser, rules: str, width: int, dark: bool, tmp_path: Path
) -> None:
    makers = (synthetic.e1, synthetic.e2, synthetic.e4)
    steps = {make().key: 1.0 for make in makers}
    record = replace(synthetic.provenance(), seconds=steps)
    for seed in (10, 11):
        results = [make(seed=seed) for make in makers]
        folder = writable_folder(tmp_path / str(seed))
        for result in results:
            save_result(result, folder / RESULTS, "key")
        write_report(results, record, folder)
    browser.as_seen(width=width, dark=dark)
    browser.show(compare(tmp_path / "10", tmp_path / "11", tmp_path).page.as_uri())
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.run("return document.querySelectorAll('.summary tbody tr').length") == 3
    assert browser.run("return document.querySelectorAll('figure img').length") >= 6
    assert violations(browser, rules) == []


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("view") / "view.html"
    made_view().to_html(page)
    return page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_viewer_with_every_map(
    browser: Browser, rules: str, viewer: Path, width: int, dark: bool
) -> None:
    browser.as_seen(width=width, dark=dark)
    browser.open(viewer)
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    maps = browser.run("return [...document.querySelectorAll('#map option')].map((o) => o.value)")
    assert len(maps) >= 5
    assert violations(browser, rules) == []
    for name in maps:  # a map is shown in the first section; the others stay
        browser.choose("#map", name)
        assert violations(browser, rules, "#over") == [], name
