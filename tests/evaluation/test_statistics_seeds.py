"""Statistics over seeds, against tables and by hand."""

import math

import pytest

from align.evaluation.statistics import paired_t, seed_difference, seed_mean, t_critical, t_p_value, welch


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)],
)
def test_critical_values_are_those_of_the_printed_table(degrees, quantile):
    assert t_critical(degrees) == pytest.approx(quantile, rel=2e-6)


def test_p_values_in_closed_form():
    # One degree is Cauchy, and two have the density 1 / (2 + t²)^1.5.
    for t in (0.0, 0.3, 1.0, 5.0, 40.0):
        assert t_p_value(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-12)
        assert t_p_value(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    # A fraction of a degree lies between its neighbors.
    assert t_p_value(2.0, 3) < t_p_value(2.0, 2.5) < t_p_value(2.0, 2)


def test_the_mean_of_three_seeds_by_hand():
    # Mean 0.5, variance 0.01, standard error 0.1 / √3 = 0.057735, t = 4.302653: ± 0.248414.
    estimate = seed_mean([0.4, 0.5, 0.6])
    assert (estimate.value, estimate.n) == (pytest.approx(0.5), 3)
    assert (estimate.low, estimate.high) == (pytest.approx(0.251586, abs=1e-6), pytest.approx(0.748414, abs=1e-6))


@pytest.mark.parametrize("values", [[0.3], [0.0, 0.0, 0.0]])
def test_one_seed_or_equal_ones_have_no_interval(values):
    estimate = seed_mean(values).as_dict()
    assert (estimate["value"], estimate["low"], estimate["high"]) == (values[0], None, None)


def test_the_same_seeds_are_paired_by_hand():
    # Differences 0.1, 0.2, 0.3: mean 0.2, error 0.1 / √3, t = 3.464102 on 2 degrees,
    # p = 1 - t / √(2 + t²) = 1 - 3.464102 / √14 = 0.074180.
    first, second = {"1": 0.5, "2": 0.7, "3": 0.4}, {"3": 0.1, "1": 0.4, "2": 0.5}
    row = seed_difference(first, second)
    assert (row.test, row.n) == ("paired t", 3)
    assert (row.value, row.p) == (pytest.approx(0.2), pytest.approx(0.074180, abs=1e-6))
    assert row.low == pytest.approx(0.2 - 0.248414, abs=1e-6)


def test_other_seeds_are_compared_by_welch_by_hand():
    # Variances 0.01 and 0.04 over 3 seeds each: error √(0.05 / 3) = 0.129099, t = -0.2 / 0.129099 = -1.549193,
    # degrees (0.05 / 3)² / ((0.01 / 3)² / 2 + (0.04 / 3)² / 2) = 2.941176.
    row = seed_difference({"1": 0.4, "2": 0.5, "3": 0.6}, {"4": 0.5, "5": 0.7, "6": 0.9})
    assert (row.test, row.n, row.value) == ("Welch's t", 3, pytest.approx(-0.2))
    assert row.p == pytest.approx(t_p_value(1.5491933, 2.9411765), abs=1e-7)
    assert row.p == pytest.approx(0.2211, abs=2e-3)
    half = t_critical(2.9411765) * math.sqrt(0.05 / 3)
    assert (row.low, row.high) == (pytest.approx(-0.2 - half), pytest.approx(-0.2 + half))
    assert welch([0.4, 0.5, 0.6], [0.5, 0.7, 0.9]) == row


def test_without_a_spread_or_a_second_seed_nothing_is_tested():
    assert paired_t([0.05, 0.05, 0.05]).as_dict() == {
        "value": pytest.approx(0.05), "low": None, "high": None, "n": 3, "p": 1.0, "test": "no spread over seeds",
    }  # fmt: skip
    assert seed_difference({"1": 0.5}, {"1": 0.4}) is None
    assert seed_difference({"1": 0.5, "2": 0.6}, {"3": 0.4}) is None
