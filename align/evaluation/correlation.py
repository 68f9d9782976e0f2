"""Agreement of two scorers: Spearman's rank correlation and Cohen's kappa, with bootstrap intervals over items.

Needs numpy only. Left out: p-values; the question here is how much two scorers agree, not whether they do at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evaluation.statistics import CHUNK_ELEMENTS, Estimate, Floats, percentiles

LEAST = 4
"""Items below which an interval would say nothing."""


def spearman(x: ArrayLike, y: ArrayLike, *, resamples: int, seed: int) -> Estimate:
    """Rank correlation of ``x`` and ``y``, both (N,) or (N, K), ties at their mean rank.

    Rows are what is resampled: K numbers that belong together (both answers of a pair) stay together, and ``n`` is N.
    NaN where one side is constant.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (x, y))
    first, second = (side[:, None] if side.ndim == 1 else side for side in (first, second))
    if first.shape != second.shape:
        raise ValueError(f"both sides need one shape, got {first.shape} and {second.shape}")
    n, width = first.shape
    ones = np.ones((1, n))
    value = float(_correlations(first, second, ones)[0]) if n else math.nan
    if n < LEAST or math.isnan(value):
        return Estimate(value, math.nan, math.nan, n, "bootstrap")
    generator = np.random.default_rng(seed)
    blocks, left = [], resamples
    while left > 0:
        size = min(left, max(1, CHUNK_ELEMENTS // (8 * n * width)))
        blocks.append(_correlations(first, second, _counts(generator, n, size)))
        left -= size
    return _estimate(value, np.concatenate(blocks), n)


def cohen_kappa(first: Sequence[int], second: Sequence[int], *, resamples: int, seed: int) -> Estimate:
    """Agreement of two labellers beyond chance (Cohen 1960): 1 for equal labels, 0 for what their rates alone give.

    NaN where both use one label only.
    """
    labels = sorted({*first, *second})
    table = np.zeros((len(labels), len(labels)))
    for one, other in zip(first, second, strict=True):
        table[labels.index(one), labels.index(other)] += 1
    n = len(first)
    value = float(_kappas(table[None])[0]) if n else math.nan
    if n < LEAST or math.isnan(value):
        return Estimate(value, math.nan, math.nan, n, "bootstrap")
    # Only the counts of the table matter, so a resample of the items is one draw of them.
    tables = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=resamples)
    return _estimate(value, _kappas(tables.reshape(-1, *table.shape).astype(np.float64)), n)


# -----------------------------------------------------------------------------------------------------------------


def _estimate(value: float, resampled: Floats, n: int) -> Estimate:
    found = resampled[~np.isnan(resampled)]  # a resample of equal items has no correlation
    if len(found) < 2:
        return Estimate(value, math.nan, math.nan, n, "bootstrap")
    low, high = percentiles(found, n)
    return Estimate(value, min(low, value), max(high, value), n, "bootstrap")


def _counts(generator: np.random.Generator, n: int, size: int) -> Floats:
    """(size, n) how often each item is in each resample."""
    picks = generator.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(picks.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _correlations(first: Floats, second: Floats, counts: Floats) -> Floats:
    """(R,) rank correlations of the resamples that ``counts`` (R, N) describe."""
    weights = np.repeat(counts, first.shape[1], axis=1)  # (R, N * K)
    a, b = (_ranks(side.ravel(), weights) for side in (first, second))
    total = weights.sum(axis=1, keepdims=True)
    a -= (a * weights).sum(axis=1, keepdims=True) / total
    b -= (b * weights).sum(axis=1, keepdims=True) / total
    covariance = (a * b * weights).sum(axis=1)
    spread = (a * a * weights).sum(axis=1) * (b * b * weights).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(spread > 0, covariance / np.sqrt(spread), np.nan)
    return np.clip(found, -1, 1)


def _ranks(values: Floats, weights: Floats) -> Floats:
    """(R, M) mean ranks of ``values`` (M,) when each occurs ``weights`` (R, M) times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    group: NDArray[np.intp] = np.empty(len(values), dtype=np.intp)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # (R, groups)
    middle: Floats = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return middle[:, group]


def _kappas(tables: Floats) -> Floats:
    """(R,) kappas of contingency tables (R, L, L)."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    agreed = np.einsum("rii->r", shares)
    chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(chance < 1, (agreed - chance) / (1 - chance), np.nan)
    return found
