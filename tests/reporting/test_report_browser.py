"""The report of the committed records in a real Chromium: desktop and phone, light and dark, and by keys alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_at_home.reporting import write_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Every text node's colour against the nearest background that is painted, as WCAG 2 computes it.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const seen = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || e.closest("script, title, desc")) continue;
    const ink = parse(e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color);
    let paper = [0, 0, 0, 0], at = e;
    for (; at && paper[3] === 0; at = at.parentElement) {
      const p = parse(getComputedStyle(at).backgroundColor);
      paper = p.length === 3 ? [...p, 1] : p;
    }
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
    const key = ink.join() + " on " + paper.join();
    seen.set(key, [(high + 0.05) / (low + 0.05), e.textContent.trim().slice(0, 40)]);
  }
  return [...seen].map(([key, [ratio, text]]) => [key, ratio, text]);
}"""
# Elements beyond the right edge that no box of their own scrolls.
BEYOND = """() => [...document.querySelectorAll("body *")].filter(e => {
  if (e.closest("thead, .wide, .hidden") || !e.getClientRects().length) return false;
  for (let at = e; at; at = at.parentElement) if (getComputedStyle(at).overflowX === "auto") return false;
  return e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report([ROOT / "results"], tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_fits_asks_for_nothing_and_can_be_read(browser, page, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert tab.locator("details.long").count() >= 4
    assert tab.evaluate("document.body.scrollHeight") < 120_000, "a page that nobody scrolls through"
    for details in tab.locator("main details").all():
        details.evaluate("one => one.open = true")
    assert said == []
    assert asked == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate(BEYOND) == []
    contrasts = tab.evaluate(CONTRAST)
    assert len(contrasts) >= 4
    assert [one for one in contrasts if one[1] < 4.5] == []
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    context.close()


def test_each_figure_is_named_and_keys_reach_what_scrolls_and_folds(browser, page):
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(page.as_uri())
    named = tab.evaluate(
        """() => [...document.querySelectorAll("main svg[role=img]")].map(svg =>
          svg.getAttribute("aria-labelledby").split(" ").map(id => document.getElementById(id).textContent.trim()))"""
    )
    assert len(named) > 20
    assert all(title and told for title, told in named)
    assert tab.evaluate("""() => [...document.querySelectorAll(".wide, .scroll")].every(e => e.tabIndex === 0)""")
    tab.locator("#figure-memory summary").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#figure-memory details[open] tbody tr").count() > 10
    tab.locator("#table-1 thead button").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#table-1 th[aria-sort=ascending]").count() == 1
    first = tab.locator("#table-1 tbody tr th").first.inner_text()
    assert first.startswith("AWQ")
    tab.close()


def test_a_figure_s_file_draws_by_itself(browser, page):
    tab = browser.new_page(viewport={"width": 900, "height": 800}, color_scheme="dark")
    for key in ("memory", "planner"):
        tab.goto((page.parent / "figures" / f"{key}.svg").as_uri())
        box = tab.evaluate(
            """() => { const r = document.documentElement.getBoundingClientRect(); return [r.width, r.height]; }"""
        )
        assert min(box) > 300
        assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 23, 26)"
        assert tab.evaluate("getComputedStyle(document.querySelector('text')).fill") != "rgb(0, 0, 0)"
    tab.close()


def test_the_page_prints(browser, page):
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator("nav").is_hidden()
    assert tab.pdf().startswith(b"%PDF")
    tab.close()
