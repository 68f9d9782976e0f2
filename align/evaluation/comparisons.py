"""Estimates, paired differences and verdicts from numbers per item. Torch-free.

A column is one metric of one system: a number per item and sample, and the items' weights. An item of weight 0 is left
out, such as an unsafe prompt for the refusal rate on safe ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.evaluation.statistics import (
    LEVEL,
    Difference,
    Estimate,
    holm,
    mean_interval,
    paired_difference,
    rate_interval,
)
from align.evaluation.tasks.base import Values

Row = dict[str, Any]


@dataclass(frozen=True)
class Resampling:
    """Number of bootstrap resamples, and their seed."""

    resamples: int
    seed: int


@dataclass(frozen=True)
class Column:
    """One metric of one system."""

    values: Values
    weights: list[float] | None = None
    """Per item; None where all items count alike."""

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
        """True where the counted items have different weights."""
        return self.weights is not None and len({self.weights[index] for index in self.counted}) > 1


def per_item(values: Values) -> list[float]:
    """Return the mean over the samples of each item: the unit that every statistic resamples."""
    return [sum(samples) / len(samples) for samples in values]


def is_rate(columns: Sequence[Column]) -> bool:
    """Return True where every value of every system is 0 or 1 and all items weigh alike."""
    return all(
        value in (0, 1) for column in columns for index in column.counted for value in column.values[index]
    ) and not any(column.is_ratio for column in columns)


def win_rate(points: Sequence[float]) -> Estimate:
    """Win rate from 1, 0.5 or 0 per question, with Wilson's interval.

    A tie is half for each side, so a question counts as two samples, or as fewer where questions differ more than that.
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

    None without such items, and where the two columns weigh them differently (tokenizers that cut the same rows into
    different numbers of tokens).
    """
    common = sorted(set(first.counted) & set(second.counted))
    x, y = first.at(common), second.at(common)
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
    """Correct a table in its three families (see ``scorecard.py``); ``roles`` is system → role."""
    trained = {name for name, role in roles.items() if role in ("base", "checkpoint")}
    # Comparisons that were chosen beforehand are corrected apart, so that the others cost them no power.
    primary_rows = [row for row in differences if row["metric"] == primary]
    correct([row for row in primary_rows if {row["policy"], row["against"]} <= trained], metrics)
    correct([row for row in primary_rows if not {row["policy"], row["against"]} <= trained], metrics)
    correct([row for row in differences if row["metric"] != primary], metrics)


def verdict(row: Row, better: str | None) -> str:
    """Return ``better``, ``worse``, ``higher``, ``lower`` or ``unclear``; see ``scorecard.py``."""
    low, high = row["low"], row["high"]
    # Both the interval and the corrected p-value must exclude zero.
    if low is None or high is None or low <= 0 <= high or row["p_holm"] >= 1 - LEVEL:
        return "unclear"
    is_higher = row["value"] > 0
    if better is None:
        return "higher" if is_higher else "lower"
    return "better" if is_higher == (better == "higher") else "worse"
