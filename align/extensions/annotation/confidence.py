"""A confidence sequence for the mean of numbers in [0, 1], valid at every time at once. Needs numpy only.

An ordinary 95 % interval holds at one sample size that was fixed before. Whoever looks after every answer and stops
when it excludes 1/2 is wrong far more often than in 5 % of the cases. The intervals here contain the mean at all times
together with probability ``1 - alpha``, so looking and stopping are free.

Hedged capital process of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B
2024, arXiv 2010.09686), theorem 3: for each candidate mean m, one gambler bets that the numbers are above m and another
that they are below. Under the true mean neither gets rich, so a candidate that makes a gambler rich is excluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ALPHA = 0.05
STEPS = 1000
"""Candidate means are the multiples of 1 / STEPS. It is even, so 1/2 is a candidate."""
TRUNCATION = 0.5
"""Largest share of the capital that a bet can lose (c in the paper)."""


@dataclass(frozen=True)
class RunningInterval:
    """The running interval after each of ``n`` numbers: ``low`` and ``high`` of shape (n,)."""

    low: Floats
    high: Floats


def bet_sizes(values: Floats, alpha: float) -> Floats:
    """Return the bet before each of the values (n,), from the values before it (paper, eq. 26).

    ``sqrt(2 log(2 / alpha) / (variance_{t-1} t log(1 + t)))`` with the regularized running variance.
    """
    times = np.arange(1, len(values) + 1)
    means = (0.5 + np.cumsum(values)) / (times + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (times + 1)
    # A bet may depend on earlier values only: the first has the prior variance 1/4.
    before = np.concatenate(([0.25], variances[:-1]))
    sizes: Floats = np.sqrt(2 * np.log(2 / alpha) / (before * times * np.log1p(times)))
    return sizes


def log_capital(values: Floats, candidates: Floats, alpha: float) -> Floats:
    """Return the log of the hedged capital against each candidate mean after each value, shape (n, candidates).

    The capital is the larger of the two gamblers', each of whom starts with 1/2.
    """
    bets = bet_sizes(values, alpha)[:, None]
    with np.errstate(divide="ignore"):
        above = np.minimum(bets, TRUNCATION / candidates)
        below = np.minimum(bets, TRUNCATION / (1 - candidates))
    gaps = values[:, None] - candidates
    logs_above = np.cumsum(np.log1p(above * gaps), axis=0)
    logs_below = np.cumsum(np.log1p(-below * gaps), axis=0)
    capital: Floats = np.log(0.5) + np.maximum(logs_above, logs_below)
    return capital


def confidence_sequence(values: Sequence[float] | Floats, alpha: float = ALPHA, steps: int = STEPS) -> RunningInterval:
    """Return the running intervals of the mean.

    Args:
        values: (n,) numbers in [0, 1] in the order in which they were observed. Each must have the same mean given the
            earlier ones.
        alpha: Probability that any of the intervals misses the mean.
        steps: Number of steps of the grid of candidates. Bounds are moved out by one step, so a coarse grid is safe.

    Raises:
        ValueError: A value is outside [0, 1].
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not ((x >= 0) & (x <= 1)).all():
        raise ValueError("a confidence sequence needs one dimension of numbers in [0, 1]")
    if len(x) == 0:
        return RunningInterval(np.zeros(0), np.ones(0))
    candidates = np.linspace(0, 1, steps + 1)
    # Ville's inequality: the capital against the true mean ever reaches 1 / alpha with probability alpha at most. A
    # candidate that was excluded once stays excluded.
    is_excluded = np.logical_or.accumulate(log_capital(x, candidates, alpha) >= np.log(1 / alpha), axis=0)
    first = np.argmin(is_excluded, axis=1)
    last = steps - np.argmin(is_excluded[:, ::-1], axis=1)
    # If all candidates are excluded, the interval is below one step; keep the last interval that had a candidate.
    has_any = ~is_excluded.all(axis=1)
    latest = np.maximum.accumulate(np.where(has_any, np.arange(len(x)), 0))
    low = np.maximum(0.0, candidates[first[latest]] - 1 / steps)
    high = np.minimum(1.0, candidates[last[latest]] + 1 / steps)
    return RunningInterval(low, high)
