"""Settings of the stage ``simpo``: preference optimization per token, with a margin. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config.stages.cpo import CpoConfig


class SimpoConfig(CpoConfig):
    """Compares mean log-probabilities per token, so length does not help."""

    loss: Literal["simpo"] = "simpo"  # type: ignore[assignment]
    """Only ``simpo``; stage ``cpo`` has the other losses."""
    beta: float = Field(2.0, gt=0)
    """Scale of the compared mean log-probabilities; 2 to 10 in the paper."""
    simpo_gamma: float = Field(1.0, ge=0)  # type: ignore[assignment]
    """Target margin in units of the reward; 0.3 to 0.6 of beta in the paper."""
