"""Speed figures from replies whose times are known."""

from __future__ import annotations

import pytest

from llm_at_home.generation.reply import Reply
from llm_at_home.generation.speed import speed_readings


def reply(steps: list[float], first: float | None = 0.5, prompt: int = 10) -> Reply:
    return Reply("", list(range(len(steps) + 1)), prompt, "length", first, steps)


def test_one_by_one_the_rate_is_tokens_after_the_first_over_their_intervals() -> None:
    figures = speed_readings([[[reply([0.1] * 9)], [reply([0.3] * 4, first=1.5)]]])
    assert figures["decode_tokens_per_second"].value == pytest.approx(13 / (0.9 + 1.2))
    assert figures["time_to_first_token"].value == pytest.approx(1.0)
    assert figures["prefill_tokens_per_second"].value == pytest.approx(20 / 2.0)
    assert figures["inter_token_latency_median"].value == pytest.approx(0.1)
    assert {figure.method for figure in figures.values()} == {"token_on_host_clock"}
    assert figures["decode_tokens_per_second"].interval95 is None
    assert not any(name.endswith(("_min", "_max")) for name in figures)


def test_in_a_batch_useful_tokens_count_and_time_runs_to_the_longest_answer() -> None:
    # Ten steps of 0.1 s; the second answer ended after four tokens, the third with its first.
    batch = [reply([0.1] * 10), reply([0.1] * 3), reply([])]
    figures = speed_readings([[batch]])
    assert figures["decode_tokens_per_second"].value == pytest.approx((10 + 3 + 0) / 1.0)
    assert figures["prefill_tokens_per_second"].value == pytest.approx(30 / 0.5)
    assert figures["time_to_first_token"].value == pytest.approx(0.5)
    assert figures["inter_token_latency_p99"].value == pytest.approx(0.1)
    assert {figure.method for figure in figures.values()} == {"token_on_host_clock_batch_3"}


def test_passes_give_interval_median_and_extremes() -> None:
    passes = [[[reply([1 / rate] * 20)]] for rate in (20.0, 50.0, 47.0)]
    figures = speed_readings(passes)
    mean = figures["decode_tokens_per_second"]
    assert mean.value == pytest.approx(39.0)
    assert mean.interval95[0] < 20
    told = {end: figures[f"decode_tokens_per_second_{end}"].value for end in ("median", "min", "max")}
    assert told == {"median": pytest.approx(47.0), "min": pytest.approx(20.0), "max": pytest.approx(50.0)}
    assert mean.n == figures["decode_tokens_per_second_median"].n == 3


@pytest.mark.parametrize("replies", [[reply([])], [reply([0.1], first=None)]])
def test_without_two_timed_tokens_the_rate_is_unknown(replies) -> None:
    figures = speed_readings([[replies]])
    assert figures["decode_tokens_per_second"].value is None
    assert figures["decode_tokens_per_second"].reason
