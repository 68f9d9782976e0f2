"""Agreement of two scorers: Spearman's rank correlation and Cohen's kappa, with bootstrap intervals over items.

There are no p-values: the size of the agreement matters, not its existence. Needs numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evaluation.statistics import CHUNK_ELEMENTS, Estimate, Floats, percentiles

MIN_ITEMS = 4
"""Fewest items for an interval."""


def spearman(x: ArrayLike, y: ArrayLike, *, resamples: int, seed: int) -> Estimate:
    """Rank correlation of ``x`` and ``y``, both (N,) or (N, K), ties at their mean rank.

    Rows are resampled, so that K numbers that belong together (both answers of a pair) stay together; ``n`` is N. Rows
    with a NaN are left out, also of ``n``. NaN where one side is constant. Raises ``ValueError`` for different shapes.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (x, y))
    first, second = (side[:, None] if side.ndim == 1 else side for side in (first, second))
    if first.shape != second.shape:
        raise ValueError(f"both sides need one shape, got {first.shape} and {second.shape}")
    is_known = ~np.isnan(np.hstack([first, second])).any(axis=1)
    first, second = first[is_known], second[is_known]
    n, width = first.shape
    ones = np.ones((1, n))
    value = float(_correlations(first, second, ones)[0]) if n else math.nan
    if n < MIN_ITEMS or math.isnan(value):
        return Estimate(value, math.nan, math.nan, n, "bootstrap")
    generator = np.random.default_rng(seed)
    blocks = []
    left = resamples
    while left > 0:
        # Some eight arrays of this size are alive at once in ``_correlations``.
        size = min(left, max(1, CHUNK_ELEMENTS // (8 * n * width)))
        blocks.append(_correlations(first, second, _counts(generator, n, size)))
        left -= size
    return _estimate(value, np.concatenate(blocks), n)


def cohen_kappa(first: Sequence[int], second: Sequence[int], *, resamples: int, seed: int) -> Estimate:
    """Agreement of two labelers beyond chance (Cohen 1960): 1 for equal labels, 0 for what their rates alone give.

    ``first`` and ``second`` are (N,). NaN where both use one label only.
    """
    labels = sorted({*first, *second})
    table = np.zeros((len(labels), len(labels)))
    for a, b in zip(first, second, strict=True):
        table[labels.index(a), labels.index(b)] += 1
    n = len(first)
    value = float(_kappas(table[None])[0]) if n else math.nan
    if n < MIN_ITEMS or math.isnan(value):
        return Estimate(value, math.nan, math.nan, n, "bootstrap")
    # Kappa depends on the table's counts only, so a resample of the items is a multinomial draw of the counts.
    tables = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=resamples)
    return _estimate(value, _kappas(tables.reshape(-1, *table.shape).astype(np.float64)), n)


def _estimate(value: float, resampled: Floats, n: int) -> Estimate:
    # Near 1 or -1 every resample may lie on one side, so the interval is widened to hold the value itself.
    defined = resampled[~np.isnan(resampled)]  # a resample of equal items has no correlation
    if len(defined) < 2:
        return Estimate(value, math.nan, math.nan, n, "bootstrap")
    low, high = percentiles(defined, n)
    return Estimate(value, min(low, value), max(high, value), n, "bootstrap")


def _counts(generator: np.random.Generator, n: int, size: int) -> Floats:
    """Return (size, n) counts of each item in each resample."""
    # Each resample gets a range of bins of its own, so that one bincount serves all of them.
    picks = generator.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(picks.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _correlations(first: Floats, second: Floats, counts: Floats) -> Floats:
    """Return (R,) rank correlations of ``first`` and ``second`` (N, K) in the resamples of ``counts`` (R, N)."""
    weights = np.repeat(counts, first.shape[1], axis=1)  # (R, N * K)
    a, b = (_ranks(side.ravel(), weights) for side in (first, second))
    total = weights.sum(axis=1, keepdims=True)
    # Pearson's correlation of the ranks, in which an item counts as often as it was drawn.
    a -= (a * weights).sum(axis=1, keepdims=True) / total
    b -= (b * weights).sum(axis=1, keepdims=True) / total
    covariance = (a * b * weights).sum(axis=1)
    spread = (a * a * weights).sum(axis=1) * (b * b * weights).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: Floats = np.where(spread > 0, covariance / np.sqrt(spread), np.nan)
    return np.clip(correlations, -1, 1)


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Return (R, M) mean ranks of ``values`` (M,) when each occurs ``weights`` (R, M) times."""
    # Equal values form a group; a group's mean rank is the middle of the positions that its members take.
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    group: NDArray[np.intp] = np.empty(len(values), dtype=np.intp)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # (R, groups)
    middles: Floats = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return middles[:, group]


def _kappas(tables: Floats) -> Floats:
    """Return (R,) kappas of contingency tables (R, L, L)."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    # Agreement is the diagonal; by chance it is what the two labelers' own rates give.
    observed = np.einsum("rii->r", shares)
    chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappas: Floats = np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)
    return kappas
