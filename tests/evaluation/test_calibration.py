"""Calibration of score differences: bins by hand, temperatures against scipy, coverage of the error's interval."""

import json
import math

import numpy as np
import pytest
from scipy import optimize

from align.evaluation.calibration import calibration, calibration_error, fit_temperature


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def pairs(n: int, temperature: float, seed: int) -> np.ndarray:
    """Margins of a model whose differences, over ``temperature``, are the true log-odds."""
    g = np.random.default_rng(seed)
    gaps = np.abs(g.normal(0, 2, n))
    return np.where(g.uniform(size=n) < sigmoid(gaps / temperature), gaps, -gaps)


def test_bins_by_hand():
    # sigma(0.1) = 0.525, sigma(1) = 0.731, sigma(3) = 0.953
    report = calibration([0.1, -0.1, 1.0, 1.0, -1.0, 3.0], seed=0)
    shown = [(entry["low"], entry["high"], entry["n"], entry["accuracy"]["value"]) for entry in report["bins"]]
    assert shown == [(0.5, 0.55, 2, 0.5), (0.7, 0.75, 3, 2 / 3), (0.95, 1.0, 1, 1.0)]
    assert [entry["confidence"] for entry in report["bins"]] == pytest.approx([0.52498, 0.73106, 0.95257], abs=1e-5)
    # (2 * |0.525 - 0.5| + 3 * |0.731 - 0.667| + 1 * |0.953 - 1|) / 6
    assert report["ece_plain"] == pytest.approx((2 * 0.02498 + 3 * 0.06439 + 0.04743) / 6, abs=1e-4)
    assert report["n"] == 6
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_random_order_of_pairs_gives_same_curve():
    margins = pairs(400, 1.5, seed=1)
    report = calibration(margins, seed=0)
    flipped = np.random.default_rng(2).uniform(size=len(margins)) < 0.5
    p, first_wins = sigmoid(np.where(flipped, -margins, margins)), ~flipped
    place = np.minimum((p * 20).astype(int), 19)
    for entry in report["bins"]:
        upper = round(entry["low"] * 20)
        both = (place == upper) | (place == 19 - upper)
        confident = np.where(p >= 0.5, p, 1 - p)[both]
        right = np.where(p >= 0.5, first_wins, ~first_wins)[both]
        assert entry["n"] == both.sum()
        assert entry["confidence"] == pytest.approx(confident.mean())
        assert entry["accuracy"]["value"] == pytest.approx(right.mean())


def test_a_tie_is_half_right_at_even_odds():
    report = calibration([0.0, 0.0, 0.0], seed=0)
    assert report["bins"] == [
        {"low": 0.5, "high": 0.55, "n": 3, "confidence": 0.5, "accuracy": report["bins"][0]["accuracy"]}
    ]
    assert report["bins"][0]["accuracy"]["value"] == 0.5
    assert report["ece_plain"] == 0
    assert report["ece"]["value"] == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_likeliest(temperature):
    margins = pairs(500, temperature, seed=3)
    actual, note = fit_temperature(margins)
    assert actual is not None
    assert note is None
    slope = optimize.minimize_scalar(
        lambda a: np.logaddexp(0, -a * margins).mean(), bounds=(1e-6, 20), method="bounded", options={"xatol": 1e-10}
    ).x
    assert actual.value == pytest.approx(1 / slope, rel=1e-5)
    assert actual.low < temperature < actual.high
    assert actual.low == pytest.approx(1 / (1 / actual.value + 1 / actual.value - 1 / actual.high), rel=1e-6)


def test_scores_of_any_size_have_a_temperature():
    margins = pairs(500, 1.0, seed=3)
    small, _ = fit_temperature(margins * 1e-9)
    large, _ = fit_temperature(margins * 1e9)
    assert small is not None
    assert large is not None
    assert large.value / small.value == pytest.approx(1e18, rel=1e-6)


@pytest.mark.parametrize(
    ("margins", "words"),
    [([1.0, 2.0, 0.5], "every pair"), ([1.0, -2.0], "no better than chance"), ([0.0, 0.0], "no better than chance")],
)
def test_where_no_temperature_is_likeliest_that_is_said(margins, words):
    report = calibration(margins, seed=0)
    assert report["temperature"] is None
    assert report["ece_scaled"] is None
    assert words in report["note"]


def test_a_half_without_a_temperature_is_said_too():
    # one wrong pair: the half without it is ordered throughout
    report = calibration([1.0, 2.0, 0.5, 3.0, -0.5], seed=0)
    assert report["temperature"] is not None
    assert report["ece_scaled"] is None
    assert "half" in report["note"]


def test_a_wide_interval_of_the_temperature_is_open_above():
    actual, _ = fit_temperature([1.0, -0.9, 0.2])
    assert actual is not None
    assert actual.high == math.inf
    assert actual.as_dict()["high"] is None


def test_without_pairs_there_is_no_calibration():
    assert calibration([], seed=0) is None


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_pairs_without_finite_difference_are_skipped_and_counted(broken):
    margins = [0.1, -0.1, 1.0, 1.0, -1.0, 3.0]
    report = calibration([broken, *margins], seed=0)
    expected = calibration(margins, seed=0)
    assert "1 pair has a score difference that is not finite" in report["note"]
    assert report | {"note": expected["note"]} == expected
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert calibration([broken], seed=0) is None


def test_scaling_takes_the_temperature_of_the_other_half():
    margins = pairs(4000, 3.0, seed=4)
    report = calibration(margins, seed=0)
    assert report["ece"]["low"] > 0.1
    assert report["ece_scaled"]["value"] < 0.02
    assert report["ece_scaled"] == calibration(margins, seed=0)["ece_scaled"]
    assert report["ece_scaled"] != calibration(margins, seed=1)["ece_scaled"]


def test_scaled_error_uses_temperature_of_other_half():
    margins = pairs(60, 2.0, seed=5)
    half = np.random.default_rng(9).permutation(60) % 2 == 0
    scaled = margins.copy()
    for half_mask in (half, ~half):
        fitted, _ = fit_temperature(margins[~half_mask])
        assert fitted is not None
        scaled[half_mask] /= fitted.value
    expected = calibration_error(sigmoid(np.abs(scaled)), (scaled > 0).astype(float))
    assert calibration(margins, seed=9)["ece_scaled"] == pytest.approx(expected.as_dict())


TRUTH = {1.0: 0.0, 1.5: 0.0609, 3.0: 0.1534}
"""Calibration error over the bins at each temperature, from 4,000,000 pairs."""


@pytest.mark.parametrize("temperature", TRUTH)
@pytest.mark.parametrize("n", [100, 1000])
def test_the_errors_interval_covers_the_true_error(temperature, n):
    actual = []
    for seed in range(100):
        margins = pairs(n, temperature, seed)
        actual.append(calibration_error(sigmoid(np.abs(margins)), (margins > 0).astype(float)))
    covered = np.mean([entry.low - 1e-3 <= TRUTH[temperature] <= entry.high + 1e-3 for entry in actual])
    assert covered > 0.86
    assert all(entry.low <= entry.value <= entry.high for entry in actual)
    assert all(entry.n == n for entry in actual)
    assert np.mean([entry.value for entry in actual]) == pytest.approx(TRUTH[temperature], abs=0.4 / math.sqrt(n))
    assert np.mean([entry.high - entry.low for entry in actual]) < 2.5 / math.sqrt(n)


def test_the_temperatures_interval_covers_the_true_one():
    covered = 0
    for seed in range(300):
        actual, _ = fit_temperature(pairs(200, 1.5, seed))
        covered += actual is not None and actual.low <= 1.5 <= actual.high
    assert covered / 300 == pytest.approx(0.95, abs=0.044)  # 3.5 standard errors
