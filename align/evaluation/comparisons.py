"""Estimates, paired differences and verdicts from numbers per item. Torch-free.

A column is one metric of one system: a number per item and sample, and the items' weights. An item of weight 0 is left
out, such as an unsafe prompt for the refusal rate on safe ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from align.evaluation.statistics import (
    LEVEL,
    Difference,
    Estimate,
    Floats,
    holm,
    mean_interval,
    paired_difference,
    rate_interval,
)

Row = dict[str, Any]
MIN_COMPARISONS = 10
"""Fewest comparisons that a slope is fitted to."""
MAX_ITERATIONS = 500
TOLERANCE = 1e-10
MAX_STEP = 2.0


@dataclass(frozen=True)
class Resampling:
    """Number of bootstrap resamples, and their seed."""

    resamples: int
    seed: int


@dataclass(frozen=True)
class Column:
    """One metric of one system."""

    values: Sequence[Sequence[float]]
    """Per item, a number for each sample."""
    weights: list[float] | None = None
    """Per item; None if all items have equal weights."""

    def at(self, indices: Sequence[int]) -> Column:
        """Return the column of these items."""
        weights = None if self.weights is None else [self.weights[index] for index in indices]
        return Column([self.values[index] for index in indices], weights)

    @property
    def counted(self) -> list[int]:
        """Indices of the items with samples and a positive weight."""
        if self.weights is None:
            return [index for index, samples in enumerate(self.values) if samples]
        return [index for index, weight in enumerate(self.weights) if weight > 0 and self.values[index]]

    @property
    def is_ratio(self) -> bool:
        """True if the counted items have different weights."""
        return self.weights is not None and len({self.weights[index] for index in self.counted}) > 1


def per_item(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over the samples of each item: the unit that every statistic resamples."""
    return [sum(samples) / len(samples) for samples in values]


def is_rate(columns: Sequence[Column]) -> bool:
    """Return True if every value of every system is 0 or 1 and all items weigh the same."""
    return all(
        value in (0, 1) for column in columns for index in column.counted for value in column.values[index]
    ) and not any(column.is_ratio for column in columns)


def win_rate(points: Sequence[float]) -> Estimate:
    """Win rate from 1, 0.5 or 0 per question, with Wilson's interval.

    A tie is half for each side, so a question counts as two samples, or as fewer if questions differ more than that.
    """
    return rate_interval(points, 2)


def estimate(column: Column, rate: bool, resampling: Resampling, *, halves: bool = False) -> Row:
    """Return the column's value with its 95 % interval; ``n`` counts the counted items.

    ``rate`` says that all values are 0 or 1, ``halves`` that they are points of a win rate.
    """
    counted = column.at(column.counted)
    means = per_item(counted.values)
    if halves:
        return win_rate(means).as_dict()
    if rate:
        # Items may differ in their samples; the largest number bounds the effective sample size.
        interval: Estimate = rate_interval(means, max((len(samples) for samples in counted.values), default=1))
    else:
        weights = counted.weights if counted.is_ratio else None
        interval = mean_interval(means, weights=weights, resamples=resampling.resamples, seed=resampling.seed)
    return interval.as_dict()


def difference(first: Column, second: Column, resampling: Resampling) -> Row | None:
    """Return ``first - second`` over the items that both count.

    None without such items, or if the two columns weigh them differently (tokenizers that cut the same rows into
    different numbers of tokens).
    """
    common = sorted(set(first.counted) & set(second.counted))
    x = first.at(common)
    y = second.at(common)
    ones = [1.0] * len(common)
    # A paired mean needs one weight per item, not two.
    if not common or (x.weights or ones) != (y.weights or ones):
        return None
    paired: Difference = paired_difference(
        per_item(x.values),
        per_item(y.values),
        weights=np.asarray(x.weights, float) if x.is_ratio else None,
        resamples=resampling.resamples,
        seed=resampling.seed,
    )
    return paired.as_dict()


def correct(differences: Sequence[Row], metrics: Mapping[str, Any]) -> None:
    """Add ``p_holm``, corrected over the list, and the verdict to every row."""
    for row, adjusted in zip(differences, holm([row["p"] for row in differences]), strict=True):
        row["p_holm"] = adjusted
        row["verdict"] = verdict(row, metrics[row["metric"]]["better"])


def correct_table(
    differences: Sequence[Row], roles: Mapping[str, str], primary: str, metrics: Mapping[str, Any]
) -> None:
    """Correct a table in its three families (see ``scorecard_builder.py``); ``roles`` is system → role."""
    trained = {name for name, role in roles.items() if role in ("base", "checkpoint")}
    # Comparisons that were chosen beforehand are corrected separately, so the others cost them no power.
    primary_rows = [row for row in differences if row["metric"] == primary]
    correct([row for row in primary_rows if {row["policy"], row["against"]} <= trained], metrics)
    correct([row for row in primary_rows if not {row["policy"], row["against"]} <= trained], metrics)
    correct([row for row in differences if row["metric"] != primary], metrics)


def verdict(row: Row, better: str | None) -> str:
    """Return ``better``, ``worse``, ``higher``, ``lower`` or ``unclear``; see ``scorecard_builder.py``."""
    low = row["low"]
    high = row["high"]
    # Both the interval and the corrected p-value must exclude zero.
    if low is None or high is None or low <= 0 <= high or row["p_holm"] >= 1 - LEVEL:
        return "unclear"
    is_higher = row["value"] > 0
    if better is None:
        return "higher" if is_higher else "lower"
    return "better" if is_higher == (better == "higher") else "worse"


def length_controlled(preferences: Sequence[float], gaps: Sequence[float]) -> Estimate | None:
    """Win rate of the first system at equal length; None if the data cannot tell (:func:`obstacle`).

    Judges prefer long answers. As in length-controlled AlpacaEval (arXiv 2404.04475), a logistic regression explains
    each preference by the difference in length, and its prediction at no difference is the win rate:

        P(first wins) = sigmoid(a + b tanh(gap / sd(gap)))          the win rate at equal length is sigmoid(a)

    This is AlpacaEval's formula without its term for each instruction's difficulty (``length_controlled_minimal``
    there), which it has fitted only for its own 805 instructions. AlpacaEval fits with an L1 penalty chosen by
    cross-validation. Here it is Firth's penalty (Jeffreys' prior; Firth 1993, Heinze and Schemper 2002), which has no
    setting, treats both sides the same, vanishes as n grows, and stays finite if a judge decides only by length. No
    other style is controlled for.

    The interval is Wald's on the logit. In simulations with 40 to 400 prompts it covers at 0.94 to 0.99. A bootstrap
    over prompts covers at 0.80 to 0.97, and has no width if every preference is the same.

    Args:
        preferences: (N,) 1 for a win, 0 for a loss, 0.5 for neither.
        gaps: (N,) characters of the first system's answer minus the second's.

    Raises:
        ValueError: The shapes differ.
    """
    y = np.asarray(preferences, dtype=np.float64)
    gap = np.asarray(gaps, dtype=np.float64)
    if y.shape != gap.shape or y.ndim != 1:
        raise ValueError(f"preferences and gaps need one dimension and one shape, got {y.shape} and {gap.shape}")
    if obstacle(gaps) is not None:
        return None
    # ``tanh`` caps the influence of extreme gaps: beyond a few deviations, longer is just longer.
    spread = float(gap.std(ddof=1))
    x = np.tanh(gap / spread) if spread > 0 else np.zeros_like(gap)
    a, variance = _fit(x, y)
    # The interval is built on the logit and mapped back, so it stays between 0 and 1.
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * math.sqrt(variance)
    return Estimate(_sigmoid(a), _sigmoid(a - half), _sigmoid(a + half), len(y), "logistic at equal length")


def obstacle(gaps: Sequence[float]) -> str | None:
    """Return the reason why there is no win rate at equal length; None if there is one."""
    if len(gaps) < MIN_COMPARISONS:
        return f"fewer than {MIN_COMPARISONS} comparisons"
    if min(gaps) > 0 or max(gaps) < 0:
        return "one side's answers are always longer, so that nothing is known about equal length"
    return None


def _fit(x: Floats, y: Floats) -> tuple[float, float]:
    """Return the intercept and its variance, by Fisher scoring on Firth's modified score; ``x`` and ``y`` are (N,).

    Each residual is corrected by the observation's leverage h: y - p + h (1/2 - p) (Heinze and Schemper 2002, eq. 3).
    """
    # Without any difference in length there is no slope to fit, only an intercept.
    design = np.column_stack([np.ones_like(x), x]) if np.ptp(x) > 0 else np.ones((len(x), 1))
    beta = np.zeros(design.shape[1])
    for _ in range(MAX_ITERATIONS):
        p = 1 / (1 + np.exp(-design @ beta))
        # Fisher information is X' W X with W = p (1 - p); its inverse is the estimates' covariance.
        weight = p * (1 - p)
        covariance = np.linalg.inv(design.T @ (design * weight[:, None]))
        leverage = weight * np.einsum("ij,jk,ik->i", design, covariance, design)
        # Newton step on the score that Firth's penalty modifies; long steps are cut, so it cannot diverge.
        step = covariance @ (design.T @ (y - p + leverage * (0.5 - p)))
        beta += step / max(1.0, float(np.abs(step).max()) / MAX_STEP)
        if np.abs(step).max() < TOLERANCE:
            break
    else:
        raise RuntimeError(
            f"the regression on length did not converge in {MAX_ITERATIONS} iterations on {len(y)} comparisons"
        )
    return float(beta[0]), float(covariance[0, 0])


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
