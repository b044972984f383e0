"""The bootstrap against what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from llm_at_home.evaluation.statistics import (
    BOOTSTRAP_SAMPLES,
    bootstrap_draws,
    bootstrap_interval95,
    interval95,
    smallest_detectable,
)


def test_the_bootstrap_resamples_items_of_any_statistic() -> None:
    data = np.random.default_rng(1).normal(5, 1, 400)
    low, high = bootstrap_interval95(400, lambda chosen: float(np.median(data[chosen])))
    assert low < np.median(data) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.35)
    assert bootstrap_interval95(1, lambda chosen: 0.0) is None


def test_the_same_seed_draws_the_same_items_so_that_differences_are_paired() -> None:
    noise = np.random.default_rng(2).normal(0, 10, 50)
    a, b = noise + 1.0, noise
    draws = [bootstrap_draws(50, lambda chosen, one=one: float(one[chosen].mean())) for one in (a, b)]
    assert len(draws[0]) == BOOTSTRAP_SAMPLES
    np.testing.assert_allclose(draws[0] - draws[1], 1.0)
    low, high = interval95(draws[0])
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / np.sqrt(50), rel=0.1)
    other = bootstrap_draws(50, lambda chosen: float(a[chosen].mean()), seed=1)
    assert (other != draws[0]).any()


def test_a_difference_of_the_smallest_detectable_size_is_found_in_four_of_five_trials() -> None:
    generator = np.random.default_rng(3)
    reference = generator.normal(0, 1, 40)
    size = smallest_detectable(bootstrap_draws(40, lambda chosen: float(reference[chosen].mean())))
    assert size == pytest.approx(2.8 * reference.std() / np.sqrt(40), rel=0.05)
    trials = generator.normal(size, reference.std(), (4000, 40))
    errors = trials.std(1, ddof=1) / np.sqrt(40)
    found = (np.abs(trials.mean(1)) > 1.96 * errors).mean()
    assert found == pytest.approx(0.8, abs=0.03)
