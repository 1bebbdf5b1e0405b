"""Pages in a real browser: what is pointed at, clicked and moved. Needs Chromium and `pip install playwright`."""

import os
import shutil

import pytest

from moe_engine.pages.blocks import Chart, Heat, Mark, Page, Section, Words
from moe_engine.pages.page import html_of

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

LOADS = [("step 1", [[0.5, 1.5], [1, 1]]), ("step 2", [[1, 1], [0.25, 1.75]])]
PAGE = Page(
    "a run",
    "healthy",
    [
        Section(
            "Learning",
            [
                Chart(
                    "loss",
                    {
                        "training": ((1, 2, 3), (3.0, 2.0, 1.5)),
                        "test": ((1, 3), (4.0, 2.5)),
                        "stopped": ((1, 2), (7.0, 6.0)),
                    },
                    marks=[Mark(2, "4 to 5 experts (schedule: step 2)")],
                ),
                Heat(
                    "load", ["first", "second"], [("step 1", [[0.5, 1.5], [1, 1]]), ("step 2", [[1, 1], [0.25, 1.75]])]
                ),
            ],
        ),
        Section(
            "Tokens", [Words("text", ["un", "do"], {"a": [[(1, 0.75), (2, 0.25)], []], "b": [[(2, 1)], [(3, 1)]]})]
        ),
        Section("Layer", [Chart("cv", {"cv": ((1, 2), (0.1, 0.2))})], folded=True),
    ],
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield made
        made.close()


@pytest.fixture(params=[1200, 390])
def page(request, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(html_of(PAGE))
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    failures = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on("request", lambda asked: failures.append(asked.url) if not asked.url.startswith("file:") else None)
    opened.goto(path.as_uri())
    yield opened
    assert failures == []
    opened.close()


def point(page, element, x, y):
    """Move the mouse to a place in an element, given as shares of its size."""
    box = page.locator(element).first.bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])


def test_pointing_at_a_line_tells_step_and_values(page):
    point(page, ".u-over", 0.999, 0.5)
    legend = page.locator("figure.chart .u-legend").first.inner_text()
    assert "3" in legend and "1.500" in legend and "2.500" in legend


def test_a_line_tells_its_last_value_until_another_is_pointed_at(page):
    """Also one that ends before the others."""
    legend = page.locator("figure.chart .u-legend").first
    assert all(value in legend.inner_text() for value in ("1.500", "2.500", "6.000"))
    point(page, ".u-over", 0.001, 0.5)
    assert all(value in legend.inner_text() for value in ("3.000", "4.000", "7.000"))
    page.mouse.move(1, 1)
    assert "6.000" in legend.inner_text()


def test_pointing_at_a_mark_tells_the_reason(page):
    tip = page.locator("figure.chart .tip").first
    assert "schedule" not in tip.inner_text()
    point(page, ".u-over", 0.5, 0.5)
    assert tip.inner_text() == "step 2: 4 to 5 experts (schedule: step 2)"


def test_a_click_on_a_name_hides_its_line(page):
    name = page.locator("figure.chart .u-series").nth(2)
    assert "u-off" not in name.get_attribute("class")
    name.locator("th").click()
    assert "u-off" in name.get_attribute("class")


def test_pointing_at_a_cell_tells_layer_expert_and_load(page):
    point(page, "figure.heat canvas", 0.95, 0.6)  # the last column of the second row
    assert page.locator("figure.heat .tip").inner_text() == "layer second, expert 1: 1.75 of an even share"


def test_the_slider_moves_through_the_steps(page):
    label = page.locator("figure.heat label span")
    assert label.inner_text() == "step 2"
    page.locator("figure.heat input").press("ArrowLeft")
    assert label.inner_text() == "step 1"
    point(page, "figure.heat canvas", 0.95, 0.25)
    assert page.locator("figure.heat .tip").inner_text() == "layer first, expert 1: 1.50 of an even share"


def test_pointing_at_a_token_tells_its_experts_and_gates_in_the_chosen_layer(page):
    tokens, tip = page.locator(".sample span"), page.locator(".words .tip")
    tokens.nth(0).hover()
    assert tip.inner_text() == "expert 1: gate 0.75, expert 2: gate 0.25"
    tokens.nth(1).hover()
    assert "expert" not in tip.inner_text().replace("experts", "")
    colour = "element => getComputedStyle(element).backgroundColor"
    assert tokens.nth(1).evaluate(colour) == "rgba(0, 0, 0, 0)"
    page.locator(".words select").select_option("b")
    tokens.nth(0).hover()  # a mouse that does not move tells nothing
    tokens.nth(1).hover()
    assert tip.inner_text() == "expert 3: gate 1"
    assert tokens.nth(1).evaluate(colour) != "rgba(0, 0, 0, 0)"
    assert page.locator(".words .chips span").all_inner_texts() == ["2", "3"]


def test_what_is_folded_is_drawn_when_it_is_opened(page):
    assert page.locator("details .uplot").count() == 0
    page.locator("summary").click()
    page.locator("details .uplot").wait_for()


def test_nothing_is_wider_than_the_page(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_change_to_dark_mode_redraws(page):
    before = page.evaluate("document.querySelector('figure.heat canvas').toDataURL()")
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert page.evaluate("document.querySelector('figure.heat canvas').toDataURL()") != before
