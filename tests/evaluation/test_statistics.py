"""Statistics: worked by hand and against analytic results. Simulations stand in test_statistics_coverage.py."""

import math

import numpy as np
import pytest

from align.evaluation.statistics import (
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    rate_interval,
    t_critical,
    wilson,
)


def test_wilson_by_hand():
    # p = 0.8, n = 10, z = 1.96: center (0.8 + 0.19208) / 1.38416 = 0.71674; half 1.96/1.38416 * sqrt(0.016 + 0.009604)
    # = 1.41602 * 0.160013 = 0.22658
    estimate = wilson(8, 10)
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx(0.4902, abs=2e-4)
    assert estimate.high == pytest.approx(0.9433, abs=2e-4)


def test_wilson_stays_open_at_the_edges():
    assert wilson(0, 250).high == pytest.approx(0.0151, abs=2e-4)  # "0 of 250 is up to 1.5 %"
    assert wilson(0, 250).low == 0
    assert wilson(5, 5).low < 1
    assert math.isnan(wilson(0, 0).value)


def test_wilson_is_closed_where_the_rate_is():
    """A bound that rounding puts at 2.8e-17 reads like a number."""
    for n in (3, 7, 60, 541):
        assert wilson(0, n).low == 0.0 < wilson(0, n).high
        assert wilson(n, n).high == 1.0 > wilson(n, n).low


def test_mcnemar_by_hand():
    # 1 against 7: 2 * (C(8,0) + C(8,1)) / 2^8 = 2 * 9 / 256
    assert mcnemar(1, 7) == pytest.approx(18 / 256)
    assert mcnemar(7, 1) == mcnemar(1, 7)
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 0) == 1
    assert 0 < mcnemar(900, 1100) < 1e-4  # 2**2000 does not fit a float


def test_holm_by_hand():
    # sorted 0.01*4, 0.02*3, 0.03*2, 0.5*1, then made monotone: 0.04, 0.06, 0.06, 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []


def test_holm_keeps_order_of_p_values():
    # sorted 0.01*3 = 0.03, 0.03*2 = 0.06, 0.04*1 = 0.04: once one is not rejected, neither is any after it
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    p_values = np.random.default_rng(3).uniform(size=40)
    adjusted = np.array(holm(p_values.tolist()))
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()
    assert (adjusted >= p_values).all() and adjusted.max() <= 1


def test_bootstrap_matches_the_t_interval():
    x = np.random.default_rng(1).normal(3, 2, size=200)
    estimate = mean_interval(x, resamples=20_000, seed=0)
    half = t_critical(199) * x.std(ddof=1) / math.sqrt(200)
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.low == pytest.approx(x.mean() - half, abs=0.03 * half)
    assert estimate.high == pytest.approx(x.mean() + half, abs=0.03 * half)


def test_weights_make_a_ratio_of_sums():
    # 2 nats a token over 1 token and 1 nat over 3: 5 nats over 4 tokens
    assert mean_interval([2, 1], weights=[1, 3], resamples=100, seed=0).value == 1.25


def test_prompts_of_weight_zero_take_no_part(refused):
    estimate = mean_interval([2, math.nan, 1, 7], weights=[1, 0, 3, 0], resamples=500, seed=0)
    assert estimate == mean_interval([2, 1], weights=[1, 3], resamples=500, seed=0)
    assert (estimate.value, estimate.n) == (1.25, 2)
    assert mean_interval([2, 1], weights=[0, 0], resamples=100, seed=0).n == 0
    assert math.isnan(mean_interval([2, 1], weights=[0, 0], resamples=100, seed=0).value)
    refused(mean_interval, [2, 1], weights=[1, -1], resamples=100, seed=0)


def test_paired_prompts_of_weight_zero_take_no_part():
    first, second, weights = [0.5, 9, 0.1, 0.3, math.nan], [0.1, 1, 0.2, 0.1, 3], [2, 0, 1, 4, 0]
    difference = paired_difference(first, second, weights=weights, resamples=500, seed=0)
    assert difference == paired_difference([0.5, 0.1, 0.3], [0.1, 0.2, 0.1], weights=[2, 1, 4], resamples=500, seed=0)
    # (2 * 0.4 - 1 * 0.1 + 4 * 0.2) / 7
    assert difference.value == pytest.approx(1.5 / 7)
    assert difference.n == 3
    assert difference.test == "sign-flip"
    none = paired_difference([1], [0], weights=[0], resamples=100, seed=0)
    assert (none.n, none.p) == (0, 1)


def test_weights_count_in_the_permutation_test_too():
    # weighted sum 0.5 + 0.5 + 0.5 - 3 * 0.5 = 0: no pattern of signs is nearer to it; unweighted it would be 1
    difference = paired_difference([0.5, 0.5, 0.5, 0], [0, 0, 0, 0.5], weights=[1, 1, 1, 3], resamples=500, seed=0)
    assert (difference.value, difference.p) == (0, 1)


def test_weights_that_are_all_alike_are_none():
    first, second = [1, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1]
    counted = paired_difference(first, second, weights=[3, 3, 3, 3, 3, 0], resamples=100, seed=0)
    plain = paired_difference(first[:5], second[:5], resamples=100, seed=0)
    assert counted == plain
    assert counted.test == "mcnemar"
    assert paired_difference(first, second, weights=[3, 3, 3, 3, 1, 0], resamples=100, seed=0).test == "sign-flip"


def test_one_prompt_says_nothing_about_spread():
    estimate = mean_interval([0.5], resamples=100, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, -math.inf, math.inf)


def test_two_prompts_span_their_values():
    # Resamples are (0, 0), (0, 1), (1, 0) and (1, 1); the tail is beyond all of them: t(1) = 12.7 deviations.
    estimate = mean_interval([0.0, 1.0], resamples=100, seed=0)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.5, 0.0, 1.0, 2)


@pytest.mark.parametrize("count", [2, 5])
def test_few_equal_values_have_no_interval(count):
    estimate = mean_interval([1.0] * count, resamples=100, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, -math.inf, math.inf)
    difference = paired_difference([1.0] * count, [0.0] * count, resamples=100, seed=0)
    assert difference.p == 2 / 2**count > 0.05


def test_many_equal_values_have_an_interval_of_width_zero():
    estimate = mean_interval([1.0] * 6, resamples=100, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
    assert paired_difference([1.0] * 6, [0.0] * 6, resamples=100, seed=0).p == 2 / 2**6


def test_paired_difference_removes_what_prompts_share():
    generator = np.random.default_rng(3)
    difficulty = generator.normal(0, 10, size=50)
    difference = paired_difference(difficulty + 1 + generator.normal(0, 0.1, 50), difficulty, resamples=2000, seed=0)
    assert difference.low > 0.9
    assert difference.high < 1.1
    assert difference.p < 0.01
    assert difference.test == "sign-flip"


def test_binary_outcomes_use_mcnemar():
    difference = paired_difference([1, 1, 1, 0, 1], [0, 0, 1, 0, 0], resamples=100, seed=0)
    assert difference.test == "mcnemar"
    assert difference.p == pytest.approx(2 / 8)
    assert difference.value == pytest.approx(0.6)


def test_identical_systems_differ_by_nothing():
    difference = paired_difference([0.2, 0.7] * 3, [0.2, 0.7] * 3, resamples=100, seed=0)
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
    # Two prompts do not show that there is no difference.
    difference = paired_difference([0.2, 0.7], [0.2, 0.7], resamples=100, seed=0)
    assert (difference.value, difference.low, difference.high, difference.p) == (0, -math.inf, math.inf, 1)


def test_samples_of_one_prompt_do_not_count_as_independent():
    agreeing = rate_interval([1.0] * 20 + [0.0] * 20, 4)  # all four samples of a prompt agree
    mixed = rate_interval([0.5] * 40, 4)
    single = wilson(20, 40)
    assert agreeing.high - agreeing.low == pytest.approx(single.high - single.low, rel=0.02)
    assert mixed.high - mixed.low < 0.6 * (single.high - single.low)
    assert rate_interval([1.0] * 30, 4).low == wilson(30, 30).low


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_difference_that_is_not_finite_is_no_evidence(broken):
    actual = paired_difference([broken, *map(float, range(29))], [0.5] * 30, resamples=200, seed=0)
    assert actual.p == 1
