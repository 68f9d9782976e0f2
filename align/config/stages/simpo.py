"""Settings of the stage ``simpo``: preference optimization per token, with a margin. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config.stages.cpo import CpoConfig


class SimpoConfig(CpoConfig):
    """Length-controlled by construction: what is compared is the mean log-probability of a token."""

    loss: Literal["simpo"] = "simpo"  # type: ignore[assignment]
    """Only ``simpo``; the others are stage ``cpo``'s."""
    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-probabilities that are compared; the paper takes 2 to 10."""
    simpo_gamma: float = Field(1.0, ge=0)  # type: ignore[assignment]
    """Margin that is aimed at, in units of the reward; the paper takes 0.3 to 0.6 of beta."""
