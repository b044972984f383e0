"""Verdicts: supported, refuted or undecided, case by case and for the claim as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_at_home.reporting import facts
from llm_at_home.reporting.claims import alike, effect, paired
from llm_at_home.reporting.claims.claim import Claim
from llm_at_home.reporting.claims.effect import Estimate
from llm_at_home.reporting.load import Loaded, Run

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
_OF_A_JUDGE = ("judge_score", "win_rate")


@dataclass(frozen=True)
class Case:
    """What one run, or two alike, say: ``estimate`` is the effect, None where there is none; ``reason`` why."""

    runs: tuple[Run, ...]
    estimate: Estimate | None
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """What all the records say of a claim; ``reason`` is that of a verdict which is not unanimous, or of none."""

    claim: Claim
    verdict: str
    cases: tuple[Case, ...] = ()
    reason: str = ""


def judge(claim: Claim, loaded: Loaded) -> Finding:
    """The verdict on a claim.

    A case supports it when its 95 % interval lies wholly where the claim says, refutes it when it lies wholly outside,
    and is undecided otherwise. The claim's verdict is that of its decided cases; where those disagree it is undecided.
    """
    if claim.effect == "value":
        runs = [(run,) for run in alike.matching(claim, loaded, claim.a)]
        if not runs:
            return Finding(claim, UNDECIDED, reason="no run of this kind has been measured")
        return _summed(claim, [_case(claim, loaded, one) for one in runs])
    pairs = alike.pairs(claim, loaded)
    if pairs:
        return _summed(claim, [_case(claim, loaded, pair) for pair in pairs])
    counts = [len(alike.matching(claim, loaded, side)) for side in (claim.a, claim.b)]
    if all(counts):
        why = f"no two are alike in all else, machine included (of the one kind {counts[0]}, of the other {counts[1]})"
    else:
        why = "no such runs have been measured" if not any(counts) else "one of the two sides has not been measured"
    return Finding(claim, UNDECIDED, reason=why)


def _case(claim: Claim, loaded: Loaded, runs: tuple[Run, ...]) -> Case:
    found = _estimate(claim, runs)
    if isinstance(found, str):
        return Case(runs, None, UNDECIDED, found)
    doubt = _doubt_of_judge(claim, loaded, runs)
    if doubt or found.interval is None:
        return Case(runs, found, UNDECIDED, doubt or found.reason)
    low, high = claim.bounds
    start, end = found.interval
    if low < start and end < high:
        return Case(runs, found, SUPPORTED)
    if end <= low or start >= high:
        return Case(runs, found, REFUTED)
    return Case(runs, found, UNDECIDED, "the interval holds the threshold")


def _estimate(claim: Claim, runs: tuple[Run, ...]) -> Estimate | str:
    if claim.effect == "difference" and claim.per is None:
        together = paired.difference(runs[0], runs[1], claim.figure)
        if together is not None:
            return together
    each: list[Estimate] = []
    for run in runs:
        found = effect.of_record(run.record, claim.figure, claim.per)
        if isinstance(found, str):
            return found
        each.append(found)
    if claim.effect == "value":
        return each[0]
    return effect.difference(*each) if claim.effect == "difference" else effect.ratio(*each)


def _doubt_of_judge(claim: Claim, loaded: Loaded, runs: tuple[Run, ...]) -> str:
    """Why a judge's figure decides nothing: its judge has not been shown to tell planted pairs apart."""
    if not claim.figure.startswith(_OF_A_JUDGE):
        return ""
    for run in runs:
        model = facts.at(run.record.config, "judge", "model")
        checks = [
            one
            for one in loaded.runs
            if facts.evaluation(one.record) == "judge_check"
            and one.record.status == "ok"
            and facts.at(one.record.config, "judge", "model") == model
        ]
        accuracy = checks[-1].record.quality.get("judge_accuracy") if checks else None
        if accuracy is None or accuracy.value is None:
            return f"the judge ({facts.clean(model)}) has not been tested with planted pairs"
        low = accuracy.interval95[0] if accuracy.interval95 else -math.inf
        if low <= 0.5:
            return f"the judge ({facts.clean(model)}) is a coin: {accuracy.value:.0%} of its planted pairs are right"
    return ""


def _summed(claim: Claim, cases: list[Case]) -> Finding:
    decided = {case.verdict for case in cases} - {UNDECIDED}
    count = {name: sum(case.verdict == name for case in cases) for name in (SUPPORTED, REFUTED, UNDECIDED)}
    if len(decided) == 1:
        verdict = decided.pop()
        left = f"{count[UNDECIDED]} of {len(cases)} cases undecided" if count[UNDECIDED] else ""
        return Finding(claim, verdict, tuple(cases), left)
    if decided:
        why = f"the cases disagree: {count[SUPPORTED]} support it, {count[REFUTED]} refute it"
        return Finding(claim, UNDECIDED, tuple(cases), why)
    reasons = list(dict.fromkeys(case.reason for case in cases))
    return Finding(claim, UNDECIDED, tuple(cases), reasons[0] if len(reasons) == 1 else "see each case")
