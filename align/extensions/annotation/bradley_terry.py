"""Bradley-Terry strengths of systems with a term for the position. Needs numpy only.

``P(left is better) = sigmoid(strength[left] - strength[right] + position)``. A tie is half a win for each side. A weak
normal prior keeps strengths finite if a system wins always (Bradley and Terry 1952; the order term of Davidson and
Beaver 1977, in logs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align.evaluation.statistics import Estimate, percentiles

Floats = NDArray[np.float64]
PRECISION = 0.01
"""Inverse variance of the prior of each strength and of the position term."""
ITERATIONS = 50
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Game:
    """One comparison: who was shown left and right, and the share of the win that the left side got."""

    left: str
    right: str
    result: float
    unit: str
    """Comparisons of one unit (a pair of answers) are resampled together."""


@dataclass(frozen=True)
class Strengths:
    """Strengths by system, whose mean is 0, and the position term, in log odds."""

    systems: dict[str, Estimate]
    position: Estimate


def fit(design: Floats, results: Floats) -> Floats:
    """Return the parameters (K + 1,) with the highest posterior, by Newton's method.

    Args:
        design: (N, K + 1) rows with 1 for the left system, -1 for the right one, and 1 for the position.
        results: (N,) shares of the win that the left side got.
    """
    parameters = np.zeros(design.shape[1])
    for _ in range(ITERATIONS):
        chances = 1 / (1 + np.exp(-design @ parameters))
        gradient = design.T @ (results - chances) - PRECISION * parameters
        curvature = design.T @ (design * (chances * (1 - chances))[:, None]) + PRECISION * np.eye(len(parameters))
        step = np.linalg.solve(curvature, gradient)
        # Far from the optimum a full step may overshoot.
        parameters = parameters + step * min(1.0, 2.0 / max(float(np.abs(step).max()), TOLERANCE))
        if np.abs(step).max() < TOLERANCE:
            break
    return parameters


def strengths(games: Sequence[Game], resamples: int = 200, seed: int = 0) -> Strengths | None:
    """Return the strengths with bootstrap intervals over units; None without two systems that were compared."""
    names = sorted({name for game in games for name in (game.left, game.right)})
    if len(names) < 2:
        return None
    design, results = _design(games, names)
    value = fit(design, results)
    units = sorted({game.unit for game in games})
    members = [[index for index, game in enumerate(games) if game.unit == unit] for unit in units]
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        chosen = generator.integers(0, len(units), size=len(units))
        rows = [index for unit in chosen for index in members[unit]]
        draws.append(fit(design[rows], results[rows]))
    resampled = np.array(draws)
    estimates = [_estimate(value[column], resampled[:, column], len(units)) for column in range(len(names) + 1)]
    return Strengths(dict(zip(names, estimates, strict=False)), estimates[-1])


def _design(games: Sequence[Game], names: Sequence[str]) -> tuple[Floats, Floats]:
    places = {name: place for place, name in enumerate(names)}
    design = np.zeros((len(games), len(names) + 1))
    for row, game in enumerate(games):
        design[row, places[game.left]] += 1
        design[row, places[game.right]] -= 1
        design[row, -1] = 1
    return design, np.array([game.result for game in games])


def _estimate(value: float, resampled: Floats, units: int) -> Estimate:
    if units < 2:
        return Estimate(float(value), -np.inf, np.inf, units, "bootstrap")
    low, high = percentiles(resampled, units)
    return Estimate(float(value), low, high, units, "bootstrap")
