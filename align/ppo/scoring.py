"""The score of a response in a pipeline: a reward model, a verifiable function, or a weighted sum of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.data.scoring import Scorer
from align.ppo.prompts import Row


@dataclass(frozen=True)
class RewardScorer:
    """``align.models.reward.RewardModel`` on rows. Prompts are rendered anew with the reward model's own template."""

    model: Any

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """One score per response; a truncated one is read without an end of turn."""
        finished = None if truncated is None else [not cut for cut in truncated]
        scores: list[float] = self.model.score([row["prompt"] for row in rows], responses, finished)
        return scores


@dataclass(frozen=True)
class WeightedSum:
    """The sum of ``weight * score`` over ``parts``."""

    parts: tuple[tuple[float, Scorer], ...]

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """One score per response."""
        totals = [0.0] * len(responses)
        for weight, scorer in self.parts:
            for index, score in enumerate(scorer.score(rows, responses, truncated)):
                totals[index] += weight * score
        return totals
