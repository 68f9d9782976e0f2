"""Bradley-Terry with a position term, against log odds worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.extensions.annotation import bradley_terry
from align.extensions.annotation.bradley_terry import Game, strengths


def play(left: str, right: str, wins: int, losses: int) -> list[Game]:
    results = [1.0] * wins + [0.0] * losses
    return [Game(left, right, result, f"{left}{right}{number}") for number, result in enumerate(results)]


def test_strengths_and_position_are_the_log_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bradley_terry, "PRECISION", 1e-9)
    # x on the left wins 80 of 100, on the right 60 of 100 (so y on the left wins 40).
    # logit(0.8) = d + c and logit(0.4) = -d + c, so d = (ln 4 + ln 1.5) / 2 and c = (ln 4 - ln 1.5) / 2.
    fitted = strengths([*play("x", "y", 80, 20), *play("y", "x", 40, 60)], resamples=100)
    assert fitted is not None
    difference = fitted.systems["x"].value - fitted.systems["y"].value
    assert difference == pytest.approx((math.log(4) + math.log(1.5)) / 2, abs=1e-4)
    assert fitted.position.value == pytest.approx((math.log(4) - math.log(1.5)) / 2, abs=1e-4)
    assert sum(estimate.value for estimate in fitted.systems.values()) == pytest.approx(0, abs=1e-6)
    assert fitted.systems["x"].low < fitted.systems["x"].value < fitted.systems["x"].high


def test_ties_are_half_a_win_each() -> None:
    fitted = strengths([Game("x", "y", 0.5, str(number)) for number in range(20)], resamples=10)
    assert fitted is not None
    assert fitted.systems["x"].value == pytest.approx(0, abs=1e-9)
    assert fitted.position.value == pytest.approx(0, abs=1e-9)


def test_system_that_always_wins_has_a_finite_strength() -> None:
    fitted = strengths([*play("x", "y", 30, 0), *play("y", "x", 0, 30)], resamples=20)
    assert fitted is not None
    assert 2 < fitted.systems["x"].value < 10
    assert np.isfinite(fitted.systems["x"].high)


def test_interval_spans_both_units_of_two() -> None:
    fitted = strengths([Game("x", "y", 1.0, "first"), Game("x", "y", 0.0, "second")], resamples=50)
    assert fitted is not None
    # With two units the interval reaches from the lowest draw to the highest: the lost unit twice, the won unit twice.
    # x on the left wins twice: strength s, -s for y, and position s too. The highest posterior has
    # 2 * (1 - sigmoid(s + s + s)) = 0.01 * s, about s = 1.95.
    interval = fitted.systems["x"]
    assert 2 * (1 - 1 / (1 + math.exp(-3 * interval.high))) == pytest.approx(0.01 * interval.high, rel=1e-6)
    assert (interval.low, interval.value, interval.n) == (pytest.approx(-interval.high), pytest.approx(0, abs=1e-9), 2)
    assert fitted.systems["y"].high == pytest.approx(interval.high)


def test_interval_of_one_unit_has_no_bounds() -> None:
    fitted = strengths([Game("x", "y", 1.0, "pair"), Game("y", "x", 0.0, "pair")], resamples=3)
    assert fitted is not None
    for estimate in (*fitted.systems.values(), fitted.position):
        assert (estimate.low, estimate.high, estimate.n) == (-math.inf, math.inf, 1)


def test_one_system_has_no_strength() -> None:
    assert strengths([]) is None
