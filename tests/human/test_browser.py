"""The rating page in a real Chromium: eight raters at once, a killed server, keys alone, a phone, hostile answers."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from llm_at_home.data.questions import load_questions
from llm_at_home.human.study import Study

from .conftest import Server, write_run

pytestmark = pytest.mark.slow

QUESTIONS, MODELS, RATERS = 4, ("none", "nf4", "gptq"), 8
ITEMS = QUESTIONS * len(MODELS)
HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><svg onload='window.ran = 3'>\n"
    "</div></main></form><form action='https://example.org'><button>Free money</button></form>\n"
    "[click](javascript:window.ran=4) **bold** # heading\n"
    "\u202e\u2066right to left\u202e and no end of it\n"
    + "x" * 20_000
    + "\n\u05e9\u05dc\u05d5\u05dd, \u0645\u0631\u062d\u0628\u0627\n\x07\x1b[31mred"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    first = load_questions("home_bench", limit=1)[0].question_id
    texts = {first: [HOSTILE, HOSTILE]}
    runs = [write_run(tmp_path / "runs", name, QUESTIONS, texts if name == "nf4" else None) for name in MODELS]
    begun = Server(tmp_path / "study", *map(str, runs))
    yield begun
    if begun.process.poll() is None:
        begun.kill()


def on_disk(server: Server) -> dict[tuple[int, int], int | None]:
    study = Study(server.study)
    grades = {(row.rater, row.position): row.grade for row in study.grades()}
    study.close()
    return grades


def hostile_position(server: Server, rater: int) -> int:
    study = Study(server.study)
    first = study.questions()[0].question_id
    rows = [r for r in study.grades() if (r.rater, r.model, r.question_id) == (rater, "tiny-nf4", first)]
    study.close()
    return rows[0].position


def saved(page: Any) -> None:
    page.locator("#state").filter(has_text=re.compile("^Saved$")).wait_for()


def test_eight_raters_finish_while_the_server_is_killed_twice_and_nothing_acknowledged_is_lost(server, chromium):
    from playwright.async_api import Error

    chosen: dict[tuple[int, int], int] = {}
    acknowledged: dict[tuple[int, int], int] = {}
    lost: list[Any] = []

    async def heard(rater: int, response: Any) -> None:
        if response.request.method == "POST" and response.status == 200:
            fields = parse_qs(response.request.post_data)
            position = int(response.url.rsplit("/", 1)[1])
            acknowledged[rater, position] = int(fields["grade"][0])

    async def rate(browser: Any, rater: int) -> None:
        context = await browser.new_context()
        page = await context.new_page()
        page.on("response", lambda response: asyncio.ensure_future(heard(rater, response)))
        await page.goto(server.links[rater])
        await page.get_by_role("link", name="Start").click()
        while True:
            try:
                await page.wait_for_selector("form[data-rating], main[data-rating]", timeout=8000)
            except Error:  # the browser's own error page: killed between the question whether it is there and the load
                with contextlib.suppress(Error):
                    await page.reload()
                continue
            form = await page.query_selector("form[data-rating]")
            if form is None:
                if await page.get_by_text(f"All {ITEMS} answers are graded").count():
                    break
                await page.get_by_role("link", name="Go on").click()
                continue
            position = int(await form.get_attribute("data-position"))
            grade = 1 + (rater * 7 + position * 3) % 5
            chosen[rater, position] = grade
            if position % 2:
                await page.keyboard.press(str(grade))
            else:
                await page.locator(".grades label").nth(grade - 1).click()
            before = page.url
            await page.locator("#next").click()
            with contextlib.suppress(Error):  # killed before the next page was there: the loop loads it again
                await page.wait_for_url(lambda url, before=before: url != before, timeout=60_000)
        await context.close()

    async def kill_now_and_then() -> None:
        for share in (0.25, 0.6):
            while len(acknowledged) < share * RATERS * ITEMS:
                await asyncio.sleep(0.01)
            server.process.kill()
            seen = dict(acknowledged)
            await asyncio.to_thread(server.process.communicate)
            found = on_disk(server)
            lost.extend(item for item in seen.items() if found[item[0]] != item[1])
            await asyncio.sleep(2)
            await asyncio.to_thread(server.start)

    async def everybody() -> None:
        from playwright.async_api import async_playwright

        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            raters = [rate(browser, rater) for rater in range(1, RATERS + 1)]
            await asyncio.wait_for(asyncio.gather(kill_now_and_then(), *raters), 240)
            await browser.close()

    asyncio.run(everybody())
    assert lost == []
    assert len(chosen) == RATERS * ITEMS
    assert on_disk(server) == chosen


def test_a_grade_waits_in_the_browser_until_the_server_is_back_even_if_the_page_is_closed(server, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.links[1] + "2")
    server.kill()
    page.keyboard.press("4")
    page.get_by_text("Not saved yet: question 1, answer 2. The server does not answer.").wait_for()
    page.close()
    server.start()
    assert on_disk(server)[1, 2] is None
    page = context.new_page()
    page.goto(server.links[1])
    page.get_by_text(f"You have graded 1 of {ITEMS} answers.").wait_for()
    assert on_disk(server)[1, 2] == 4
    # In another browser the link leads to the same state.
    page = browser.new_page()
    page.goto(server.links[1] + "2")
    assert page.get_by_role("radio", name="4").is_checked()


def test_a_comment_is_kept_though_the_page_is_left_while_typing(server, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.links[1] + "1")
    page.keyboard.press("3")
    saved(page)
    page.get_by_label("Comment").press_sequentially("half a word")
    page.goto("about:blank")
    page.goto(server.links[1] + "1")
    saved(page)
    assert page.get_by_label("Comment").input_value() == "half a word"
    study = Study(server.study)
    assert study.page(1, 1).item.comment == "half a word"
    study.close()


def test_a_grade_that_the_server_refuses_is_said_to_be_unsaved(server, browser):
    page = browser.new_page()
    page.goto(server.links[1] + "1")
    page.locator("[name=form_token]").evaluate("element => { element.value = 'of another page'; }")
    page.keyboard.press("2")
    page.get_by_text("Not saved: question 1, answer 1. This form is not from your own page").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert page.url.endswith("/1")
    assert on_disk(server)[1, 1] is None
    page.reload()
    page.keyboard.press("3")
    saved(page)
    assert on_disk(server)[1, 1] == 3


def test_next_goes_on_by_itself_once_the_server_is_back(server, browser):
    page = browser.new_page()
    page.goto(server.links[1] + "1")
    server.kill()
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.get_by_text("Not saved yet").wait_for()
    assert page.url.endswith("/1")
    server.start()
    page.wait_for_url("**/2")
    assert on_disk(server)[1, 1] == 2


def test_a_study_is_finished_with_keys_alone(server, browser):
    page = browser.new_page()
    page.goto(server.links[2])

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.evaluate("(document.activeElement.labels?.[0] ?? document.activeElement).innerText")
            if focused.strip().startswith(name):
                return
        raise AssertionError(f"Tab does not lead to {name}")

    tab_to("Start")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    page.keyboard.press("Enter")
    page.wait_for_url("**/1")
    for position in range(1, ITEMS + 1):
        page.keyboard.press(str(1 + position % 5))
        saved(page)
        if position == 1:
            tab_to("Comment")
            page.keyboard.type("in 5 words, not 3")
            page.keyboard.press("Tab")  # to the grades, whose arrow keys choose
            page.keyboard.press("ArrowRight")
            saved(page)
            assert page.get_by_role("radio", name="3").is_checked()
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/{position + 1}" if position < ITEMS else "**/")
    page.get_by_text(f"All {ITEMS} answers are graded").wait_for()
    expected = {position: 1 + position % 5 for position in range(1, ITEMS + 1)} | {1: 3}
    assert {position: grade for (rater, position), grade in on_disk(server).items() if rater == 2} == expected
    study = Study(server.study)
    assert study.page(2, 1).item.comment == "in 5 words, not 3"
    study.close()


def test_going_back_and_grading_anew(server, browser):
    page = browser.new_page()
    page.goto(server.links[3] + "1")
    assert page.locator("#next").inner_text() == "Skip"
    page.locator(".grades label").nth(1).click()
    assert page.locator("#next").inner_text() == "Next"
    page.locator("#next").click()
    page.wait_for_url("**/2")
    page.get_by_role("link", name="Back").click()
    page.wait_for_url("**/1")
    assert page.get_by_role("radio", name="2").is_checked()
    page.locator(".grades label").nth(4).click()
    saved(page)
    page.get_by_role("link", name="All answers").click()
    page.get_by_role("link", name="Question 1, answer 1: 5").wait_for()
    assert on_disk(server)[3, 1] == 5


@pytest.mark.parametrize("width", [320, 375])
def test_on_a_phone_nothing_is_too_wide_or_too_small(server, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    for end in ("", str(hostile_position(server, 4))):
        page.goto(server.links[4] + end)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = page.evaluate(
            """[...document.querySelectorAll("a, button, .grades label, textarea")].map((element) => {
              const box = element.getBoundingClientRect();
              return [element.textContent.trim(), box.width, box.height];
            }).filter(([, width, height]) => width < 44 || height < 44)"""
        )
        assert small == []
    page.locator(".grades label").nth(2).tap()
    saved(page)
    # The bar at the bottom does not lie on what is being written.
    page.get_by_label("Comment").focus()
    bar, comment = page.locator(".bar").bounding_box(), page.get_by_label("Comment").bounding_box()
    assert comment["y"] + comment["height"] <= bar["y"] + 1
    assert bar["height"] < 640 / 3
    page.locator("#next").tap()
    page.wait_for_url(re.compile(r"/(\d+)?$"))


def test_a_hostile_answer_is_text_and_nothing_else(server, browser):
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if server.links[5][:20] not in request.url else None)
    page.goto(server.links[5] + str(hostile_position(server, 5)))
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.ran") is None
    assert said == []
    shown = page.locator(".given .text").first
    assert shown.evaluate("element => element.textContent") == HOSTILE.replace("\r\n", "\n")
    assert shown.evaluate("element => element.children.length") == 0
    assert page.locator("form").count() == 1
    assert page.get_by_role("button").count() == 1
    # The text's direction ends with the text.
    boxes = [page.locator(".grades label").nth(i).bounding_box()["x"] for i in range(5)]
    assert boxes == sorted(boxes)
    assert page.locator(".given h2").first.inner_text() == "Answer"
    page.keyboard.press("1")
    saved(page)


def test_without_javascript_it_is_a_plain_form(server, browser):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(server.links[6])
    page.get_by_role("link", name="Start").click()
    page.locator("#next").click()
    assert "Choose a grade from 1 to 5 first." in page.content()
    for position in range(1, ITEMS + 1):
        page.locator(".grades label").nth(position % 5).click()
        page.locator("#next").click()
    assert page.get_by_text(f"All {ITEMS} answers are graded").count() == 1
    assert {p: g for (r, p), g in on_disk(server).items() if r == 6} == {p: 1 + p % 5 for p in range(1, ITEMS + 1)}


CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = numbers(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  return [...document.body.querySelectorAll("*")].filter((e) => own(e) && e.offsetParent).map((element) => {
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    return [element.textContent.trim().slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_asks_for(server, browser, scheme):
    page = browser.new_context(color_scheme=scheme).new_page()
    looked_at = 0
    for end in ("", "1", "wrong"):
        page.goto(server.links[7] + end)
        if end == "1":
            page.keyboard.press("3")
            saved(page)
            server.kill()
            page.keyboard.press("5")
            page.get_by_text("Not saved yet").wait_for()
        ratios = page.evaluate(CONTRAST)
        looked_at += len(ratios)
        assert [one for one in ratios if one[1] < 4.5] == []
        if end == "1":
            server.start()
            saved(page)
    assert looked_at > 40
