"""A/A and A/B simulations: intervals cover at their nominal rate, and no difference is found more often than it should.

Two passes of the same system over the same prompts differ by sampling noise only (A/A); with a true difference (A/B)
the interval holds that difference. Bounds are three to four standard errors of the simulation itself.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from align.evaluation.statistics import holm, mean_interval, paired_difference

PROMPTS, TABLES, RESAMPLES = 80, 150, 300

Draw = Callable[[np.random.Generator, np.ndarray], Any]


def passes(share: Callable[[np.ndarray], np.ndarray]) -> Draw:
    """A task of right and wrong: each prompt has its chance, and each pass its own luck."""
    return lambda g, d: (g.uniform(size=len(d)) < share(d)).astype(float)


TASKS: dict[str, Draw] = {
    "hard": passes(lambda d: 0.2 * d),
    "even": passes(lambda d: d),
    "easy": passes(lambda d: 0.7 + 0.3 * d),
    "settled": passes(lambda d: np.where(d < 0.5, 0.03, 0.97)),  # the passes nearly always agree
    "of four": lambda g, d: g.binomial(4, d) / 4,
    "normal": lambda g, d: 5 * d + g.normal(size=len(d)),
    "skewed": lambda g, d: d + g.exponential(size=len(d)),
    "bounded": lambda g, d: np.clip(d + g.normal(0, 0.3, len(d)), 0, 1),
    "per token": lambda g, d: d + g.normal(0, 0.5, len(d)),  # weighted
    "few prompts": lambda g, d: g.normal(size=len(d)),
}
"""Metrics of one table; ``d`` is what the passes share, each prompt's difficulty."""


def weights_of(g: np.random.Generator) -> np.ndarray:
    """Tokens of each prompt's answer; a fifth of the prompts takes no part."""
    return g.integers(1, 50, size=PROMPTS) * (g.uniform(size=PROMPTS) < 0.8)


@pytest.fixture(scope="module")
def same_system() -> dict[str, Any]:
    """Tables of ten metrics, each of two passes of one system: what was covered, and every p-value."""
    g = np.random.default_rng(5)
    covered = dict.fromkeys(TASKS, 0)
    p_values = []
    for table in range(TABLES):
        row = []
        for name, task in TASKS.items():
            difficulty = g.uniform(size=12 if name == "few prompts" else PROMPTS)
            weights = weights_of(g) if name == "per token" else None
            first, second = task(g, difficulty), task(g, difficulty)
            difference = paired_difference(first, second, weights=weights, resamples=RESAMPLES, seed=table)
            covered[name] += difference.low <= 0 <= difference.high
            row.append(difference.p)
        p_values.append(row)
    return {"covered": covered, "p": np.array(p_values)}


def error(share: float, trials: int) -> float:
    """Standard error of a simulated share."""
    return math.sqrt(share * (1 - share) / trials)


def test_the_same_system_twice_is_covered_at_the_nominal_rate(same_system):
    shares = {name: count / TABLES for name, count in same_system["covered"].items()}
    assert np.mean(list(shares.values())) == pytest.approx(0.95, abs=3.5 * error(0.95, TABLES * len(TASKS)))
    for name, share in shares.items():
        assert share > 0.95 - 3.5 * error(0.95, TABLES), name


def test_the_same_system_twice_is_rarely_called_different(same_system):
    actual = same_system["p"] <= 0.05
    assert actual.mean() < 0.05 + 3.5 * error(0.05, actual.size)  # McNemar, being exact on few pairs, stays below
    for name, share in zip(TASKS, actual.mean(axis=0), strict=True):
        assert share < 0.05 + 3.5 * error(0.05, TABLES), name


def test_a_whole_table_is_rarely_wrong_anywhere(same_system):
    uncorrected = (same_system["p"] <= 0.05).any(axis=1).mean()
    corrected = np.mean([min(holm(list(row))) <= 0.05 for row in same_system["p"]])
    assert corrected < 0.05 + 3 * error(0.05, TABLES)
    assert uncorrected > 0.2  # which is why the table is corrected


TRUE: dict[str, tuple[Draw, Draw, float]] = {
    "right and wrong": (passes(lambda d: 0.8 * d + 0.15), passes(lambda d: 0.8 * d), 0.15),
    "normal": (lambda g, d: d + 0.3 + g.normal(size=len(d)), lambda g, d: d + g.normal(size=len(d)), 0.3),
    "skewed": (lambda g, d: g.exponential(1.3, len(d)), lambda g, d: g.exponential(1.0, len(d)), 0.3),
    "of four": (lambda g, d: g.binomial(4, 0.8 * d + 0.1) / 4, lambda g, d: g.binomial(4, 0.8 * d) / 4, 0.1),
}


@pytest.mark.parametrize("name", TRUE)
def test_a_true_difference_is_covered_and_usually_found(name):
    better, worse, truth = TRUE[name]
    g = np.random.default_rng(11)
    covered, actual = 0, 0
    for table in range(2 * TABLES):
        difficulty = g.uniform(size=PROMPTS)
        row = paired_difference(better(g, difficulty), worse(g, difficulty), resamples=RESAMPLES, seed=table)
        covered += row.low <= truth <= row.high
        actual += row.p <= 0.05
    assert covered / (2 * TABLES) == pytest.approx(0.95, abs=3.5 * error(0.95, 2 * TABLES))
    assert actual / (2 * TABLES) > 0.3


def test_weighted_difference_is_covered_as_ratio_of_sums():
    g = np.random.default_rng(13)
    sizes = np.arange(1, 50)
    truth = 0.02 * (sizes**2).sum() / sizes.sum()  # E[w * 0.02 w] / E[w], not E[0.02 w]
    covered, estimated = 0, 0
    for table in range(2 * TABLES):
        weights = weights_of(g)
        shared = g.normal(size=PROMPTS)
        first = shared + 0.02 * weights + g.normal(0, 0.5, PROMPTS)
        second = shared + g.normal(0, 0.5, PROMPTS)
        first[weights == 0] = np.nan  # nothing was measured there
        row = paired_difference(first, second, weights=weights, resamples=RESAMPLES, seed=table)
        covered += row.low <= truth <= row.high
        assert row.n == int((weights > 0).sum())
        alone = mean_interval(0.02 * weights, weights=weights, resamples=RESAMPLES, seed=table)
        estimated += alone.low <= truth <= alone.high
    assert covered / (2 * TABLES) == pytest.approx(0.95, abs=3.5 * error(0.95, 2 * TABLES))
    assert estimated / (2 * TABLES) == pytest.approx(0.95, abs=3.5 * error(0.95, 2 * TABLES))
