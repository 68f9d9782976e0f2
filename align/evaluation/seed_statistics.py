"""Means, intervals and differences over training seeds: one number for each run, Student's t for the few there are.

Intervals over prompts say how well a checkpoint was measured. Those over seeds say how much the training itself varies,
which no number of prompts shows. Needs the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, variance

from align.evaluation.statistics import LEVEL, Difference, Estimate

MAX_TERMS = 300
"""Terms of the continued fraction; it needs fewer than 100 for any number of seeds."""
PRECISION = 1e-14
TINY = 1e-300
BISECTIONS = 200


def seed_mean(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per seed, (N,), with its t interval; ``n`` is the number of seeds.

    One seed has no interval, and neither have equal values: a spread of zero over a few seeds is no certainty.
    """
    value = mean(values) if values else math.nan
    spread = variance(values) if len(values) > 1 else 0.0
    if spread == 0:
        return Estimate(value, math.nan, math.nan, len(values), "t over seeds")
    half = t_critical(len(values) - 1) * math.sqrt(spread / len(values))
    return Estimate(value, value - half, value + half, len(values), "t over seeds")


def seed_difference(treatment: Mapping[str, float], control: Mapping[str, float]) -> Difference | None:
    """Return ``treatment - control`` (each seed → value) with its interval and two-sided p-value.

    The same seeds on both sides are paired; other seeds are compared by Welch's test, which takes no equal variances.
    None where a side has fewer than two seeds.
    """
    if min(len(treatment), len(control)) < 2:
        return None
    if treatment.keys() == control.keys():
        return paired_t([treatment[seed] - control[seed] for seed in treatment])
    return welch(list(treatment.values()), list(control.values()))


def paired_t(differences: Sequence[float]) -> Difference:
    """Return the mean of the differences by seed, (N,), with Student's t on N - 1 degrees of freedom."""
    error = math.sqrt(variance(differences) / len(differences))
    return _difference(mean(differences), error, len(differences) - 1, len(differences), "paired t")


def welch(treatment: Sequence[float], control: Sequence[float]) -> Difference:
    """Return the difference of two means over different seeds, (N,) and (M,); ``n`` is the smaller number of seeds.

    Welch (1947), with the degrees of freedom of Satterthwaite (1946).
    """
    # Squared standard error of each side. Their sum is that of the difference.
    shares = [variance(values) / len(values) for values in (treatment, control)]
    total = sum(shares)
    denominator = shares[0] ** 2 / (len(treatment) - 1) + shares[1] ** 2 / (len(control) - 1)
    degrees = total**2 / denominator if denominator else math.nan
    gap = mean(treatment) - mean(control)
    return _difference(gap, math.sqrt(total), degrees, min(len(treatment), len(control)), "Welch's t")


def t_p_value(t: float, degrees: float) -> float:
    """Return the two-sided p-value of Student's t with ``degrees`` > 0 degrees of freedom, which may be a fraction."""
    # Both tails of t are one value of this function (Numerical Recipes, 6.4).
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def t_critical(degrees: float) -> float:
    """Return the t whose two-sided p-value is 5 %: half the width of an interval, in standard errors.

    By bisection, exact to rounding. ``statistics.t_quantile`` takes whole degrees and is off by up to 1 %, which
    matters for three seeds and not for hundreds of prompts.
    """
    # Double the upper end until its p-value is small enough, then bisect between the two ends.
    low, high = 0.0, 1.0
    while t_p_value(high, degrees) > 1 - LEVEL:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if t_p_value(middle, degrees) > 1 - LEVEL:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _difference(value: float, error: float, degrees: float, n: int, test: str) -> Difference:
    """Return a difference with its standard ``error``; without any spread over the seeds nothing is tested."""
    # Values that differ by rounding alone have no spread either.
    if error <= 1e-12 * max(1.0, abs(value)):
        return Difference(value, math.nan, math.nan, n, 1.0, "no spread over seeds")
    half = t_critical(degrees) * error
    return Difference(value, value - half, value + half, n, t_p_value(value / error, degrees), test)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), by its continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    # The fraction converges quickly on this side only; the function of the other side is its complement.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(1 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of the incomplete beta function by Lentz's method."""
    # Ratios of successive numerators, and of successive denominators, which themselves could overflow.
    numerator = 1.0
    denominator = 1 / _off_zero(1 - (a + b) * x / (a + 1))
    result = denominator
    for term in range(1, MAX_TERMS):
        even = term * (b - term) * x / ((a + 2 * term - 1) * (a + 2 * term))
        odd = -(a + term) * (a + b + term) * x / ((a + 2 * term) * (a + 2 * term + 1))
        # The fraction's coefficients of even and of odd number have a formula each.
        for coefficient in (even, odd):
            denominator = 1 / _off_zero(1 + coefficient * denominator)
            numerator = _off_zero(1 + coefficient / numerator)
            result *= numerator * denominator
        if abs(numerator * denominator - 1) < PRECISION:
            break
    return result


def _off_zero(value: float) -> float:
    """Return ``value``, or a tiny number for zero, by which Lentz's method can divide."""
    return value if abs(value) > TINY else TINY
