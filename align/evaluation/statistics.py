"""Intervals, paired differences and corrected p-values, over prompts and over training seeds. Needs numpy and scipy.

Statistics over prompts resample *prompts*: several samples of a prompt are averaged first. All comparisons are paired,
since all systems answer the same prompts. These statistics say how well a checkpoint was measured.

Statistics over seeds (:func:`seed_mean`, :func:`seed_difference`) have one number for each run and use Student's t.
They say how much the training itself varies, which no number of prompts shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, variance
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.95
FEWEST_EQUAL = 6
"""Equal values from which on their mean has an interval of width 0. Fewer do not show that there is no spread: the
sign-flip test of five equal differences has p = 2 / 2^5 = 0.06, and of six 0.03."""
CHUNK_ELEMENTS = 1 << 22
"""Elements of a block of a resampling matrix (32 MiB)."""


class _Statistic:
    """A dataclass of numbers."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as the scorecard stores them. JSON-able; a number that is not finite is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class Estimate(_Statistic):
    """A number with its 95 % interval; ``n`` is the number of prompts (or pairs) behind it."""

    value: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True)
class Difference(_Statistic):
    """A paired difference ``treatment - control`` with its 95 % interval and two-sided p-value."""

    value: float
    low: float
    high: float
    n: int
    p: float
    test: str


def mean_interval(
    values: Sequence[float] | Floats, *, weights: Sequence[float] | Floats | None = None, resamples: int, seed: int
) -> Estimate:
    """Mean of one value per prompt with an expanded percentile bootstrap interval.

    Args:
        values: (N,) numbers.
        weights: (N,) weights, which make the mean a ratio of sums. Prompts of weight 0 are skipped, also in ``n``.

    Raises:
        ValueError: A weight is negative.
    """
    x, w = _arrays(values, weights)
    if len(x) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "bootstrap")
    value = float((x * w).sum() / w.sum())
    if np.ptp(x) == 0:
        # Equal values have no spread to resample. The spread of a few prompts is unknown.
        spread = math.inf if len(x) < FEWEST_EQUAL else 0.0
        return Estimate(value, value - spread, value + spread, len(x), "bootstrap")
    # Intervals of one seed over equally many prompts resample the same prompts.
    low, high = percentiles(_bootstrap_means(x, w, resamples, seed), len(x))
    return Estimate(value, low, high, len(x), "bootstrap")


def percentiles(resampled: Floats, n: int) -> tuple[float, float]:
    """Expanded percentile interval of a statistic's bootstrap distribution ``resampled`` (R,), over ``n`` prompts.

    The plain percentile interval is too narrow for small samples. The percentiles are moved out to match the t
    interval's width (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3).
    """
    # The tail probability whose normal quantile equals the t quantile of n - 1 degrees, widened by sqrt(n / (n - 1)).
    stretched = math.sqrt(n / (n - 1)) * t_critical(n - 1)
    tail = NormalDist().cdf(-stretched)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def wilson(successes: float, n: float, *, prompts: int | None = None) -> Estimate:
    """Rate with its Wilson score interval (Wilson 1927); ``prompts`` is the n shown when ``n`` is an effective size."""
    n_shown = round(n) if prompts is None else prompts
    if n <= 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "wilson")
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    # The interval holds every true rate whose z-test does not reject the observed one. Its center is pulled to 1/2.
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is the rate itself, which rounding would miss slightly.
    low = 0.0 if rate <= 0 else center - half
    high = 1.0 if rate >= 1 else center + half
    return Estimate(rate, max(0.0, low), min(1.0, high), n_shown, "wilson")


def rate_interval(rates: Sequence[float] | Floats, samples_per_prompt: int) -> Estimate:
    """Rate of a yes/no outcome from each prompt's share of yes among its samples, ``rates`` (N,).

    Samples of one prompt are not independent, so Wilson's n is the effective one: the binomial variance over the
    variance between prompts, kept between the number of prompts and the number of samples (Kish's design effect).
    """
    x = np.asarray(rates, dtype=np.float64)
    prompts = len(x)
    if prompts == 0:
        return wilson(0, 0)
    rate = float(x.mean())
    # With one sample per prompt the prompts are the sample; more samples count for more if prompts agree.
    effective = float(prompts)
    if samples_per_prompt > 1 and prompts > 1 and 0 < rate < 1:
        # Variance of the mean as observed between prompts. If samples of a prompt agree with each other, it is above
        # the binomial variance, and the samples count for less.
        between = float(x.var(ddof=1)) / prompts
        samples = float(prompts * samples_per_prompt)
        effective = samples if between == 0 else min(samples, max(float(prompts), rate * (1 - rate) / between))
    return wilson(rate * effective, effective, prompts=prompts)


def paired_difference(
    treatment: Sequence[float] | Floats,
    control: Sequence[float] | Floats,
    *,
    weights: Sequence[float] | Floats | None = None,
    resamples: int,
    seed: int,
) -> Difference:
    """Mean difference ``treatment - control`` over prompts that both systems answered.

    The interval is a bootstrap over prompts. The p-value is exact McNemar if all values are 0 or 1 and weigh the same,
    else a sign-flip permutation test, which is exact if under the null each difference's sign is a coin toss.

    Args:
        treatment: (N,) numbers of the first system, one per prompt.
        control: (N,) numbers of the second system, for the same prompts.
        weights: (N,) weights of the prompts, the same for both systems. Prompts of weight 0 are skipped.

    Raises:
        ValueError: The shapes differ, or a weight is negative.
    """
    x = np.asarray(treatment, dtype=np.float64)
    y = np.asarray(control, dtype=np.float64)
    # Pairing removes the prompts' own difficulty from the noise, so values must line up prompt by prompt.
    if x.shape != y.shape:
        raise ValueError(f"paired values need one shape, got {x.shape} and {y.shape}")
    x, w = _arrays(x, weights)
    y, _ = _arrays(y, weights)
    difference = mean_interval(x - y, weights=w, resamples=resamples, seed=seed)
    # Exact if possible: for yes/no outcomes only the discordant prompts carry information.
    is_binary = bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
    if is_binary and (w == w[:1]).all():
        test = "mcnemar"
        p = mcnemar(int(((x == 1) & (y == 0)).sum()), int(((x == 0) & (y == 1)).sum()))
    else:
        test = "sign-flip"
        # Another seed than the bootstrap's, so interval and p-value are independent draws.
        p = _sign_flip_p((x - y) * w, resamples, seed + 1)
    return Difference(difference.value, difference.low, difference.high, difference.n, p, test)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts: a binomial test with p = 1/2."""
    n = only_first + only_second
    k = min(only_first, only_second)
    if n == 0:
        return 1.0
    # Integers throughout: 2**n overflows a float beyond n = 1023.
    # Under the null each discordant prompt favors either system with probability 1/2.
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return float(min(1.0, 2 * tail / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order of ``p_values``; bound the family-wise error."""
    adjusted = [1.0] * len(p_values)
    # The k-th smallest p-value is multiplied by the number of hypotheses left, and never falls below an earlier one.
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _arrays(values: Sequence[float] | Floats, weights: Sequence[float] | Floats | None) -> tuple[Floats, Floats]:
    """Return (N,) values and weights of the prompts with a positive weight."""
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.shape != w.shape or x.ndim != 1:
        raise ValueError(f"values and weights need one dimension and one shape, got {x.shape} and {w.shape}")
    if not (w >= 0).all():
        raise ValueError("a weight is negative or no number")
    return x[w > 0], w[w > 0]


def _bootstrap_means(x: Floats, w: Floats, resamples: int, seed: int) -> Floats:
    """(resamples,) weighted means of resampled prompts."""
    generator = np.random.default_rng(seed)
    weighted = x * w
    blocks = []
    remaining = resamples
    # In blocks: a matrix of all resamples at once would not fit in memory for large samples.
    while remaining > 0:
        size = min(remaining, max(1, CHUNK_ELEMENTS // len(x)))
        # Each row is one resample: N prompts drawn with replacement. Both sums use the same prompts.
        picks = generator.integers(0, len(x), size=(size, len(x)))
        blocks.append(weighted[picks].sum(axis=1) / w[picks].sum(axis=1))
        remaining -= size
    return np.concatenate(blocks)


def _sign_flip_p(weighted: Floats, resamples: int, seed: int) -> float:
    """Two-sided p-value: the share of random sign patterns with a mean at least as far from zero as the observed one.

    The observed pattern is included. ``weighted`` (N,) are the prompts' differences times their weights. 1 if their
    sum is not finite, which is no evidence.
    """
    weighted = weighted[weighted != 0]
    # A difference of zero stays zero under either sign.
    if len(weighted) == 0:
        return 1.0
    observed = abs(float(weighted.sum()))
    if not math.isfinite(observed):
        return 1.0
    generator = np.random.default_rng(seed)
    tolerance = 1e-9 * float(np.abs(weighted).sum())  # sums of the same terms differ in the last bits
    hits = 0
    remaining = resamples
    while remaining > 0:
        size = min(remaining, max(1, CHUNK_ELEMENTS // len(weighted)))
        # Under the null each prompt's difference is as likely to have the other sign.
        signs = generator.integers(0, 2, size=(size, len(weighted)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ weighted) >= observed - tolerance).sum())
        remaining -= size
    # The observed pattern is included, so p is never 0 and the test stays valid.
    return (1 + hits) / (1 + resamples)


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

    The same seeds on both sides are paired. Other seeds are compared by Welch's test, which does not assume equal
    variances. None if a side has fewer than two seeds.
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
    # Squared standard error of each side. Their sum is the squared error of the difference.
    shares = [variance(values) / len(values) for values in (treatment, control)]
    total = sum(shares)
    denominator = shares[0] ** 2 / (len(treatment) - 1) + shares[1] ** 2 / (len(control) - 1)
    degrees = total**2 / denominator if denominator else math.nan
    gap = mean(treatment) - mean(control)
    return _difference(gap, math.sqrt(total), degrees, min(len(treatment), len(control)), "Welch's t")


def t_p_value(t: float, degrees: float) -> float:
    """Return the two-sided p-value of Student's t with ``degrees`` > 0 degrees of freedom, which may be a fraction."""
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))


def t_critical(degrees: float) -> float:
    """Return the t whose two-sided p-value is 5 %: half the width of an interval, in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + LEVEL / 2))


def _difference(value: float, error: float, degrees: float, n: int, test: str) -> Difference:
    """Return a difference with its standard ``error``; without any spread over the seeds there is no test."""
    # Values that differ only by rounding have no spread either.
    if error <= 1e-12 * max(1.0, abs(value)):
        return Difference(value, math.nan, math.nan, n, 1.0, "no spread over seeds")
    half = t_critical(degrees) * error
    return Difference(value, value - half, value + half, n, t_p_value(value / error, degrees), test)
