"""The ledger: verdicts follow the intervals, runs are compared only where they are alike, and bad files are refused."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import load, write_report
from llm_at_home.reporting.claims import LEDGER, __main__, alike, claim, effect, findings, page
from llm_at_home.reporting.claims.effect import Estimate
from llm_at_home.reporting.load import Loaded, Run

ROOT = Path(__file__).resolve().parents[3]
SPEED = {
    "claim": "Four bits decode faster",
    "source": {"document": "nobody", "place": "nowhere"},
    "figure": "decode_tokens_per_second",
    "effect": "ratio",
    "records": {"task": "infer"},
    "a": {"quant.name": "nf4"},
    "b": {"quant.name": "none"},
    "above": 1,
}


def run(
    quant, value, spread=None, *, name="decode_tokens_per_second", unit="tokens/s", card="GPU-1", status="ok", **more
):
    interval = (value - spread, value + spread) if spread is not None else None
    config = {
        "model": {"name": "m"},
        "quant": {"name": quant},
        "gpu": {"device": "cuda", "card": "H100"},
        "dtype": "float32",
    }
    record = Record(
        "infer",
        status,
        config=config | more,
        provenance={"gpu": [{"name": "H100", "uuid": card}]},
        readings={name: Reading(value, unit, "clock", interval, n=2)},
    )
    return Run(record, Path(f"results/m/{quant}/record.json"), datetime.now(UTC))


def found(tmp_path, runs, **changes):
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(SPEED | changes))
    return findings(Loaded(tuple(runs)), [tmp_path])[0]


@pytest.mark.parametrize(
    ("fast", "verdict"),
    [((30, 1), "supported"), ((10, 1), "refuted"), ((21, 5), "undecided"), ((30, None), "undecided")],
)
def test_the_verdict_is_where_the_interval_lies(tmp_path, fast, verdict):
    assert found(tmp_path, [run("nf4", *fast), run("none", 20, 1)]).verdict == verdict


def test_a_case_without_an_interval_says_so(tmp_path):
    one = found(tmp_path, [run("nf4", 30), run("none", 20, 1)])
    assert "no interval (n = 2)" in one.reason
    assert one.cases[0].estimate.value == 1.5


def test_an_interval_of_no_width_decides_nothing(tmp_path):
    assert found(tmp_path, [run("nf4", 30, 0), run("none", 20, 1)]).verdict == "undecided"


def test_bytes_are_exact(tmp_path):
    memory = {"name": "torch_allocated_peak", "unit": "GB"}
    one = found(tmp_path, [run("nf4", 4, **memory), run("none", 14, **memory)], figure="torch_allocated_peak")
    assert one.verdict == "refuted"


def test_committed_runs_on_two_hosts_agree_on_what_is_called_exact():
    hosts = [ROOT / "results" / "h100" / name for name in ("table1", "table1_second_host", "table1_third_host")]
    compared = 0
    for folder in hosts[0].iterdir():
        for other in hosts[1:]:
            if not (other / folder.name).is_dir():
                continue
            runs = [load.load([place]).runs[0].record for place in (folder, other / folder.name)]
            for name in ("torch_allocated_peak", "model_size", "bits_per_weight"):
                assert runs[0].readings[name].value == runs[1].readings[name].value
                compared += 1
    assert compared >= 12


@pytest.mark.parametrize("other", [{"card": "GPU-2"}, {"engine": {"batch_size": 16}}, {"dtype": "bfloat16"}])
def test_runs_that_differ_in_anything_else_are_no_pair(tmp_path, other):
    one = found(tmp_path, [run("nf4", 30, 1, **other), run("none", 20, 1)])
    assert one.verdict == "undecided"
    assert one.cases == ()
    assert "no two are alike" in one.reason


def test_what_may_vary_may(tmp_path):
    runs = [run("nf4", 30, 1, dtype="bfloat16"), run("none", 20, 1)]
    assert found(tmp_path, runs, varies=["dtype"]).verdict == "supported"


def test_cases_that_disagree_leave_it_undecided(tmp_path):
    runs = [run("nf4", 30, 1), run("none", 20, 1), run("nf4", 10, 1, seed=1), run("none", 20, 1, seed=1)]
    one = found(tmp_path, runs)
    assert one.verdict == "undecided"
    assert "1 support it, 1 refute it" in one.reason


def test_what_failed_is_no_evidence(tmp_path):
    one = found(tmp_path, [run("nf4", 30, 1, status="failed"), run("none", 20, 1)])
    assert (one.verdict, one.reason) == ("undecided", "one of the two sides has not been measured")


def judged(model_run, value, accuracy=None):
    kind = "judge" if accuracy is None else "judge_check"
    name = "judge_score_mean" if accuracy is None else "judge_accuracy"
    reading = Reading(value, "points", "judge", (value - 0.1, value + 0.1), n=16) if accuracy is None else accuracy
    config = {"task": kind, "judge": {"model": "small"}, "gpu": {"device": "cpu"}}
    subject = {"config": {"quant": {"name": model_run}}} if accuracy is None else None
    record = Record("evaluate", config=config, quality={name: reading}, subject=subject)
    return Run(record, Path(f"results/m/{model_run}/record.json"), datetime.now(UTC))


@pytest.mark.parametrize(
    ("accuracy", "verdict", "why"),
    [
        (None, "undecided", "has not been tested"),
        ((0.55, 0.40, 0.70), "undecided", "is a coin: 55%"),
        ((0.90, 0.80, 0.96), "refuted", ""),
    ],
)
def test_a_judge_decides_only_when_it_tells_planted_pairs_apart(tmp_path, accuracy, verdict, why):
    claimed = {"figure": "judge_score_mean", "effect": "difference", "above": 0}
    claimed |= {
        "records": {"evaluation": "judge"},
        "a": {"subject.quant.name": "nf4"},
        "b": {"subject.quant.name": "none"},
    }
    runs = [judged("nf4", 3), judged("none", 5)]
    if accuracy:
        runs.append(judged("x", 0, Reading(accuracy[0], "1", "planted_pairs", accuracy[1:], n=27)))
    one = found(tmp_path, runs, **claimed)
    assert one.verdict == verdict
    assert why in one.reason


def test_fidelity_is_compared_passage_by_passage():
    runs = load.load([ROOT / "results" / "two_core_cpu" / "methods"])
    one = next(f for f in findings(runs) if f.claim.name == "gptq_beats_rounding_4")
    low, high = one.cases[0].estimate.interval
    # The interval that README quotes of `python -m llm_at_home.evaluation compare`.
    assert (round(low, 3), round(high, 3)) == (-0.230, -0.204)


def test_a_difference_of_independent_estimates_has_the_interval_that_theirs_give():
    a, b = Estimate(10, "s", (7, 13)), Estimate(4, "s", (0, 8))
    assert effect.difference(a, b).interval == pytest.approx((6 - 5, 6 + 5))


def test_a_ratio_s_interval_turns_round_with_the_ratio():
    a, b = Estimate(10, "s", (8, 13)), Estimate(4, "s", (3, 5))
    low, high = effect.ratio(a, b).interval
    assert effect.ratio(b, a).interval == pytest.approx((1 / high, 1 / low))
    assert low < 2.5 < high
    assert effect.ratio(a, Estimate(4, "s", (-1, 9))).interval[1] == math.inf


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"figures": "x"}, "figures: no such key"),
        ({"effect": "sum"}, "effect: sum is none of"),
        ({"above": None}, "below: give below, above or both"),
        ({"above": "1e-3"}, "above: '1e-3' is no number"),
        ({"above": 2, "below": 1}, "below: must be more than above"),
        ({"b": {}}, "b: effect: ratio compares two runs"),
        ({"effect": "value"}, "b: effect: value looks at one run"),
        ({"source": "somebody"}, "source: give document and place"),
        ({"claim": ""}, "claim: must be text"),
        ({"figure": None}, "figure: is missing"),
        ({"a": {"quant": {"name": "nf4"}}}, r"a\.quant: must be a value"),
        ({"varies": "dtype"}, "varies: must be a list"),
    ],
)
def test_a_malformed_claim_is_refused_with_file_and_key(tmp_path, change, hint):
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(SPEED | change))
    with pytest.raises(Refusal, match=rf"it\.yaml: {hint}") as refusal:
        claim.read_all([tmp_path])
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "it.yaml").write_text("claim: [")
    assert __main__.main([str(ROOT / "results" / "two_core_cpu" / "demo"), "--claims", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "it.yaml: cannot be read as YAML" in said


def test_a_claim_of_one_s_own_is_in_the_ledger(tmp_path, capsys):
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(SPEED))
    assert __main__.main([str(ROOT / "results" / "two_core_cpu" / "demo"), "--claims", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"UNDECIDED .*: Four bits decode faster", said)
    assert "two_core_cpu/demo/infer/nf4 against two_core_cpu/demo/infer/none" in said


def test_every_shipped_claim_names_a_figure_that_some_record_has():
    runs = load.load([ROOT / "results"]).runs
    names = {name for one in runs for name in (*one.record.readings, *one.record.quality)}
    claims = claim.read_all([LEDGER])
    assert len(claims) >= 40
    assert {one.figure for one in claims} | {one.per for one in claims if one.per} <= names


def test_what_is_claimed_of_four_bits_is_tested_on_four_bits():
    loaded = load.load([ROOT / "results"])
    seen = set()
    for one in claim.read_all([LEDGER]):
        if not re.search(r"\bfour[- ]bits?\b", one.claim.lower()):
            continue
        for run in alike.matching(one, loaded, one.a):
            config = run.record.config if run.record.task == "infer" else {}
            seen |= {one.name} if config else set()
            assert config.get("quant", {}).get("bits", 4) == 4, (one.name, run.path)
    assert len(seen) >= 4


def test_the_report_has_the_ledger_with_links_to_its_runs(tmp_path):
    text = write_report([ROOT / "results" / "two_core_cpu" / "pruning"], tmp_path).read_text()
    section = re.search(r'<section id="claims".*?</section>', text, re.DOTALL)[0]
    assert "Wanda in the pattern 2:4 loses less than pruning by magnitude" in section
    links = re.findall(r'href="([^"]+record\.json)"', section)
    assert links
    assert all((tmp_path / link).is_file() for link in links)
    assert page.counted([]) not in section
