"""Layers drawn at random for some steps (LISA, arXiv 2403.17919, algorithm 1), each layer as likely as any other."""

from __future__ import annotations

import numpy as np


def drawn_layers(count: int, layers: int, period: int, seed: int) -> list[int]:
    """``layers`` of ``count`` layers, without repeats, for one period: a function of its arguments alone."""
    random = np.random.default_rng([seed, period])
    return sorted(int(layer) for layer in random.choice(count, size=min(layers, count), replace=False))
