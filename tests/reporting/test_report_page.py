"""What a reader of the page meets: its HTML is parsed, not compared."""

from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from llm_at_home.reporting import write_report

# The tables of every run; those beside the paper have tests of their own.
RUNS = ["inference", "finetuning", "quantization", "evaluations", "unfinished"]
VOID = {"meta", "link", "br", "img", "rect", "line"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} \x1b[31m\u202egnp"


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent = tag, dict(attributes), parent
        self.children, self.pieces = [], []

    def all(self, tag):
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.all(tag)

    @property
    def text(self):
        return " ".join(" ".join(p if isinstance(p, str) else p.text for p in self.pieces).split())


class Page(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.root = self.here = Node("root", {}, None)
        self.feed(source)
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes, self.here)
        self.here.children.append(node)
        self.here.pieces.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        self.here.pieces.append(data)


@pytest.fixture
def page(runs, tmp_path, capsys):
    def make_page():
        path = write_report([runs], tmp_path / "reports")
        capsys.readouterr()
        return Page(path.read_text(encoding="utf-8")).root

    return make_page


@pytest.fixture
def full(make, save, page):
    """A page with every table on it."""
    judged, trained = make.infer("i"), make.train("t")
    save(judged, "i")
    save(make.infer("i2", quant="nf4", decode=11.2), "i2")
    folder = save(trained, "t").parent
    save(make.text(0.008, "before"), "before")
    save(make.text(0.954, "after", of=trained, folder=folder), "after")
    save(make.judge(judged, "j"), "j")
    for i, bits in enumerate((3, 4)):
        save(make.fidelity(f"q{i}", 0.9 - 0.6 * i, {"name": "rtn", "bits": bits}, bits + 0.5), f"q{i}")
    failed = make.train("f", quant="nf4")
    failed.status, failed.error = "failed", {"type": "RuntimeError", "message": "boom"}
    save(failed, "f")
    save("{broken", "bad")
    return page()


def section(root, key):
    return next(node for node in root.all("section") if node.attributes.get("id") == key)


def data_tables(node):
    """Not what stands folded below a figure."""
    return [table for table in node.all("table") if table.attributes["class"] == "data"]


def cells(root, key):
    """The rows of a table, each as {column title: cell}."""
    (table,) = data_tables(section(root, key))
    (body,) = table.all("tbody")
    heads = [h.attributes["data-title"] for h in table.all("th") if "data-title" in h.attributes]
    return [dict(zip(heads, row.children, strict=True)) for row in body.all("tr")]


def test_every_table_has_a_caption_and_headers_with_scope(full):
    tables = data_tables(full)
    keys = [t.parent.parent.attributes["id"] for t in tables]
    assert keys == ["table-1", "table-2", "table-3", "table-4", "fidelity-grades", *RUNS]
    for table in tables:
        assert next(table.all("caption")).text
        heads = list(table.all("th"))
        assert all(head.attributes.get("scope") in ("col", "colgroup", "row") for head in heads)
        columns = sum(head.attributes["scope"] == "col" for head in heads)
        groups = [int(h.attributes["colspan"]) for h in heads if h.attributes["scope"] == "colgroup"]
        assert sum(groups) == columns
        for row in next(table.all("tbody")).all("tr"):
            assert len(row.children) == columns
            assert row.children[0].attributes["scope"] == "row"


def test_units_stand_in_the_headers(full):
    titles = set(cells(full, "inference")[0])
    assert {
        "Memory: resident set, peak (GB)",
        "Speed: decode (tokens/s)",
        "Energy: per token (J/token)",
    } <= titles


def test_figures_are_seen_with_their_interval(full):
    row = cells(full, "inference")[0]
    assert row["Speed: decode (tokens/s)"].text == "25.3 24.9–25.8"
    assert "6.25" in row["Quality: judge score"].text
    assert "gpt4:single" in row["Quality: judge score"].text


def test_quality_is_seen_before_and_after(full):
    rows = cells(full, "finetuning")
    row = next(r for r in rows if r["Quant"].text == "none")
    assert row["Quality, before → after: exact match (%)"].text == "before: 0.80 → after: 95.4"


def test_an_unknown_value_is_a_dash_whose_reason_is_in_title_and_footnote(full):
    cell = cells(full, "inference")[0]["Energy: net (Wh)"]
    mark = next(s for s in cell.all("span") if s.attributes.get("class") == "unknown")
    assert "–" in cell.text
    assert "unknown" in cell.text
    assert "0" not in cell.text
    assert "powercap" in mark.attributes["title"]
    (link,) = cell.all("a")
    notes = {li.attributes["id"]: li.text for li in section(full, "inference").all("li")}
    assert "powercap" in notes[link.attributes["href"].removeprefix("#")]


def test_every_link_leads_somewhere_inside(full, tmp_path):
    ids = [n.attributes["id"] for tag in ("li", "section", "title") for n in full.all(tag) if "id" in n.attributes]
    assert len(ids) == len(set(ids))
    links = [a.attributes["href"] for a in full.all("a")]
    assert any(link.endswith("record.json") for link in links)
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (tmp_path / "reports" / unquote(link)).is_file(), link


def test_each_known_number_links_to_its_record(full):
    row = cells(full, "inference")[0]
    for title in ("Memory: resident set, peak (GB)", "Speed: decode (tokens/s)"):
        (link,) = row[title].all("a")
        assert link.attributes["href"].endswith("multirun/i/record.json")
    (link,) = row["Quality: judge score"].all("a")
    assert link.attributes["href"].endswith("multirun/j/record.json")


def test_a_folder_of_any_name_can_be_linked_to(make, save, page, tmp_path):
    path = save(make.infer(), "a=1,b?c#d %41 javascript:x")
    (link,) = cells(page(), "inference")[0]["Speed: decode (tokens/s)"].all("a")
    href = link.attributes["href"]
    assert not set(href) & set("?# :")
    assert (tmp_path / "reports" / unquote(href)).resolve() == path


def test_links_stay_paths_when_the_records_lie_below_the_report(make, save, runs, capsys):
    save(make.infer(), "javascript:alert(1)")
    root = Page(write_report([runs], runs).read_text(encoding="utf-8")).root
    assert all(
        a.attributes["href"].startswith(("#", "./", "figures/")) or "/" not in a.attributes["href"]
        for a in root.all("a")
    )


def test_nothing_comes_from_elsewhere(full):
    for tag in ("script", "img", "iframe", "object"):
        assert not any("src" in node.attributes for node in full.all(tag))
    assert all(n.attributes["href"].startswith("data:") for n in full.all("link"))
    assert not any(urlsplit(a.attributes["href"]).scheme for a in full.all("a"))
    (style,) = full.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert "prefers-color-scheme: dark" in style.text
    assert "@media print" in style.text


def test_charts_tell_their_figures_in_words_and_draw_the_interval(full):
    charts = {next(svg.all("title")).text: svg for svg in section(full, "inference").all("svg")}
    chart = charts["Speed: decode (tokens/s)"]
    assert chart.attributes["role"] == "img"
    description = next(chart.all("desc")).text
    assert "25.3" in description
    assert "11.2" in description
    first, second = chart.all("rect")
    widths = [float(bar.attributes["width"].removesuffix("%")) for bar in (first, second)]
    assert widths[1] / widths[0] == pytest.approx(11.2 / 25.34, rel=0.01)
    assert 50 < widths[0] <= 85, "the longest bar fills the chart and leaves room for its value"
    low, high = (float(next(chart.all("line")).attributes[x].removesuffix("%")) for x in ("x1", "x2"))
    assert low < widths[0] < high


def test_the_plot_tells_its_figures_in_words_and_draws_the_interval(full):
    (svg,) = section(full, "quantization").all("svg")
    assert svg.attributes["role"] == "img"
    named = {node.attributes.get("id"): node.text for tag in ("title", "desc") for node in svg.all(tag)}
    title, description = (named[name] for name in svg.attributes["aria-labelledby"].split())
    assert "KL divergence over bits per weight" in title
    for told in ("rtn, 3 bits: 3.50 bits, 0.9000 (0.8100–0.9900)", "rtn, 4 bits: 4.50 bits, 0.3000 (0.2700–0.3300)"):
        assert told in description
    three, four = (group for group in svg.all("g") if group.attributes["class"] == "point")
    x, y = zip(
        *((float(c.attributes["cx"]), float(c.attributes["cy"])) for c in (*three.all("circle"), *four.all("circle"))),
        strict=True,
    )
    assert x[0] < x[1]
    assert y[0] < y[1], "up is worse"
    whisker = next(line for line in three.all("line") if line.attributes["class"] == "whisker")
    assert float(whisker.attributes["y2"]) < y[0] < float(whisker.attributes["y1"])
    assert [next(group.all("text")).text for group in (three, four)] == ["rtn, 3 bits", "rtn, 4 bits"]


def test_a_single_run_has_no_chart(make, save, page):
    save(make.infer(), "a")
    save(make.fidelity("q", 0.3, {"name": "nf4"}), "q")
    # What was published can be drawn without any run of ours.
    assert [next(svg.all("title")).attributes["id"] for svg in page().all("svg")] == ["memory-t"]


def test_files_left_out_are_named_with_their_reason(full):
    (item,) = section(full, "left-out").all("li")
    assert "bad/record.json" in item.text
    assert "not JSON" in item.text


def test_hostile_text_stays_text(make, save, page):
    for task in (make.infer, make.train):
        for number in range(2):
            record = task(f"{HOSTILE}{number}")
            record.config |= {"model": {"name": HOSTILE}, "quant": {"name": HOSTILE}, "dtype": HOSTILE}
            record.provenance |= {
                "cpu": {"model": HOSTILE},
                "packages": {"torch": HOSTILE},
                "git": {"commit": HOSTILE},
            }
            record.readings["energy_net"] = record.readings["energy_net"].unknown("Wh", HOSTILE)
            record.kernel = {HOSTILE: HOSTILE}
            save(record, f"javascript:alert(3)/{task.__name__}<b>{number}")
    for number in range(2):
        hostile = make.fidelity(f"q{number}", 0.3, {"name": HOSTILE, "type": f"{HOSTILE}{number}"}, dtype=HOSTILE)
        save(hostile, f"q{number}")
    judge = make.judge(record, "j", method=HOSTILE)
    judge.quality = {HOSTILE: judge.quality["judge_score_mean"]}
    save(judge, "j")
    failed = make.infer("f")
    failed.status, failed.error = "failed", {"type": HOSTILE, "message": HOSTILE}
    save(failed, "f")
    save('{"task": "x", "<script>alert(4)</script>": 1}', "bad")
    root = page()
    assert len(list(root.all("script"))) == 1
    assert not list(root.all("img"))
    assert not list(root.all("b"))

    def walk(node):
        assert not any(name.startswith("on") for name in node.attributes)
        for child in node.children:
            walk(child)

    walk(root)
    assert all(not a.attributes["href"].startswith("javascript") for a in root.all("a"))
    assert "<script>alert(1)</script>" in cells(root, "inference")[0]["Model"].text
    assert "{{ 7*7 }}" in root.text
    assert "\x1b" not in root.text
    assert "\u202e" not in root.text


def test_only_the_pages_own_script_may_run(full):
    policy = next(m for m in full.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert "script-src 'sha256-" in policy.attributes["content"]
    assert "default-src 'none'" in policy.attributes["content"]


def test_the_policys_hash_is_that_of_the_script(make, save, runs, tmp_path, capsys):
    import base64
    import hashlib

    save(make.infer(), "a")
    source = write_report([runs], tmp_path / "out").read_text(encoding="utf-8")
    script = source.split("<script>")[1].split("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in source


def contrast(one, other):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_light_and_dark():
    import re
    from importlib.resources import files

    css = (files("llm_at_home.reporting") / "colours.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", css, re.S)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for ink in ("ink", "soft", "accent"):
            for paper in ("paper", "faint"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        assert contrast(colours["warn-ink"], colours["warn"]) >= 4.5
