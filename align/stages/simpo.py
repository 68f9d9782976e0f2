"""SimPO (arXiv 2405.14734): preference optimization per token, without a reference and towards a margin.

Stage ``cpo`` with ``loss: simpo`` and the paper's scale of beta. Experimental in trl, whose CPOTrainer it runs on.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.stages import cpo
from align.stages.cpo import CpoConfig

run = cpo.run


class SimpoConfig(CpoConfig):
    """Length-controlled by construction: what is compared is the mean log-probability of a token."""

    loss: Literal["simpo"] = "simpo"  # type: ignore[assignment]
    """Only ``simpo``; the others are stage ``cpo``'s."""
    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-probabilities that are compared; the paper takes 2 to 10."""
    simpo_gamma: float = Field(1.0, ge=0)  # type: ignore[assignment]
    """Margin that is aimed at, in units of the reward; the paper takes 0.3 to 0.6 of beta."""
