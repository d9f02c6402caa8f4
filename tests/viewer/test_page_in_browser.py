"""The page in a real browser: clicks and keys lead to the numbers that Python computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.browser import Browser, chromium
from helpers.made_view import made_view
from hooked_vlm import HookedVLM, View, view


pytestmark = pytest.mark.slow


@dataclass
class Opened:
    browser: Browser
    made: View
    page: Path

    def number(self, selector: str) -> float:
        """The first number after a colon in a text of the page."""
        text = self.browser.text(selector).replace("−", "-")
        return float(text.split(": ")[1].split()[0])

    def table(self, panel: str) -> np.ndarray:
        """The numbers of a panel's table, without its first column."""
        script = """return [...document.querySelectorAll(arguments[0] + " tbody tr")].map(
            (row) => [...row.cells].slice(1).map((cell) => cell.textContent))"""
        rows = self.browser.run(script, f"#{panel}-table")
        return np.array([[float(text.replace("−", "-")) for text in row] for row in rows])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with chromium() as browser:
        made = made_view()
        page = tmp_path_factory.mktemp("view") / "view.html"
        made.to_html(page)
        browser.as_seen(width=1200)
        yield Opened(browser, made, page)


SHOWN = 0.51e-4
"""Half of the last decimal that is shown, and the steps of the embedded numbers."""


def test_clicks_lead_to_pythons_numbers(opened: Opened) -> None:
    browser, arrays = opened.browser, opened.made.arrays
    browser.open(opened.page)
    cell = "#cells [role=row]:nth-child(3) [role=gridcell]:nth-child(2)"  # row 2, column 1
    browser.click(cell)
    browser.choose("#map", "patches")
    browser.choose("#answer", "1")
    slot = browser.run("return new URLSearchParams(location.hash.slice(1)).get('slot')")
    place = 2 * opened.made.grid.cols + 1
    want = float(arrays["patches"].sel(slot=int(slot), place=place)[1])
    assert opened.number("#status") == pytest.approx(want, abs=SHOWN)
    both = arrays["patches"].isel(place=[place, len(opened.made.grid)], answer=1)
    np.testing.assert_allclose(opened.table("patches"), both.values, atol=SHOWN)
    browser.choose("#map", "attention")
    browser.choose("#head", "2")
    layer = int(browser.run("return document.getElementById('layer').value"))
    last = len(opened.made.tokens) - 1
    maps = arrays["attention"].sel(layer=layer, query=last)
    assert opened.number("#status") == pytest.approx(float(maps[2, 2, 1]), abs=SHOWN)
    share = arrays["attention_share"].sel(query=last)
    np.testing.assert_allclose(opened.table("attention"), share.values, atol=SHOWN)
    # Hovering shows another cell's value; leaving the grid shows the chosen one's again.
    browser.hover("#cells [role=row]:nth-child(4) [role=gridcell]:nth-child(4)")
    assert opened.number("#status") == pytest.approx(float(maps[2, 3, 3]), abs=SHOWN)
    assert not browser.log()


def test_keys_move_the_cell_and_the_address_keeps_the_state(opened: Opened) -> None:
    browser, arrays = opened.browser, opened.made.arrays
    browser.open(opened.page, "#row=1&col=1&map=lens&slot=4&answer=0&head=wrong")
    browser.run("document.querySelector('.cell[tabindex=\"0\"]').focus()")
    browser.press("right", "right", "down", "up", "down")
    focused = "return document.activeElement.getAttribute('aria-label')"
    assert browser.run(focused).startswith("Row 2, column 3: ")
    position = int(opened.made.grid.positions[2, 3])
    want = float(arrays["lens"].sel(slot=4)[position, 0])
    assert opened.number("#status") == pytest.approx(want, abs=SHOWN)
    np.testing.assert_allclose(opened.table("lens"), arrays["lens"][:, position], atol=SHOWN)
    browser.press("enter")  # the cell is the token whose attention is shown
    layer = int(browser.run("return document.getElementById('layer').value"))
    maps = arrays["attention"].sel(layer=layer, query=position).mean("head")
    assert opened.number("#status") == pytest.approx(float(maps[2, 3]), abs=SHOWN)
    state = browser.run("return location.hash")
    status = browser.text("#status")
    browser.open(opened.page, state)
    assert browser.text("#status") == status
    assert not browser.log()


def test_probes_and_a_slot_without_one(opened: Opened) -> None:
    browser = opened.browser
    browser.open(opened.page, "#map=probe%200%202&slot=3&row=2&col=0")
    maps = opened.made.arrays["probes.horizontal"]
    assert opened.number("#status") == pytest.approx(float(maps.sel(slot=3)[2, 2, 0]), abs=SHOWN)
    np.testing.assert_allclose(opened.table("probe-0"), maps[:, :, 2, 0], atol=SHOWN)
    browser.open(opened.page, "#map=probe%200%202&slot=4")
    assert "no probe" in browser.text("#status") and "no probe" in browser.text("#probe-0-here")


def test_a_click_on_the_chart_chooses_layer_and_head(opened: Opened) -> None:
    browser = opened.browser
    browser.open(opened.page, "#layer=0&head=mean")
    browser.run("document.getElementById('attention-chart').scrollIntoView({block: 'center'})")
    square = "#attention-chart svg:last-of-type g[data-mark=cell] rect:nth-child(11)"  # 2, head 2
    browser.hover(square)
    browser.click(square)
    state = browser.run("return Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    assert (state["layer"], state["head"]) == ("2", "2")


def test_every_control_is_reached_by_tab_and_named(opened: Opened) -> None:
    browser = opened.browser
    browser.open(opened.page)
    reached = []
    for _ in range(40):
        browser.press("tab")
        reached.append(
            browser.run("return document.activeElement.id || document.activeElement.className")
        )
    order = ["cell", "map", "answer", "layer", "head", "slot", "opacity", "copy"]
    places = [reached.index(name) for name in order]
    assert places == sorted(places)
    unnamed = """return [...document.querySelectorAll("input, select, button, [role=gridcell]")]
        .filter((one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).length"""
    assert browser.run(unnamed) == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_screen(opened: Opened, width: int, dark: bool) -> None:
    browser = opened.browser
    browser.as_seen(width=width, dark=dark)
    browser.open(opened.page)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    ink, paper = browser.run(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    light = [int(text.strip("rgb()").split(",")[0]) for text in (ink, paper)]
    assert (light[0] > light[1]) == dark
    browser.as_seen(width=1200)


def test_it_prints_without_its_controls_for_screens(opened: Opened) -> None:
    browser = opened.browser
    browser.open(opened.page)
    browser.as_seen(width=800, media="print")
    assert browser.run(
        "return getComputedStyle(document.getElementById('copy')).display"
    ) == "none" or (browser.run("return document.getElementById('copy').offsetParent === null"))
    browser.as_seen(width=1200)


def test_a_picture_of_one_cell_row_is_shown(opened: Opened, tmp_path: Path) -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    made = view(model, Image.new("RGB", (64, 16), "red"), "What?", panels=["lens"])
    made.to_html(tmp_path / "v.html")
    opened.browser.open(tmp_path / "v.html")
    assert "Row 0" in opened.browser.text("#status") and not opened.browser.log()
