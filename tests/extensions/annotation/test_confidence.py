"""The confidence sequence: bets and capital by hand, and coverage at all times by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.extensions.annotation.confidence import bet_sizes, confidence_sequence, log_capital
from tests.support.refusals import Refused


def test_first_bets_follow_the_formula() -> None:
    bets = bet_sizes(np.array([1.0, 0.0]), alpha=0.05)
    # t = 1: prior variance 1/4, so sqrt(2 ln 40 / (1/4 * 1 * ln 2)) = sqrt(7.37776 / 0.173287) = 6.5249
    assert bets[0] == pytest.approx(6.5249, abs=1e-4)
    # t = 2: mean (1/2 + 1) / 2 = 3/4, variance (1/4 + (1 - 3/4)^2) / 2 = 0.15625,
    # so sqrt(7.37776 / (0.15625 * 2 * ln 3)) = sqrt(7.37776 / 0.343316) = 4.6357
    assert bets[1] == pytest.approx(4.6357, abs=1e-4)


def test_capital_multiplies_by_the_truncated_bets() -> None:
    capital = np.exp(log_capital(np.array([1.0, 0.0, 0.5]), np.array([0.5, 0.25]), alpha=0.05))
    # Both bets are truncated. At m = 1/2: above 1, below 1. One gambler has 1/2 * 1.5, the other 1/2 * 0.5; the zero
    # makes both 1/2 * 0.75, and 1/2 changes nothing.
    assert capital[:, 0] == pytest.approx([0.75, 0.375, 0.375])
    # At m = 1/4: above 2, below 2/3. After 1: 1/2 (1 + 2 * 3/4) = 1.25 and 1/2 (1 - 2/3 * 3/4) = 0.25. After 0:
    # 1.25 (1 - 1/2) = 0.625 and 0.25 (1 + 1/6) = 0.2917. After 1/2: 0.625 * 1.5 = 0.9375.
    assert capital[:, 1] == pytest.approx([1.25, 0.625, 0.9375])


def test_ten_equal_verdicts_exclude_a_half() -> None:
    # Each multiplies the capital at 1/2 by 1.5: 1/2 * 1.5^9 = 19.2 is below 1 / 0.05 = 20, and 1/2 * 1.5^10 = 28.8.
    assert 0.5 * 1.5**9 < 20 < 0.5 * 1.5**10
    intervals = confidence_sequence([1.0] * 10)
    assert (intervals.low[:9] < 0.5).all()
    assert intervals.low[9] > 0.5
    opposite = confidence_sequence([0.0] * 10)
    assert opposite.high == pytest.approx(1 - intervals.low)


def test_intervals_only_shrink_and_contain_a_constant() -> None:
    values = np.random.default_rng(1).integers(0, 2, 300).astype(float)
    intervals = confidence_sequence(values)
    assert (np.diff(intervals.low) >= 0).all() and (np.diff(intervals.high) <= 0).all()
    assert (intervals.low <= intervals.high).all()
    assert confidence_sequence([]).low.shape == (0,)


@pytest.mark.parametrize("values", [[1.5], [-0.1], [math.nan], [[0.5]]])
def test_values_outside_zero_to_one_are_refused(refused: Refused, values: list[float]) -> None:
    refused(confidence_sequence, values)


@pytest.mark.parametrize(("mean", "ties"), [(0.5, 0.0), (0.5, 0.4), (0.6, 0.2), (0.9, 0.0)])
def test_mean_is_missed_at_any_time_in_few_runs(mean: float, ties: float) -> None:
    generator = np.random.default_rng(7)
    runs = 400
    missed = 0
    for _ in range(runs):
        is_tie = generator.random(300) < ties
        # The mean of all values is ``mean``: ties are 1/2, the others win with the chance that makes up for it.
        chance = (mean - 0.5 * ties) / (1 - ties)
        values = np.where(is_tie, 0.5, (generator.random(300) < chance).astype(float))
        missed += bool((log_capital(values, np.array([mean]), 0.05) >= np.log(20)).any())
    # At 5 % the chance of more than 33 of 400 is below 0.3 %.
    assert missed <= 33


def test_fixed_interval_misses_under_monitoring() -> None:
    # The same simulation with the ordinary 95 % interval after every verdict: this is what the sequence is for.
    generator = np.random.default_rng(7)
    missed = 0
    for _ in range(200):
        values = (generator.random(300) < 0.5).astype(float)
        times = np.arange(1, 301)
        gaps = np.abs(np.cumsum(values) / times - 0.5)
        missed += bool((gaps > 1.96 * 0.5 / np.sqrt(times))[9:].any())
    assert missed > 40


def test_clear_difference_is_found_within_a_hundred_pairs() -> None:
    generator = np.random.default_rng(3)
    times = []
    for _ in range(50):
        intervals = confidence_sequence((generator.random(300) < 0.75).astype(float))
        times.append(int(np.argmax(intervals.low > 0.5)) if intervals.low[-1] > 0.5 else 300)
    assert np.median(times) < 100
