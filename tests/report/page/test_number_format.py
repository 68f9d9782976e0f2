"""Numbers, times and sizes as they read on the page."""

import math

import pytest

from align.report.page.number_format import count, duration, interval, number, p_value, signed, size, with_minus_signs


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4123, "0.412"), (12.34, "12.3"), (1.5, "1.50"), (1840.2, "1,840"), (0.0, "0.000"), (7, "7"),
     (0.00052, "0.00052"), (-0.0004, "−0.0004"), (0.000999, "0.001"), (2e-5, "0.00002"), (3.21e-6, "3.2e−06"),
     (-0.2, "−0.200"), (None, "–"), (math.nan, "–"), (123.45, "123.5"),
     (-0.0, "0.000"), (True, "True"), ("text", "text")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_the_rest():
    assert signed(0.31) == "+0.310"
    assert signed(-0.31) == "−0.310"
    assert signed(None) == "–"
    assert interval({"low": 0.1, "high": None}) == "0.100 to –"
    assert [duration(s) for s in (8.04, 42, 200, 7500)] == ["8.0 s", "42 s", "3 min 20 s", "2 h 05 min"]
    assert [size(b) for b in (10, 2**20 * 300, 2**30 * 1.9)] == ["10 B", "300 MiB", "1.9 GiB"]
    assert [count(n) for n in (999, 38_200, 1_400_000)] == ["999", "38.2k", "1.4M"]
    assert [p_value(p) for p in (0.0001, 0.0123, 0.4)] == ["< 0.001", "0.012", "0.40"]


def test_only_hyphens_before_numbers_become_minus_signs():
    text = "kl-0_05 falls by -0.31 (95 % interval -.5 to -1e-04; a-1 - b: +0.2), GPT-4, a 3-5, x.-2"
    assert with_minus_signs(text) == (
        "kl-0_05 falls by −0.31 (95 % interval −.5 to −1e−04; a-1 − b: +0.2), GPT-4, a 3-5, x.-2"
    )
