"""The report in a browser, as a person sees it: drawn, sorted, tabbed, in the dark, on a phone, without a request."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from browser import CHROMIUM, Page, chromium
from lossledger.ledger.samples import sample_columns
from lossledger.report import report
from test_report import HOSTILE, fake, save_with_pictures

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the report was not looked at")

DRAWN = "[...document.querySelectorAll('figure.chart')].every(figure => figure.dataset.drawn === 'yes')"
VISIBLE = (
    "[...document.querySelectorAll('[data-tab]')].filter(panel => panel.checkVisibility()).map(p => p.dataset.tab)"
)
CLASS_NAMES = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(row => row.cells[0].textContent)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    first = fake("plain", steps=40)
    first.info["findings"] = [{"code": "CLS2", "severity": "warning", "message": HOSTILE, "remedy": "Look."}]
    whole = next(row for row in reversed(first.rows) if (row.kind, row.role, row.step) == ("term", "data", None))
    quarter = replace(whole, kind="position", contribution=whole.contribution / 4, total=whole.total / 4)
    first.append([replace(quarter, group=f"{row},{column}") for row in (0, 8) for column in (0, 8)])
    names = ("total", "count", "weight", "mean", "contribution", "coefficient")
    for epoch in (1, 2):
        values = {"sample": np.arange(20), "confidence": np.linspace(0.1, 0.9, 20) ** epoch, "correct": np.ones(20)}
        values |= {name: np.ones(20) for name in names}
        first.append_samples(sample_columns("cce", "training", epoch, values))
    save_with_pictures(first, folder / "plain")
    save_with_pictures(fake(HOSTILE, dice=0.5, weight=3.0), folder / "dice")
    return report(folder, folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, runs: Path) -> Page:
    browser.forget()
    browser.view(1280)
    browser.open(runs.as_uri(), DRAWN)
    return browser


def test_charts_are_drawn_and_nothing_is_asked_or_complained_of(page: Page, runs: Path) -> None:
    charts = page.ask("document.querySelectorAll('figure.chart').length")
    assert charts >= 8
    lines = "[...document.querySelectorAll('figure.chart .plot')].map(p => p.querySelectorAll('path[d]').length)"
    assert min(page.ask(lines)) >= 1
    shape = "document.querySelector('figure.chart .mark-line path').getAttribute('d')"
    assert len(page.ask(shape)) > 20
    assert page.complaints() == []
    asked = page.requests()
    assert asked[0] == runs.as_uri() and all(address.startswith("data:image/png;base64,") for address in asked[1:])


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_in_light_and_dark(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    page.view(width, dark=dark)
    for tab in range(3):
        page.ask(f"document.querySelectorAll('#runs > .tablist [role=tab]')[{tab}].click()")
        assert page.ask("document.documentElement.scrollWidth") <= width
    background, text = page.ask(
        "(s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).slice(0, 3).map(Number)))"
        "(getComputedStyle(document.body))"
    )
    assert (sum(background) < 150 and sum(text) > 600) if dark else (sum(background) > 700 and sum(text) < 200)
    # Axis labels follow the text of the page.
    assert (
        page.ask("getComputedStyle(document.querySelector('.plot text')).fill.match(/\\d+/g).map(Number)")[:3] == text
    )
    png = page.picture(tmp_path / "page.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (width, 900) and len(png) > 10_000


def test_tabs_follow_the_mouse_and_the_keys(page: Page) -> None:
    names = page.ask("[...document.querySelectorAll('#runs > .tablist [role=tab]')].map(tab => tab.textContent)")
    assert names == ["Side by side", "dice", "plain"]
    assert page.ask(VISIBLE) == ["Side by side"]
    page.ask("document.querySelectorAll('#runs > .tablist [role=tab]')[0].focus()")
    page.press("ArrowRight", 39)
    assert page.ask(VISIBLE)[0] == "dice"
    page.press("End", 35)
    assert page.ask(VISIBLE)[0] == "plain"
    page.press("ArrowRight", 39)
    assert page.ask(VISIBLE) == ["Side by side"]
    page.ask("document.querySelectorAll('#runs > .tablist [role=tab]')[2].click()")
    chosen = "[...document.querySelectorAll('#runs > .tablist [aria-selected=true]')].map(tab => tab.textContent)"
    assert page.ask(chosen) == ["plain"]
    page.ask("[...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent === 'Checks (1)').click()")
    assert "Checks (1)" in page.ask(VISIBLE) and HOSTILE[:20] in page.ask("document.body.innerText")


def test_the_class_table_sorts(page: Page) -> None:
    page.ask("document.querySelectorAll('#runs > .tablist [role=tab]')[1].click()")
    assert page.ask(CLASS_NAMES) == ["road", "building", "tree", "car", "sign"]
    press = "document.querySelector('table.sortable').tHead.rows[0].cells[{}].querySelector('button').{}()"
    page.ask(press.format(0, "click"))
    assert page.ask(CLASS_NAMES) == ["building", "car", "road", "sign", "tree"]
    # Where present: by the number, not by its text; with the keyboard.
    page.ask(press.format(4, "focus"))
    page.press("Enter", 13)
    assert page.ask(CLASS_NAMES)[:2] == ["sign", "car"]
    assert page.ask("document.querySelector('table.sortable th[aria-sort]').getAttribute('aria-sort')") == "descending"
    page.press("Enter", 13)
    assert page.ask(CLASS_NAMES) == ["road", "building", "tree", "car", "sign"]


def test_samples_and_places_have_tabs_and_are_drawn(page: Page) -> None:
    page.ask("document.querySelectorAll('#runs > .tablist [role=tab]')[2].click()")
    here = "[...document.querySelectorAll('article:not([hidden]) {}')].find(found => {} === '{}')"
    for name, marks, number in (
        ("Confidence", ".mark-symbol.role-mark path", 20),
        ("Places", ".mark-rect.role-mark path", 4),
    ):
        page.ask(here.format("[role=tab]", "found.textContent", name) + ".click()")
        panel = here.format("[data-tab]", "found.dataset.tab", name)
        assert page.ask(f"{panel}.checkVisibility()")
        assert page.ask(f"{panel}.querySelectorAll('{marks}').length") == number


def test_charts_say_their_numbers_under_the_mouse(page: Page) -> None:
    page.ask("document.querySelectorAll('#runs > .tablist [role=tab]')[2].click()")
    place = "document.querySelector('article:not([hidden]) .mark-symbol path').getBoundingClientRect()"
    page.ask("document.querySelector('article:not([hidden]) .mark-symbol').scrollIntoView({block: 'center'})")
    x, y = page.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place})")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("!document.querySelector('.tooltip').hidden", 10)
    said = page.ask("document.querySelector('.tooltip').innerText")
    assert "epoch: 1" in said and "value: 0." in said


def test_without_scripts_everything_is_there(page: Page, runs: Path) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(runs.as_uri())
        seen = page.call("Accessibility.getFullAXTree")["nodes"]
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    said = " ".join(str(node.get("name", {}).get("value", "")) for node in seen)
    for words in ("The books balance", "Class sign is present in 0.20 %", "Side by side", "Provenance", "sample 37"):
        assert words in said
    assert sum(node.get("role", {}).get("value") == "table" for node in seen) >= 4


def test_print_shows_every_tab(page: Page) -> None:
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert set(page.ask(VISIBLE)) >= {"Side by side", "dice", "plain", "Worst samples", "Provenance", "Checks (1)"}
        assert not page.ask("document.querySelector('.tablist').checkVisibility()")
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
