import statistics

import numpy as np
import pytest
from scipy import stats

from llm_at_home.metering import timing


@pytest.mark.parametrize("n", [2, 3, 5, 10, 11, 30, 31])
def test_the_interval_is_students_t(n: int) -> None:
    values = np.random.default_rng(n).normal(10, 2, n).tolist()
    expected = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    low, high = timing.mean_interval95(values)
    assert high - low == pytest.approx(expected[1] - expected[0], rel=1e-3)
    assert (low + high) / 2 == pytest.approx(np.mean(values))


def test_beyond_thirty_degrees_of_freedom_the_normal_is_close_enough() -> None:
    values = np.random.default_rng(0).normal(10, 2, 32).tolist()
    low, high = timing.mean_interval95(values)
    expected = stats.t.interval(0.95, 31, loc=np.mean(values), scale=stats.sem(values))
    assert (high - low) / (expected[1] - expected[0]) == pytest.approx(1, abs=0.05)
    assert (low + high) / 2 == pytest.approx(statistics.fmean(values))


def test_published_quantiles_of_t() -> None:
    # With standard deviation sqrt(n), the half width is the quantile itself.
    assert timing.mean_interval95([-1.0, 1.0]) == pytest.approx((-12.706, 12.706))
    assert timing.mean_interval95([0.0] * 3) == (0.0, 0.0)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_observations_have_no_interval(values: list[float]) -> None:
    assert timing.mean_interval95(values) is None


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_percentile_is_numpys(n: int, share: float) -> None:
    values = np.random.default_rng(n).exponential(1, n).tolist()
    assert timing.percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_percentile_of_nothing_is_refused_and_the_input_stays_in_order() -> None:
    with pytest.raises(ValueError, match="no values"):
        timing.percentile([], 0.5)
    values = [3.0, 1.0, 2.0]
    assert timing.percentile(values, 0.5) == 2.0
    assert values == [3.0, 1.0, 2.0]


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(1))
    first = timing.now("cpu")
    assert not calls
    assert timing.now("cuda") >= first
    assert calls == [1]
