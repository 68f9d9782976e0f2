"""RLOO: REINFORCE with the mean score of the other responses to the prompt as the baseline (arXiv 2402.14740)."""

from __future__ import annotations

from typing import ClassVar

import torch

from align.config.stages.rloo import RlooConfig
from align.rl.advantages import leave_one_out, whiten_responses
from align.rl.losses import Aggregation, RatioLevel
from align.rl.objectives.grpo import GroupObjective


class RLOOObjective(GroupObjective):
    """A response is one action: its probability is what the loss raises, lowers and clips."""

    name: ClassVar[str] = "rloo"
    config: RlooConfig
    aggregation: Aggregation = "sequence"
    ratio_level: RatioLevel = "response"

    def compare(self, totals: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Return ``totals`` minus the mean of the other responses, (B,)."""
        advantages = leave_one_out(totals, groups)
        return whiten_responses(advantages) if self.config.whiten_advantages else advantages
