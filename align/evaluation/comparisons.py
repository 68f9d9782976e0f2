"""From numbers per item to estimates, paired differences and verdicts. Torch-free.

A column is one metric of one system: a number per item and sample, and the items' weights. An item of weight 0 takes
no part: a refusal rate on safe prompts has nothing to say about unsafe ones.
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
    """How many bootstrap resamples and from which seed."""

    resamples: int
    seed: int


@dataclass(frozen=True)
class Column:
    """One metric of one system."""

    values: Values
    weights: list[float] | None = None
    """Per item; None where all count alike and a value is the item's own."""

    def at(self, indices: Sequence[int]) -> Column:
        """These items alone."""
        weights = None if self.weights is None else [self.weights[index] for index in indices]
        return Column([self.values[index] for index in indices], weights)

    @property
    def counted(self) -> list[int]:
        """Items that take part."""
        if self.weights is None:
            return [index for index, samples in enumerate(self.values) if samples]
        return [index for index, weight in enumerate(self.weights) if weight > 0 and self.values[index]]

    @property
    def ratio(self) -> bool:
        """Whether the items that take part weigh differently."""
        return self.weights is not None and len({self.weights[index] for index in self.counted}) > 1


def per_item(values: Values) -> list[float]:
    """Mean over the samples of each item: the unit every statistic resamples."""
    return [sum(samples) / len(samples) for samples in values]


def is_rate(columns: Sequence[Column]) -> bool:
    """Whether every value of every system is 0 or 1."""
    return all(
        value in (0, 1) for column in columns for index in column.counted for value in column.values[index]
    ) and not any(column.ratio for column in columns)


def win_rate(points: Sequence[float]) -> Estimate:
    """Share won, from 1, 0.5 or 0 a question, with Wilson's interval; the interval of every win rate there is.

    A tie is half for each side, so a question counts as two, and as fewer where questions differ more than that.
    """
    return rate_interval(points, 2)


def estimate(column: Column, rate: bool, resampling: Resampling, *, halves: bool = False) -> Row:
    """The column's value with its 95 % interval; ``n`` counts the items that take part.

    ``rate`` says that all values are 0 or 1, ``halves`` that they are points of a win rate.
    """
    found = column.at(column.counted)
    means = per_item(found.values)
    if halves:
        return win_rate(means).as_dict()
    if rate:
        result: Estimate = rate_interval(means, max((len(samples) for samples in found.values), default=1))
    else:
        weights = found.weights if found.ratio else None
        result = mean_interval(means, weights=weights, resamples=resampling.resamples, seed=resampling.seed)
    return result.as_dict()


def difference(first: Column, second: Column, resampling: Resampling) -> Row | None:
    """``first - second`` over the items that count for both.

    None where the two weigh those items differently (tokenizers that cut the same rows into other numbers of tokens),
    and where none is left.
    """
    common = sorted(set(first.counted) & set(second.counted))
    one, other = first.at(common), second.at(common)
    if not common or (one.weights or [1.0] * len(common)) != (other.weights or [1.0] * len(common)):
        return None
    weights = np.asarray(one.weights, float) if one.ratio else None
    found: Difference = paired_difference(
        per_item(one.values), per_item(other.values), weights=weights, resamples=resampling.resamples,
        seed=resampling.seed,
    )  # fmt: skip
    return found.as_dict()


def correct(differences: Sequence[Row], metrics: Mapping[str, Any]) -> None:
    """Add ``p_holm`` over the whole list, and the verdict that follows."""
    for row, adjusted in zip(differences, holm([row["p"] for row in differences]), strict=True):
        row["p_holm"] = adjusted
        row["verdict"] = verdict(row, metrics[row["metric"]]["better"])


def correct_table(
    differences: Sequence[Row], roles: Mapping[str, str], primary: str, metrics: Mapping[str, Any]
) -> None:
    """Correct a whole table in its three families (see ``scorecard.py``); ``roles`` is system → role."""
    trained = {name for name, role in roles.items() if role in ("base", "checkpoint")}
    decisive = [row for row in differences if row["metric"] == primary]
    correct([row for row in decisive if {row["policy"], row["against"]} <= trained], metrics)
    correct([row for row in decisive if not {row["policy"], row["against"]} <= trained], metrics)
    correct([row for row in differences if row["metric"] != primary], metrics)


def verdict(row: Row, better: str | None) -> str:
    """``better``, ``worse``, ``higher``, ``lower`` or ``unclear``; see ``scorecard.py``."""
    low, high = row["low"], row["high"]
    if low is None or high is None or low <= 0 <= high or row["p_holm"] >= 1 - LEVEL:
        return "unclear"
    up = row["value"] > 0
    if better is None:
        return "higher" if up else "lower"
    return "better" if up == (better == "higher") else "worse"
