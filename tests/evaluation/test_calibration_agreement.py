"""Rank correlation and kappa: against scipy, by hand, and how often their intervals cover."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align.evaluation.calibration import cohen_kappa, spearman

numbers = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(numbers)
@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_spearman_is_scipys_with_ties(draws):
    x, y = np.array(draws, dtype=float).T
    correlation = spearman(x, y, resamples=20, seed=0).value
    assert correlation == pytest.approx(stats.spearmanr(x, y).statistic, nan_ok=True)


def test_rows_are_resampled_together_and_counted_once():
    g = np.random.default_rng(0)
    pairs = g.normal(size=(60, 1)) + np.array([[-0.01, 0.01]])  # two numbers of a row hardly differ
    noisy = pairs + 0.6 * g.normal(size=(60, 1))
    together = spearman(pairs, noisy, resamples=1000, seed=0)
    apart = spearman(pairs.ravel(), noisy.ravel(), resamples=1000, seed=0)
    assert together.value == pytest.approx(apart.value)
    assert (together.n, apart.n) == (60, 120)
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(math.sqrt(2), abs=0.2)


def test_spearmans_interval_is_that_of_resampled_rows():
    g = np.random.default_rng(3)
    x = g.integers(0, 6, 150).astype(float)
    y = x + g.normal(0, 3, 150).round()
    correlation = spearman(x, y, resamples=2000, seed=0)
    again = [stats.spearmanr(x[rows], y[rows]).statistic for rows in g.integers(0, 150, size=(1000, 150))]
    low, high = np.quantile(again, [0.025, 0.975])
    assert correlation.low == pytest.approx(low, abs=0.03)
    assert correlation.high == pytest.approx(high, abs=0.03)


def test_spearmans_interval_covers():
    g = np.random.default_rng(4)
    truth = 6 / math.pi * math.asin(0.6 / 2)  # of a bivariate normal with correlation 0.6
    covered = 0
    for seed in range(250):
        x = g.normal(size=60)
        correlation = spearman(x, 0.6 * x + 0.8 * g.normal(size=60), resamples=300, seed=seed)
        covered += correlation.low <= truth <= correlation.high
    assert covered / 250 == pytest.approx(0.95, abs=0.048)  # 3.5 standard errors


def test_rows_with_a_number_missing_are_left_out():
    x, y = np.random.default_rng(4).normal(size=(2, 20, 2))
    broken = np.vstack([[[math.nan, 1.0]], x])
    assert spearman(broken, np.vstack([[[9.0, 1.0]], y]), resamples=50, seed=0) == spearman(x, y, resamples=50, seed=0)


def test_one_constant_side_has_no_correlation(refused):
    correlation = spearman([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0], resamples=50, seed=0)
    assert math.isnan(correlation.value)
    assert correlation.as_dict()["value"] is None
    assert math.isnan(spearman([], [], resamples=50, seed=0).value)
    refused(spearman, [1.0], [1.0, 2.0], resamples=50, seed=0)


def test_kappa_by_hand():
    # agree on 20 + 15 of 50; chance (25/50 * 30/50) + (25/50 * 20/50) = 0.5; (0.7 - 0.5) / 0.5
    first = [1] * 25 + [-1] * 25
    second = [1] * 20 + [-1] * 5 + [1] * 10 + [-1] * 15
    kappa = cohen_kappa(first, second, resamples=2000, seed=0)
    assert kappa.value == pytest.approx(0.4)
    assert kappa.n == 50
    # Cohen's large-sample standard error: sqrt(p(1 - p) / n) / (1 - chance)
    error = math.sqrt(0.7 * 0.3 / 50) / 0.5
    assert kappa.low == pytest.approx(0.4 - 2.01 * error, abs=0.05)
    assert kappa.high == pytest.approx(0.4 + 2.01 * error, abs=0.05)


def test_kappa_at_the_ends():
    assert cohen_kappa([1, -1, 0, 1, 1], [1, -1, 0, 1, 1], resamples=50, seed=0).value == 1
    assert cohen_kappa([1, 1, -1, -1], [1, -1, 1, -1], resamples=50, seed=0).value == 0
    assert cohen_kappa([1, -1] * 4, [-1, 1] * 4, resamples=50, seed=0).value == -1
    assert math.isnan(cohen_kappa([1, 1], [1, 1], resamples=50, seed=0).value)
    assert math.isnan(cohen_kappa([], [], resamples=50, seed=0).value)
