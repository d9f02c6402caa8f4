"""The report in a real browser: charts to explore show the numbers of the table."""

from collections.abc import Iterator

import numpy as np
import pytest

from helpers import synthetic_results as synthetic
from helpers.browser import Browser, chromium
from hooked_vlm.report.page import write_report


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    page = write_report(
        [*synthetic.all_results(), synthetic.depth()],
        synthetic.provenance(),
        tmp_path_factory.mktemp("report"),
    )
    with chromium() as browser:
        browser.as_seen(width=1200)
        browser.open(page)
        browser.run("document.documentElement.style.scrollBehavior = 'auto'")  # clicks do not wait
        yield browser


def numbers(browser: Browser, anchor: str) -> np.ndarray:
    """The numbers of a chart's table, without its first column."""
    script = """return [...document.querySelectorAll(arguments[0] + " tbody tr")].map(
        (row) => [...row.cells].slice(1).map((cell) => cell.textContent))"""
    rows = browser.run(script, f"#{anchor}-table")
    return np.array([[float(text.replace("−", "-")) for text in row] for row in rows])


def test_a_choice_of_lines_shows_their_numbers(opened: Browser) -> None:
    result = synthetic.e4()
    opened.click(f"#{result.anchor}-explore > summary")
    labels = opened.run(
        "return [...document.getElementById(arguments[0]).options].map((one) => one.text)",
        f"{result.anchor}-lines",
    )
    assert len(labels) > 1
    for i, label in enumerate(labels):
        opened.choose(f"#{result.anchor}-lines", str(i))
        direction, quantity = label.split(" · ")
        table = result.table
        table = table[(table["direction"] == direction) & (table["quantity"] == quantity)]
        expected = table.pivot_table(index="slot", columns="kind", values="value", sort=False)
        np.testing.assert_allclose(numbers(opened, result.anchor), expected.values, atol=0.51e-4)
    assert opened.log() == []


def test_a_layer_is_chosen_and_its_map_is_shown(opened: Browser) -> None:
    result = synthetic.depth()
    maps = result.arrays["maps"]
    opened.click(f"#{result.anchor}-maps > summary")
    for index, axis in enumerate(maps["axis"].values):
        opened.choose(f"#{result.anchor}-axis", str(index))
        for layer in (2, 0):
            opened.run(
                """const slider = document.getElementById(arguments[0]);
                slider.value = arguments[1]; slider.dispatchEvent(new Event("input"));""",
                f"{result.anchor}-layer",
                layer,
            )
            expected = maps.sel(axis=axis)[layer].values  # [class, row, col]
            shown = numbers(opened, f"{result.anchor}-map").reshape(
                expected.shape[1], len(expected), -1
            )
            np.testing.assert_allclose(shown.transpose(1, 0, 2), expected, atol=0.51e-4)
    site = opened.run(
        "return document.getElementById(arguments[0]).textContent", f"{result.anchor}-site"
    )
    assert site == "0: vision.0"
    cells = "return document.querySelectorAll(arguments[0]).length"
    assert (
        opened.run(cells, f"#{result.anchor}-map-chart [data-mark='cell'] rect") == maps[0, 0].size
    )
    assert opened.log() == []


def test_values_are_under_the_pointer(opened: Browser) -> None:
    result = synthetic.e2()
    opened.click(f"#{result.anchor}-explore > summary")
    opened.hover(f"#{result.anchor}-chart svg [data-mark='dot'] > :first-child")
    tip = opened.run(
        "return document.querySelector(arguments[0])?.textContent",
        f"#{result.anchor}-chart g[aria-label='tip']",
    )
    first = result.table.iloc[0]
    assert f"slot {first['slot']}" in tip
    assert f"{first['value']:.4f} [{first['low']:.4f}, {first['high']:.4f}]" in tip
