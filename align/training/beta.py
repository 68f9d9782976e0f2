"""How a preference loss's beta moves over the steps: held, or brought to a final value. Torch-free.

A function of the step alone, so a resumed run goes on where it was.
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["constant", "linear", "cosine"]


def beta_at(step: int, steps: int, first: float, final: float | None, shape: Shape) -> float:
    """beta of the optimizer step numbered ``step`` from 0, out of ``steps``: ``first`` at 0, ``final`` at the last.

    A step beyond the last has the last one's: it is what the result is scored with.
    """
    if shape == "constant" or final is None:
        return first
    share = min(step, steps - 1) / max(1, steps - 1)
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return first + (final - first) * share
