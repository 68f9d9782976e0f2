"""Win rates at equal length: cases that paper solves, a judge of length alone, symmetry, coverage, another library."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evaluation.comparisons import length_controlled, obstacle
from align.evaluation.statistics import Estimate
from tests.support.refusals import Refused

Z = 1.959963984540054


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _found(preferences: list[float], gaps: list[float]) -> Estimate:
    estimate = length_controlled(preferences, gaps)
    assert estimate is not None
    return estimate


def _drawn(seed: int, n: int, intercept: float, slope: float, shift: float) -> tuple[list[float], list[float]]:
    """Preferences of the very model, the gap's standard deviation being 1 in the population."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(shift, 1, n)
    chances = 1 / (1 + np.exp(-(intercept + slope * np.tanh(gaps))))
    return [float(won) for won in rng.random(n) < chances], [float(gap) for gap in gaps]


def test_equal_lengths_leave_the_share_of_wins() -> None:
    # Nothing to regress on. Firth's penalty on one intercept adds half a win and half a loss: 7 of 10 is 7.5 of 11,
    # and the logit's variance is 1 / (n p (1 - p)).
    estimate = _found([1.0] * 7 + [0.0] * 3, [0.0] * 10)
    p = 7.5 / 11
    half = Z / math.sqrt(10 * p * (1 - p))
    assert estimate.value == pytest.approx(p)
    assert (estimate.low, estimate.high) == pytest.approx((_sigmoid(_logit(p) - half), _sigmoid(_logit(p) + half)))
    assert estimate.n == 10


def test_two_gaps_of_one_size_by_hand() -> None:
    # Two groups of ten are a saturated model: each has 8.5 or 4.5 wins of 11 after Firth's halves, and no gap is half
    # way between their logits, whatever the gap's size. 12 of 20 won, but 0.6 is not the answer.
    estimate = _found([1.0] * 8 + [0.0] * 2 + [1.0] * 4 + [0.0] * 6, [300.0] * 10 + [-300.0] * 10)
    longer, shorter = 8.5 / 11, 4.5 / 11
    a = (_logit(longer) + _logit(shorter)) / 2
    half = Z * math.sqrt(sum(1 / (10 * p * (1 - p)) for p in (longer, shorter)) / 4)
    assert estimate.value == pytest.approx(_sigmoid(a))
    assert (estimate.low, estimate.high) == pytest.approx((_sigmoid(a - half), _sigmoid(a + half)))


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.5])
def test_a_judge_that_likes_nothing_but_length_finds_them_even(shift: float) -> None:
    wins, gaps = _drawn(3, 400, 0.0, 4.0, shift)
    estimate = _found(wins, gaps)
    assert abs(estimate.value - 0.5) < 0.1 and estimate.low < 0.5 < estimate.high
    assert shift == 0 or abs(sum(wins) / 400 - 0.5) > 0.25  # what the plain win rate says


def test_even_one_that_never_errs_about_length() -> None:
    # Length decides without a remainder: without a penalty no finite fit is the best.
    gaps = [float(gap) for gap in np.random.default_rng(3).normal(-1.5, 1, 400)]
    wins = [float(gap > 0) for gap in gaps]
    estimate = _found(wins, gaps)
    assert sum(wins) / 400 < 0.1 and estimate.low < 0.5 < estimate.high
    assert estimate.high - estimate.low > 0.5  # and little is known


def test_the_units_of_length_do_not_matter() -> None:
    wins, gaps = _drawn(1, 100, 0.5, 1.0, 0.5)
    assert _found(wins, [1000 * gap for gap in gaps]).value == pytest.approx(_found(wins, gaps).value)


def test_the_other_side_has_the_rest() -> None:
    wins, gaps = _drawn(2, 80, 0.7, 1.5, 0.8)
    wins[:10] = [0.5] * 10
    actual, turned = _found(wins, gaps), _found([1 - win for win in wins], [-gap for gap in gaps])
    assert turned.value == pytest.approx(1 - actual.value)
    assert (turned.low, turned.high) == pytest.approx((1 - actual.high, 1 - actual.low))


def test_winning_always_still_has_an_interval() -> None:
    gaps = [float(gap) for gap in np.random.default_rng(4).normal(0, 1, 50)]
    estimate = _found([1.0] * 50, gaps)
    assert 0.8 < estimate.low < estimate.value < 1 and estimate.high - estimate.low > 0.01


def test_it_covers_what_is_true() -> None:
    for n, intercept, slope, shift in ((40, 0.0, 0.0, 0.0), (80, 0.5, 1.0, 0.5), (80, 0.0, 3.0, 0.3)):
        hits = 0
        for seed in range(200):
            estimate = _found(*_drawn(seed, n, intercept, slope, shift))
            hits += estimate.low <= _sigmoid(intercept) <= estimate.high
        assert 0.91 <= hits / 200 <= 1.0, (n, intercept, slope, shift)


def test_another_library_finds_the_same_without_a_penalty() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    wins, gaps = _drawn(6, 805, 0.4, 1.2, 0.6)
    wins[:40] = [0.5] * 40
    y, gap = np.array(wins), np.array(gaps)
    x = np.column_stack([np.ones(805), np.tanh(gap / gap.std(ddof=1))])
    fit = linear.LogisticRegression(C=1e6, fit_intercept=False, tol=1e-8)
    fit.fit(np.vstack([x, x]), np.repeat([1, 0], 805), sample_weight=np.concatenate([y, 1 - y]))
    assert _found(wins, gaps).value == pytest.approx(_sigmoid(fit.coef_[0][0]), abs=0.002)


@pytest.mark.parametrize(
    ("gaps", "why"),
    [
        ([1.0, -1.0] * 4, "fewer than 10"),
        ([float(n) for n in range(1, 30)], "always longer"),
        ([-float(n) for n in range(1, 30)], "always longer"),
        ([5.0] * 20, "always longer"),
    ],
)
def test_what_the_data_cannot_say_is_not_said(gaps: list[float], why: str) -> None:
    wins = [float(n % 2) for n in range(len(gaps))]
    assert length_controlled(wins, gaps) is None
    assert why in str(obstacle(gaps))
    assert obstacle([1.0, -1.0] * 5) is None


def test_shapes_are_checked(refused: Refused) -> None:
    refused(length_controlled, [1.0] * 10, [0.0] * 11)
