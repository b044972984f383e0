"""The bootstrap: intervals, and the smallest difference that a design can detect.

What is drawn with replacement are whole texts or questions, never tokens: tokens of one text are not independent, and
a bootstrap over them would give intervals that are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BOOTSTRAP_SAMPLES = 2000
# Two-sided 5 % (1.96) with a power of 80 % (0.84): Cohen 1988, "Statistical Power Analysis", chapter 2.
DETECTABLE_STANDARD_ERRORS = 1.96 + 0.84

Statistic = Callable[[np.ndarray], float]


def bootstrap_draws(n: int, statistic: Statistic, seed: int = 0) -> np.ndarray:
    """The statistic of each of ``BOOTSTRAP_SAMPLES`` resamples.

    The same ``n`` and ``seed`` always draw the same items, so a statistic that takes the difference of two runs on the
    same items is resampled in pairs.

    Args:
        n: how many items there are.
        statistic: maps an index array of shape (n,) to a number.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, n, n)) for _ in range(BOOTSTRAP_SAMPLES)])


def interval95(draws: np.ndarray) -> tuple[float, float]:
    """The percentile interval of a bootstrap's draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval95(n: int, statistic: Statistic, seed: int = 0) -> tuple[float, float] | None:
    """The percentile bootstrap's 95 % interval of a statistic over ``n`` items; None for fewer than two."""
    return interval95(bootstrap_draws(n, statistic, seed)) if n > 1 else None


def smallest_detectable(draws: np.ndarray) -> float:
    """The true difference that a two-sided test at 5 % finds with a power of 80 %.

    It is 2.8 standard errors, taken from the draws of a paired difference.
    """
    return DETECTABLE_STANDARD_ERRORS * float(np.std(draws, ddof=1))
