"""The rating page over real HTTP: who gets in, what is refused, and that nothing tells which model wrote what."""

from __future__ import annotations

import http.client
import re
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from llm_at_home.data.questions import load_questions
from llm_at_home.human.study import DATABASE, Study

from .conftest import Server, write_run

JSON = {"Accept": "application/json"}
TOKEN = re.compile(r'name="form_token" value="([^"]+)"')
HOSTILE = "<script>document.title='ran'</script>\n<img src=x onerror=\"document.title='ran'\"> {{ 7 * 7 }} &amp;"


class Browser:
    """Just enough of one: requests to one rater's link."""

    def __init__(self, server: Server, rater: int) -> None:
        self.server, self.rater = server, rater
        self.link = urlsplit(server.links[rater])

    def another(self) -> Browser:
        """The last rater, who grades nothing in these tests."""
        return Browser(self.server, 20)

    def grades(self) -> list[int | None]:
        """What is on disk, in the order of the pages."""
        study = Study(self.server.study)
        found = [item.grade for item in study.items(self.rater)]
        study.close()
        return found

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> Any:
        connection = http.client.HTTPConnection(self.link.hostname or "", self.link.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read().decode()
        finally:
            connection.close()

    def get(self, end: str = "") -> Any:
        return self.ask("GET", self.link.path + end)

    def form_token(self) -> str:
        found = TOKEN.search(self.get("1")[2])
        assert found
        return found[1]

    def grade(self, end: str, headers: dict[str, str] | None = None, **fields: str) -> Any:
        fields = {"form_token": self.form_token(), **fields}
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.ask("POST", self.link.path + end, urlencode(fields), **kind, **(headers or {}))


def begin(folder: Path) -> Server:
    first = load_questions("home_bench", limit=1)[0].question_id
    runs = [write_run(folder / "runs", "none"), write_run(folder / "runs", "nf4", texts={first: [HOSTILE, " "]})]
    return Server(folder / "study", *map(str, runs), "--raters", "20", "--limit", "2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for all tests that leave it running; each has a rater of its own."""
    server = begin(tmp_path_factory.mktemp("shared"))
    yield server, iter(range(1, 21))
    server.kill()


@pytest.fixture
def rater(shared):
    server, numbers = shared
    return Browser(server, next(numbers))


@pytest.fixture
def own_rater(tmp_path):
    server = begin(tmp_path)
    yield Browser(server, 1)
    if server.process.poll() is None:
        server.kill()


def test_a_rater_reads_grades_goes_back_and_grades_anew(rater):
    assert "You will read 4 answers" in rater.get()[2]
    status, headers, _ = rater.grade("1", grade="4", comment="fine")
    assert (status, headers["location"]) == (303, "2")
    assert rater.grade("1", grade="2", comment="")[0] == 303
    status, headers, _ = rater.grade("4", grade="5")
    assert (status, headers["location"]) == (303, "./")
    assert rater.grades() == [2, None, None, 5]
    page = rater.get("1")[2]
    assert 'value="2" checked' in page
    assert "2 of 4 graded" in page
    assert 'href="2">Go on</a>' in rater.get()[2]
    # Another rater's own grades are another matter.
    assert "0 of 4 graded" in rater.another().get("1")[2]


def test_in_the_background_the_reply_is_json_with_the_progress(rater):
    assert rater.grade("2", JSON, grade="3", comment="x")[::2] == (200, '{"graded":1,"of":4}')
    assert rater.grade("2", JSON, grade="3", comment="x")[::2] == (200, '{"graded":1,"of":4}')


def test_nothing_that_is_served_tells_a_model_a_run_or_an_id(rater):
    seen = []
    for end in ("", "1", "2", "3", "4"):
        status, headers, body = rater.get(end)
        assert status == 200
        seen.append(body + str(headers))
    for name in ("rate.js", "rate.css", "icon.svg"):
        seen.append(rater.ask("GET", f"/static/{name}")[2])
    for word in ("tiny", "nf4", "none-", "secret-answer", "hash-", "home_bench", "question_id", "writing"):
        assert not [text for text in seen if word in text], word
    assert "model" not in "".join(seen)


def test_an_answer_is_shown_as_text(rater):
    page = next(body for body in (rater.get(end)[2] for end in "1234") if "document.title" in body)
    assert "&lt;script&gt;document.title=&#39;ran&#39;&lt;/script&gt;\n&lt;img" in page
    assert "{{ 7 * 7 }} &amp;amp;" in page
    assert "The assistant gave no text here." in page
    assert re.findall(r"<script[^>]*>", page) == ['<script src="../../static/rate.js" defer>']
    assert not re.search(r"\son\w+=|style=", re.sub(r"&lt;img.*", "", page))


def test_a_wrong_link_leads_nowhere(rater):
    other = "A" if rater.link.path[-2] != "A" else "B"
    wrong = f"{rater.link.path[:-2]}{other}/"
    outside = ["/", "/r/", "/r/%C3%A9/", wrong[:-1], "/study.sqlite", "/static/../web.py", "/static/%2e%2e/web.py"]
    no_item = ["nothing", "0", "5", "9" * 30, "1/2", "-1"]
    for path in [*(wrong + end for end in ("", "1", "5")), *outside, *(rater.link.path + end for end in no_item)]:
        status, headers, body = rater.ask("GET", path)
        assert status == 404, path
        assert "content-security-policy" in headers
        assert "Open your own link" in body
    assert rater.ask("POST", wrong + "1", "grade=3")[0] == 404
    assert rater.get()[0] == 200


def test_a_link_that_lost_its_last_stroke_still_leads_there(rater):
    status, headers, _ = rater.ask("GET", rater.link.path[:-1])
    assert (status, headers["location"]) == (307, rater.link.path.split("/")[2] + "/")


def test_a_form_from_elsewhere_is_refused(rater):
    assert rater.grade("1", grade="3", form_token="")[0] == 403
    assert rater.grade("1", grade="3", form_token=rater.another().form_token())[0] == 403
    assert rater.grade("1", grade="3", form_token="é")[0] == 403
    for site in ("cross-site", "same-site"):
        assert rater.grade("1", {"Sec-Fetch-Site": site}, grade="3")[0] == 403
    assert rater.ask("POST", rater.link.path + "1", "{}", **{"Content-Type": "application/json"})[0] == 415
    assert rater.ask("PUT", rater.link.path + "1", "")[0] == 405
    assert rater.grades() == [None] * 4
    assert rater.grade("1", {"Sec-Fetch-Site": "same-origin"}, grade="3")[0] == 303


def test_a_bad_grade_is_refused_and_the_comment_is_still_on_the_page(rater):
    for grade in ("0", "6", "2.5", "five", "-1", " 3", "３", "1e0"):
        status, _, body = rater.grade("1", grade=grade, comment="took me a while <b>")
        assert status == 422
        assert "A grade is a whole number from 1 to 5." in body
        assert "took me a while &lt;b&gt;</textarea>" in body
        assert rater.grade("1", JSON, grade=grade)[0] == 422
    assert rater.grades() == [None] * 4


def test_what_is_no_form_or_too_long_is_refused(rater):
    assert rater.grade("1")[0] == 422
    assert "Choose a grade" in rater.grade("1")[2]
    assert rater.grade("1", JSON, grade="3", comment="x" * 2001)[0] == 422
    assert rater.grade("1", JSON, grade="3", comment="x" * 70_000)[0] == 413
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in (b"\xff\xfe", b"form_token=%ff%fe", b"&".join([b"a=1"] * 50), b"no pair"):
        assert rater.ask("POST", rater.link.path + "1", body, **kind)[0] == 400
    assert rater.grades() == [None] * 4
    emoji = "\N{GRINNING FACE}" * 1000  # four bytes each, twelve as it is sent
    assert rater.grade("1", JSON, grade="3", comment=emoji)[0] == 200
    assert rater.get("1")[2].count("\N{GRINNING FACE}") == 1000


def test_every_reply_carries_the_headers(rater):
    for end in ("", "1", "nothing"):
        headers = rater.get(end)[1]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "set-cookie" not in headers
        assert "server" not in headers


def test_a_grade_that_the_disk_refuses_is_not_acknowledged(rater):
    with sqlite3.connect(rater.server.study / DATABASE, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        status, _, body = rater.grade("1", JSON, grade="3")
        other.execute("ROLLBACK")
    assert status == 503
    assert "Not saved" in body
    assert rater.grades()[0] is None
    assert rater.grade("1", JSON, grade="3")[0] == 200


def test_after_kill_and_restart_links_and_acknowledged_grades_are_the_same(own_rater):
    rater, server = own_rater, own_rater.server
    links = server.links
    assert rater.grade("2", JSON, grade="4")[0] == 200
    server.kill()
    server.start()
    assert server.links == links
    assert "1 of 4 graded" in server.printed
    assert 'value="4" checked' in rater.get("2")[2]


def test_no_secret_is_logged_and_ctrl_c_ends_in_a_line(own_rater):
    rater, server = own_rater, own_rater.server
    rater.get("1")
    rater.get("nothing")
    rater.grade("1", grade="9")
    rater.grade("1", grade="3")
    out, err = server.stop()
    token = rater.link.path.split("/")[2]
    assert token not in out + err
    assert out.startswith("stopped with 1 grades")
    assert err == ""
    assert server.process.returncode == 0
